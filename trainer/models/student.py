"""The student: a model of the dataset's classes, random or started from weights."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from pipelines.common.errors import UserError, clipped
from trainer.config.sections import StudentConfig
from trainer.config.setting_names import SettingError, prefix_of, spelling_settings
from trainer.models.checks import check_size
from trainer.models.class_names import check_order_stated, class_order, listed_outputs
from trainer.models.factory import (
    classifier_layers,
    create_model,
    download,
    num_outputs,
    pretrained_outputs,
    starting_weights,
)
from trainer.models.files.model_folders import ModelFolder, named_folder
from trainer.models.files.weights import Checkpoint


def build_student(
    config: StudentConfig, num_classes: int, image_size: int, names: list[str] | None = None, doubt: str = ""
) -> nn.Module:
    """The model to train, in training mode.

    A classifier of the dataset's classes in another order is put into the dataset's; one of other classes is replaced
    by a random one. The model's attribute `start_note` says so in a sentence; it is "" elsewhere.

    Args:
      num_classes, names: the dataset's classes; names in the order of the labels, None where it has no names.
      doubt: as trainer.models.class_names.order_doubt.
    Raises:
      UserError: an unknown model, a checkpoint that does not fit, weights that cannot be downloaded, or a classifier
        that may be in another order.
    """
    with spelling_settings(prefix_of(config.key)):
        if config.pretrained or config.checkpoint:
            model, note = _started_from_weights(config, num_classes, image_size, names, doubt)
        else:
            model, note = create_model(config.name, num_classes, image_size, config.kwargs), ""
    model.start_note = note  # pyright: ignore[reportArgumentType]: a module takes attributes of any type
    return model.train()


def _started_from_weights(
    config: StudentConfig, num_classes: int, image_size: int, names: list[str] | None, doubt: str
) -> tuple[nn.Module, str]:
    """The model with the weights that it starts from, and the note of `build_student`, whose arguments these are."""
    name = named_folder(config.name) or config.name
    saved = starting_weights(name, config.checkpoint)
    known = num_outputs(name, saved.weights) if saved else pretrained_outputs(config.name)
    start = _match_classifier(config, saved, known, num_classes, names, doubt)
    if saved is None:
        outputs = num_classes  # timm itself replaces a classifier of another size that it has downloaded.
        model = download(config.name, outputs, image_size, config.kwargs)
    else:
        outputs = start.outputs
        model = create_model(name, outputs, image_size, config.kwargs, saved.weights, saved.source)
    if start.is_fresh and outputs == start.outputs:
        model = _with_new_classifier(name, config, model, num_classes, image_size)
    if start.order is not None:
        check_size(model, config.name, image_size)
        permute_classifier(model, start.order, start.source, image_size)
    if not start.is_fresh:
        return model, start.note
    return model, f"{start.note}: the classifier ({', '.join(classifier_layers(model))}) starts from scratch"


@dataclasses.dataclass(frozen=True)
class ClassifierStart:
    """The decision about the classifier of a student that starts from weights.

    Attributes:
      outputs: how many classes the weights have.
      source: what names the outputs, for messages.
      order: for each class of the dataset, which output it is; None where nothing is to be moved.
      is_fresh: the weights are of other classes, so the classifier starts from scratch.
      note: why it is not the classifier of the weights; "" where it is.
    """

    outputs: int
    source: Path | str
    order: list[int] | None = None
    is_fresh: bool = False
    note: str = ""


def _match_classifier(
    config: StudentConfig,
    saved: Checkpoint | None,
    known: int | None,
    num_classes: int,
    names: list[str] | None,
    doubt: str,
) -> ClassifierStart:
    """Decide how the classifier of a student that starts from weights begins.

    Args:
      known: how many classes the weights distinguish; None where their classifier is not known.
      num_classes, names, doubt: as for `build_student`.
    Raises:
      UserError: the names are not as many as the outputs, or nothing says in which order these are.
    """
    source = saved.source if saved else f"student '{config.name}': timm's weights"
    listed, where = listed_outputs(config.classes, saved.classes if saved else None, source)
    outputs = known or (num_classes if listed is None else len(listed))
    if listed is not None and len(listed) != outputs:
        in_file = "" if config.classes else ", with {} FILE"
        raise SettingError(
            f"{where}: names {len(listed)} classes, {source} has {outputs} outputs",
            lambda spelled: "Name every output, one on a line, in their order" + in_file.format(spelled("classes")),
        )
    if outputs != num_classes:
        note = f"they are of {outputs} classes, the dataset has {num_classes}"
        return ClassifierStart(outputs, where, is_fresh=True, note=note)
    if names is None or listed == names:
        return ClassifierStart(outputs, where)
    if listed is None:
        check_order_stated(doubt, source)
        return ClassifierStart(outputs, where)
    if sorted(listed) == sorted(names):
        note = f"their classes are in another order, so the classifier is put into the dataset's by name ({where})"
        return ClassifierStart(outputs, where, class_order(names, listed, where), note=note)
    other = next(name for name in names if names.count(name) > listed.count(name))
    note = f"they are of other classes, '{clipped(other)}' of the dataset is not among them"
    return ClassifierStart(outputs, where, is_fresh=True, note=note)


@torch.no_grad()
def permute_classifier(model: nn.Module, order: list[int], source: Path | str, image_size: int) -> None:
    """Put a model's outputs into another order, by the rows of its classifier.

    Args:
      order: for each output that the model is to have, which one of the present ones it is.
      source: what names the outputs, for the message.
    Raises:
      UserError: timm does not say which layers the classifier is, or they do not decide the order alone.
    """
    model.eval()
    which = torch.tensor(order)
    images = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    expected = model(images).index_select(1, which)
    modules = dict(model.named_modules())
    for layer in classifier_layers(model):
        for values in modules[layer].parameters() if layer in modules else ():
            if values.shape[:1] == (len(order),):
                values.copy_(values.index_select(0, which))
    if not torch.allclose(model(images), expected, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{source}: names the classes in another order than the dataset, and the classifier of this model cannot "
            "be put into the dataset's. Build the dataset with its classes in the order of the weights"
        )


def _with_new_classifier(
    name: str | ModelFolder, config: StudentConfig, started: nn.Module, num_classes: int, image_size: int
) -> nn.Module:
    """The model with the weights of `started`, but with a classifier of other classes.

    `started` has taken the file's weights, every one of them. From a second model, as random as one that is trained
    from scratch, exactly the classifier is kept, and what else depends on the number of classes.
    """
    model = create_model(name, num_classes, image_size, config.kwargs)
    random, weights = model.state_dict(), started.state_dict()
    replaced = {name for name, value in weights.items() if value.shape != random[name].shape}
    if started.num_classes == num_classes:  # There are as many classes, but others.
        layers = tuple(f"{layer}." for layer in classifier_layers(started))
        replaced = {
            name for name, value in weights.items() if name.startswith(layers) and value.shape[:1] == (num_classes,)
        }
        if not replaced:
            raise UserError(
                f"student '{name}': its weights are of other classes than the dataset, and timm does not say "
                "which layer its classifier is. Use another model"
            )
    kept = {name: value for name, value in weights.items() if name not in replaced}
    model.load_state_dict({**random, **kept})
    model.pretrained_cfg = started.pretrained_cfg
    return model
