"""Models from timm, with weights from files, folders, Hugging Face's hub or timm itself."""

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import nn

from pipelines.common.errors import UserError, clipped, reason_of
from trainer.cluster.memory import is_out_of_memory
from trainer.config.model_arguments import Kwargs
from trainer.config.sections import StudentConfig
from trainer.models.checkpoint_format import not_finite
from trainer.models.checks import check_size
from trainer.models.class_names import check_order_stated, class_order, listed_outputs
from trainer.models.model_folders import ModelFolder, layer_names, named_folder
from trainer.models.weights import Checkpoint, read_checkpoint, read_weights

# Names that differ between the authors' code and timm.
_ALIASES = {"tresnet_l_v2": "tresnet_v2_l"}
_MANY_CLASSES = 100_000  # a classifier of more is made only for weights that have as many rows


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its pixels, from its timm configuration.

    Attributes:
      mean, std: normalisation of RGB in [0, 1].
      interpolation: of the resize in validation, bicubic or bilinear.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    @property
    def fill(self) -> tuple[int, int, int]:
        """The colour of nothing: what geometric augmentation puts where the source has no pixel.

        Source: timm.data.transforms_factory, img_mean = min(255, round(255 x mean)).
        """
        return tuple(min(255, round(255 * value)) for value in self.mean)


def preprocessing(model: nn.Module) -> Preprocessing:
    """A timm model's preprocessing; bicubic where it names a filter that the pipelines do not have."""
    config = model.pretrained_cfg
    interpolation = config.get("interpolation", "bicubic")
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=interpolation if interpolation in ("bicubic", "bilinear") else "bicubic",
    )


def build_student(
    config: StudentConfig, num_classes: int, image_size: int, names: list[str] | None = None, doubt: str = ""
) -> nn.Module:
    """The model to train, in training mode.

    A classifier of the dataset's classes in another order is put into the dataset's; one of other classes is replaced
    by a random one. The model's attribute `start_note` says so in a sentence; it is "" elsewhere.

    Args:
      num_classes, names: of the dataset's classes; names in the order of the labels, None where it has no names.
      doubt: as trainer.models.class_names.order_doubt.
    Raises:
      UserError: an unknown model, a checkpoint that does not fit, weights that cannot be downloaded, or a classifier
        that may be in another order.
    """
    name = named_folder(config.name) or config.name
    saved = starting_weights(name, config.checkpoint) if config.pretrained or config.checkpoint else None
    if saved is None and not config.pretrained:
        model = create_model(name, num_classes, image_size, config.kwargs)
        model.start_note = ""
        return model.train()
    known = num_outputs(name, saved.weights) if saved else pretrained_outputs(config.name, "student")
    start = _match_classifier(config, saved, known, num_classes, names, doubt)
    # timm itself replaces a classifier of another size that it has downloaded
    outputs = num_classes if saved is None and start.outputs != num_classes else start.outputs
    if saved is None:
        model = download(config.name, outputs, image_size, config.kwargs, "student")
    else:
        model = create_model(name, outputs, image_size, config.kwargs, saved.weights, saved.source)
    if start.is_fresh and outputs == start.outputs:
        model = _with_new_classifier(name, config.kwargs, model, num_classes, image_size)
    if start.order is not None:
        check_size(model, config.name, image_size)
        permute_classifier(model, start.order, start.source, image_size)
    model.start_note = start.note
    if start.is_fresh:
        model.start_note += f": the classifier ({', '.join(_classifiers(model))}) starts from scratch"
    return model.train()


@dataclasses.dataclass(frozen=True)
class ClassifierStart:
    """The decision about the classifier of a student that starts from weights.

    Attributes:
      outputs: how many classes the weights have.
      order: for each class of the dataset, which output it is; None where nothing is to be moved.
      is_fresh: the weights are of other classes, so the classifier starts from scratch.
      source: what names the outputs, for messages.
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
    """Decide how the classifier of a student begins that starts from weights.

    Args:
      known: how many classes the weights tell apart; None where their classifier is not known.
      num_classes, names, doubt: as for `build_student`.
    Raises:
      UserError: the names are not as many as the outputs, or nothing says in which order these are.
    """
    source = saved.source if saved else f"student '{config.name}': timm's weights"
    listed, where = listed_outputs(config.classes, saved and saved.classes, source, "student")
    outputs = known or (num_classes if listed is None else len(listed))
    if listed is not None and len(listed) != outputs:
        raise UserError(
            f"{where}: names {len(listed)} classes, {source} has {outputs} outputs. Name every output, one on a line, "
            f"in their order{'' if config.classes else ', with --student.classes FILE'}"
        )
    if outputs != num_classes:
        note = f"they are of {outputs} classes, the dataset has {num_classes}"
        return ClassifierStart(outputs, where, is_fresh=True, note=note)
    if names is None or listed == names:
        return ClassifierStart(outputs, where)
    if listed is None:
        check_order_stated(doubt, source, "--student.classes")
        return ClassifierStart(outputs, where)
    if sorted(listed) == sorted(names):
        note = f"their classes are in another order, so the classifier is put into the dataset's by name ({where})"
        return ClassifierStart(outputs, where, class_order(names, listed, where, "student"), note=note)
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
    for layer in _classifiers(model):
        for values in modules[layer].parameters() if layer in modules else ():
            if values.shape[:1] == (len(order),):
                values.copy_(values.index_select(0, which))
    if not torch.allclose(model(images), expected, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{source}: names the classes in another order than the dataset, and the classifier of this model cannot "
            "be put into the dataset's. Build the dataset with its classes in the order of the weights"
        )


def create_model(
    name: str | ModelFolder,
    num_classes: int,
    image_size: int,
    kwargs: Kwargs,
    weights: dict[str, torch.Tensor] | None = None,
    source: Path | str = "",
    **pretrained,
) -> nn.Module:
    """A timm model, with weights if there are some; timm renames the keys of older and foreign files.

    Args:
      name: timm's, or hf-hub:ORGANISATION/REPOSITORY or local-dir:FOLDER for the architecture that is described there.
      weights, source: what was read, of `num_classes` classes, and from where.
      pretrained: further arguments for timm.create_model.
    Raises:
      UserError: an unknown model or argument, or weights that do not fit.
    """
    folder = named_folder(name)
    name = architecture(folder or name)
    kwargs = with_size(name, image_size, {**(folder.kwargs if folder else {}), **kwargs})
    if weights is not None:
        check_num_outputs(name, weights, num_classes, source)
        overlay = {"state_dict": weights, "num_classes": num_classes, "source": ""}
        pretrained = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        with all_weights_required() if weights is not None else contextlib.nullcontext():
            model = timm.create_model(name, **{"num_classes": num_classes, **kwargs}, **pretrained)
    except Exception as error:  # every model checks its arguments in its own way
        if weights is None and pretrained and not isinstance(error, TypeError | AssertionError | ValueError):
            raise  # an error of the download
        raise UserError(_why_not_made(name, image_size, weights, source, error)) from error
    if weights is not None:
        check_values(model, weights, source)
    model.pretrained_cfg.pop("state_dict", None)
    model.pretrained_cfg.update(folder.config if folder else {})
    return model


@contextlib.contextmanager
def all_weights_required() -> Iterator[None]:
    """Inside, a weight that a model would not get is an error: for some (DLA) timm keeps random ones in silence.

    This replaces a method of nn.Module for the whole process, so models are built in one thread. Parts that a model
    loads while it is itself loaded may lack weights, as they may elsewhere.
    """
    load, loading = nn.Module.load_state_dict, []

    def load_all(self, *args, **named):
        loading.append(self)
        try:
            found = load(self, *args, **named)
        finally:
            loading.pop()
        if found.missing_keys and not loading:
            raise RuntimeError("Missing key(s) in state_dict: " + ", ".join(f'"{name}"' for name in found.missing_keys))
        return found

    nn.Module.load_state_dict = load_all
    try:
        yield
    finally:
        nn.Module.load_state_dict = load


def check_num_outputs(name: str, weights: dict[str, torch.Tensor], num_classes: int, source: Path | str) -> None:
    """Raise a UserError, before a classifier of that size is made, if no weights of a model can be its classifier's."""
    found = num_outputs(name, weights)
    if found is None and num_classes > _MANY_CLASSES:
        found = max((length for value in weights.values() for length in value.shape), default=0)
        found = None if found >= num_classes else found
    if found not in (None, num_classes):
        raise UserError(
            f"{source}: its weights have {found:,} outputs, not the {num_classes:,} that are said to be there. Give "
            "the weights that belong to it"
        )


def check_values(model: nn.Module, weights: dict[str, torch.Tensor], source: Path | str) -> None:
    """Raise a UserError if what a model has taken from weights is not finite, or was whole numbers."""
    own = model.state_dict()
    for name, value in own.items():
        given = weights.get(name, value)
        if value.is_floating_point() and not given.is_floating_point():
            kind = str(given.dtype).removeprefix("torch.")
            raise UserError(
                f"{source}: '{clipped(name)}' holds {kind}, not floating numbers. Give the file as it was saved"
            )
    if name := not_finite(own.items()):
        raise UserError(
            f"{source}: '{clipped(name)}' is not finite: it holds NaN or an infinity. Give weights from before that"
        )


def _why_not_made(
    name: str, image_size: int, weights: dict[str, torch.Tensor] | None, source: Path | str, error: Exception
) -> str:
    if is_out_of_memory(error):
        return (
            f"model '{name}': memory is too short for it ({reason_of(error)}). Free some memory, or use a smaller model"
        )
    if weights is not None and isinstance(error, RuntimeError):
        return f"{source}: {_why_not_fitting(name, weights, error)}"
    return _why_not_built(name, image_size, error)


def _why_not_built(name: str, image_size: int, error: Exception) -> str:
    if isinstance(error, TypeError):
        return f"model '{name}' does not take these arguments ({reason_of(error)}). Change its kwargs"
    return (
        f"model '{name}' cannot be built for images of {image_size} px with these arguments "
        f"({type(error).__name__}: {reason_of(error)}). Change data.image_size or its kwargs"
    )


def _why_not_fitting(name: str, weights: dict[str, torch.Tensor], error: RuntimeError) -> str:
    config = timm.get_pretrained_cfg(name)
    name_of_first = f"{next(iter(layer_names(config and config.first_conv)), '')}.weight"
    first = weights.get(name_of_first)
    if first is not None and first.ndim == 4 and first.shape[1] == 1:
        return (
            "was trained on images of one channel, and images have 3 here (gray ones, too). Give weights that were "
            f"trained on RGB images, or replace '{name_of_first}', w, by w.repeat(1, 3, 1, 1) / 3"
        )
    if prefix := _common_prefix(list(weights)):
        return (
            f"does not fit model '{name}': all its names begin with '{prefix}', as of a larger model that holds it. "
            f"Save {{k.partition('{prefix}')[2]: v for k, v in weights.items()}}"
        )
    return f"does not fit model '{name}' ({reason_of(error, 160)}). Give the model it was saved from"


def _common_prefix(names: list[str]) -> str:
    """Return what all names begin with, up to a dot; "" where there is nothing."""
    return os.path.commonprefix(names).rpartition(".")[0] + "." if "." in os.path.commonprefix(names) else ""


def with_size(name: str | ModelFolder, image_size: int, kwargs: Kwargs) -> Kwargs:
    """The arguments that a model is built with: some of timm's are built for one image size, pixels."""
    config = timm.get_pretrained_cfg(architecture(name))
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return kwargs
    return {"img_size": image_size, **kwargs}


def _with_new_classifier(
    name: str | ModelFolder, kwargs: Kwargs, source: nn.Module, num_classes: int, image_size: int
) -> nn.Module:
    """The model of `source`, with its weights, but with a classifier of other classes.

    `source` has taken the file's weights, every one of them. Of a second model, as random as one that is trained from
    scratch, exactly the classifier stays, and what else depends on the number of classes.
    """
    model = create_model(name, num_classes, image_size, kwargs)
    random, weights = model.state_dict(), source.state_dict()
    replaced = {name for name, value in weights.items() if value.shape != random[name].shape}
    if source.num_classes == num_classes:  # other classes, but as many
        layers = tuple(f"{layer}." for layer in _classifiers(source))
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
    model.pretrained_cfg = source.pretrained_cfg
    return model


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """The layers that give a model's logits: timm names one, or several, or none."""
    return layer_names(model.pretrained_cfg.get("classifier"))


def starting_weights(name: str | ModelFolder, checkpoint: Path | None) -> Checkpoint | None:
    """The weights of a checkpoint, or of the folder or repository that a model is named by; None for timm's own."""
    if checkpoint is not None:
        return read_checkpoint(checkpoint)
    if folder := named_folder(name):
        return Checkpoint(read_weights(folder.weights_file()), folder.classes, folder.name)
    return None


def architecture(name: str | ModelFolder) -> str:
    """Timm's name of a model that is named in any way: by timm's name, a folder, or a repository of the hub."""
    folder = named_folder(name)
    return known_name(folder.architecture if folder else name)


def known_name(name: str) -> str:
    """Timm's name of a model; a UserError if it has none."""
    name = _ALIASES.get(name, name)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists them; null is no model"
        raise UserError(f"unknown model '{clipped(name)}'; {hint}")
    return name


def num_outputs(name: str | ModelFolder, weights: dict[str, torch.Tensor]) -> int | None:
    """How many classes the weights of a model tell apart; None where they have no classifier under timm's name."""
    config = timm.get_pretrained_cfg(architecture(name))
    found = (weights.get(f"{layer}.weight") for layer in layer_names(config and config.classifier))
    return next((len(weight) for weight in found if weight is not None and weight.ndim), None)


def pretrained_outputs(name: str, key: str) -> int:
    """How many classes timm's pretrained weights of a model tell apart.

    Args:
      key: as for `download`.
    Raises:
      UserError: there are none.
    """
    source = timm.get_pretrained_cfg(known_name(name))
    if source is None or not source.has_weights:
        raise UserError(f"{_owner(key)} '{name}': timm has no pretrained weights for it. {_give_weights(key)}")
    return source.num_classes


def download(name: str, num_classes: int, image_size: int, kwargs: Kwargs, key: str) -> nn.Module:
    """A model with timm's pretrained weights.

    Args:
      key: of the model in the configuration: student, teacher, teacher.others; "" where it is in none.
    Raises:
      UserError: they cannot be downloaded.
    """
    try:
        return create_model(name, num_classes, image_size, kwargs, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # whatever the download library raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{_owner(key)} '{name}': its weights cannot be downloaded ({reason[0]}). {_give_weights(key)}"
        ) from error


def _owner(key: str) -> str:
    return key.partition(".")[0] or "model"


def _give_weights(key: str) -> str:
    return f"Give its weights with {key}.checkpoint FILE" if key else "Give a file or folder with its weights instead"
