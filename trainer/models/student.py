"""The student: a model of the dataset's classes, random or started from weights."""

from pathlib import Path

import torch
from torch import nn

from pipelines.common.errors import UserError, clipped
from trainer.config.sections import StudentConfig
from trainer.models.checks import check_images
from trainer.models.class_names import check_order_stated, class_order
from trainer.models.factory import classifier_layers, create_model, starting_weights
from trainer.models.files.model_folders import ModelFolder


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
    start = starting_weights(config.name, config.checkpoint, config.classes)
    listed = start.classes
    outputs = start.outputs or (num_classes if listed is None else len(listed))
    if listed is not None and len(listed) != outputs:
        raise UserError(
            f"{start.namer}: names {len(listed)} classes, {start.source} has {outputs} outputs. Name every output, one "
            "on a line, in their order, in a file (option classes)"
        )
    others = ""
    if outputs != num_classes:
        others = f"they are of {outputs} classes, the dataset has {num_classes}"
    elif names is not None and listed is None:
        check_order_stated(doubt, start.source)
    elif names is not None and sorted(names) != sorted(listed or ()):
        other = next(name for name in names if names.count(name) > (listed or []).count(name))
        others = f"they are of other classes, '{clipped(other)}' of the dataset is not among them"
    made = num_classes if start.weights is None else outputs
    model = start.build(made, image_size, config.kwargs)
    if others:
        if made == outputs:
            model = _with_new_classifier(start.name, config, model, num_classes, image_size)
        return model, f"{others}: the classifier ({', '.join(classifier_layers(model))}) starts from scratch"
    if names is None or listed is None or listed == names:
        return model, ""
    check_images(model.eval(), config.name, image_size, "Change data.image_size")
    permute_classifier(model, class_order(names, listed, start.namer), start.namer, image_size)
    note = "their classes are in another order, so the classifier is put into the dataset's by name"
    return model, f"{note} ({start.namer})"


@torch.no_grad()
def permute_classifier(model: nn.Module, order: list[int], source: Path | str, image_size: int) -> None:
    """Put a model's outputs into another order, by the rows of its classifier.

    Args:
      model: in evaluation mode.
      order: for each output that the model is to have, which one of the present ones it is.
      source: what names the outputs, for the message.
    Raises:
      UserError: timm does not say which layers the classifier is, or they do not decide the order alone.
    """
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
