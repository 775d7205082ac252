"""Models from timm, with weights from files, folders, Hugging Face's hub or timm itself."""

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from pipelines.errors import UserError, clipped
from trainer.classes import check_order_stated, class_order, listed_outputs
from trainer.config import Kwargs, StudentConfig
from trainer.distributed import World
from trainer.model_folders import named_folder
from trainer.optim import batch_norms
from trainer.weights import Checkpoint, read_checkpoint, read_weights

# Names that differ between the authors' code and timm.
_ALIASES = {"tresnet_l_v2": "tresnet_v2_l"}
_STUDENT_SIZE = (
    "Change data.image_size or data.eval_image_size, or use another model; some of timm's take any size with "
    "--student.kwargs.dynamic_img_size true"
)


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
      doubt: as trainer.classes.order_doubt.
    Raises:
      UserError: an unknown model, a checkpoint that does not fit, weights that cannot be downloaded, or a classifier
        that may be in another order.
    """
    saved = starting_weights(config.name, config.checkpoint) if config.pretrained or config.checkpoint else None
    if saved is None and not config.pretrained:
        model = create_model(config.name, num_classes, image_size, config.kwargs)
        model.start_note = ""
        return model.train()
    start = _match_classifier(config, saved, num_classes, names, doubt)
    # timm itself replaces a classifier of another size that it has downloaded
    outputs = num_classes if saved is None and start.outputs != num_classes else start.outputs
    if saved is None:
        model = download(config.name, outputs, image_size, config.kwargs, "student")
    else:
        model = create_model(config.name, outputs, image_size, config.kwargs, saved.weights, saved.source)
    if start.is_fresh and outputs == start.outputs:
        model = _with_new_classifier(config, model, num_classes, image_size)
    if start.order is not None:
        refuse_size(model, config.name, image_size)
        permute_classifier(model, start.order, start.source, image_size)
    model.start_note = start.note
    if start.is_fresh:
        model.start_note += f": the classifier ({', '.join(_classifiers(model))}) starts from scratch"
    return model.train()


@dataclasses.dataclass(frozen=True)
class ClassifierStart:
    """How the classifier of a student begins that starts from weights.

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
    config: StudentConfig, saved: Checkpoint | None, num_classes: int, names: list[str] | None, doubt: str
) -> ClassifierStart:
    """What becomes of the classifier of the weights that a student starts from.

    Raises:
      UserError: the names are not as many as the outputs, or nothing says in which order these are.
    """
    source = saved.source if saved else f"student '{config.name}': timm's weights"
    known = num_outputs(config.name, saved.weights) if saved else pretrained_outputs(config.name, "student")
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
            if len(values) == len(order):
                values.copy_(values.index_select(0, which))
    if not torch.allclose(model(images), expected, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{source}: names the classes in another order than the dataset, and the classifier of this model cannot "
            "be put into the dataset's. Build the dataset with its classes in the order of the weights"
        )


def synchronize_batch_norms(model: nn.Module, world: World) -> nn.Module:
    """The model with SyncBatchNorm layers, which share parameters and buffers with the ones they replace.

    On one rank, or without BatchNorm, there is nothing to do.

    Raises:
      UserError: several ranks on CPUs.
    """
    if world.size == 1 or not batch_norms(model):
        return model
    if world.device.type != "cuda":
        raise UserError(
            f"run.batch_norm is sync with {world.size} ranks on CPUs, and PyTorch has SyncBatchNorm on GPUs alone: use "
            "run.batch_norm reduce, or one rank with a larger run.micro_batch"
        )
    return convert_sync_batchnorm(model)


@torch.no_grad()
def refuse_size(model: nn.Module, name: str, image_size: int, advice: str = _STUDENT_SIZE) -> None:
    """Raise a UserError if a model cannot take images of this size; `advice` says what to do about it."""
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # every model checks its input in its own way
        if channels := _channels(model):
            advice = f"It takes {channels} channel(s), images have 3 (gray ones, too): leave in_chans out of its kwargs"
        raise UserError(
            f"model '{name}' cannot take images of {image_size} px ({clipped(error, 90)}). {advice}"
        ) from error
    finally:
        model.train(training)


def _channels(model: nn.Module) -> int:
    """How many channels the first layer of a model takes, 0 if these are the 3 of an image, or nothing says it."""
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    modules = dict(model.named_modules())
    layers = [modules.get(name) for name in ((names,) if isinstance(names, str) else names)]
    found = [layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    return found[0] if found and found[0] != 3 else 0


@torch.no_grad()
def refuse_outputs(student: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Raise a UserError if a student does not give one logit for each class in training.

    Some of timm's give features (encoders) or, asked for by their arguments, a second output beside the logits.
    """
    images = torch.zeros(2, 3, image_size, image_size)
    try:
        with torch.random.fork_rng(devices=[]):  # a copy: BatchNorm's statistics stay what they are
            found = _shape_in_words(copy.deepcopy(student).train()(images))
    except Exception as error:  # every model fails in its own way
        raise UserError(
            f"model '{name}' cannot be trained on images of {image_size} px ({clipped(error, 120)}). Change "
            "data.image_size or student.kwargs, or use another model"
        ) from error
    if found != f"{[2, num_classes]}":
        raise UserError(
            f"model '{name}' gives {found} for 2 images in training, not [2, {num_classes}]: it cannot be trained as a "
            "classifier. Change student.kwargs, or use another model"
        )


@torch.no_grad()
def check_logits(model: nn.Module, name: str, num_classes: int, image_size: int, advice: str) -> None:
    """Raise a UserError if a model in evaluation mode does not give one logit for each class."""
    found = _shape_in_words(model(torch.zeros(1, 3, image_size, image_size)))
    if found != f"{[1, num_classes]}":
        raise UserError(
            f"model '{name}' gives {found} for an image, not [1, {num_classes}]: it is no classifier. {advice}"
        )


def _shape_in_words(outputs: object) -> str:
    return f"{list(outputs.shape)}" if torch.is_tensor(outputs) else f"{len(outputs)} outputs"


@torch.no_grad()
def check_batch_norm(student: nn.Module, micro_batch: int, image_sizes: list[int]) -> None:
    """Raise a UserError if BatchNorm would see a single value of a channel in training.

    With one image in a micro-batch that is so behind a pooling, or where the image has shrunk to one pixel.
    """
    if micro_batch > 1:
        return
    with torch.random.fork_rng(devices=[]):  # a copy: BatchNorm's statistics stay what they are
        for size in sorted({*image_sizes}):
            with one_value_is_reported(size):
                copy.deepcopy(student).train()(torch.zeros(1, 3, size, size))


@contextlib.contextmanager
def one_value_is_reported(image_size: int | None = None) -> Iterator[None]:
    """Inside, a normalisation over a single value is a UserError."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1" not in str(error):
            raise
        size = f" of {image_size} px" if image_size else ""
        raise UserError(
            f"BatchNorm would see a single value of a channel (images{size}, run.micro_batch too small), which has no "
            "variance. Set run.micro_batch, and augment.mix_group or run.global_batch where they are smaller, to 2 or "
            "more, or use larger images"
        ) from error


def create_model(
    name: str,
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
    name = architecture(name)
    kwargs = {
        "num_classes": num_classes,
        **with_size(name, image_size, {**(folder.kwargs if folder else {}), **kwargs}),
    }
    if weights is not None:
        overlay = {"state_dict": weights, "num_classes": num_classes, "source": ""}
        pretrained = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    downloads = weights is None and bool(pretrained)
    try:
        model = timm.create_model(name, **kwargs, **pretrained)
    except TypeError as error:
        raise UserError(
            f"model '{name}' does not take these arguments ({clipped(error, 120)}). Change its kwargs"
        ) from error
    except Exception as error:  # every model checks its arguments in its own way
        if downloads and not isinstance(error, AssertionError | ValueError):
            raise
        if weights is not None and isinstance(error, RuntimeError):
            raise UserError(f"{source}: {_why_not_fitting(name, weights, error)}") from error
        raise UserError(
            f"model '{name}' cannot be built for images of {image_size} px with these arguments "
            f"({type(error).__name__}: {clipped(error, 120)}). Change data.image_size or its kwargs"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)
    model.pretrained_cfg.update(folder.config if folder else {})
    return model


def _why_not_fitting(name: str, weights: dict[str, torch.Tensor], error: RuntimeError) -> str:
    config = timm.get_pretrained_cfg(name)
    names = config.first_conv if config is not None else None
    name_of_first = f"{names if isinstance(names, str) else next(iter(names or ()), '')}.weight"
    first = weights.get(name_of_first)
    if first is not None and first.ndim == 4 and first.shape[1] == 1:
        return (
            "was trained on images of one channel, and images have 3 here (gray ones, too). Give weights that were "
            f"trained on RGB images, or replace '{name_of_first}', w, by w.repeat(1, 3, 1, 1) / 3"
        )
    return f"does not fit model '{name}' ({clipped(error, 200)}). Give the model it was saved from"


def with_size(name: str, image_size: int, kwargs: Kwargs) -> Kwargs:
    """The arguments that a model is built with: some of timm's are built for one image size, pixels."""
    config = timm.get_pretrained_cfg(architecture(name))
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return kwargs
    return {"img_size": image_size, **kwargs}


def _with_new_classifier(config: StudentConfig, source: nn.Module, num_classes: int, image_size: int) -> nn.Module:
    """The model of `source`, with its weights, but with a classifier of other classes.

    `source` has taken the file's weights, every one of them. Of a second model, as random as one that is trained from
    scratch, exactly the classifier stays, and what else depends on the number of classes.
    """
    model = create_model(config.name, num_classes, image_size, config.kwargs)
    random, weights = model.state_dict(), source.state_dict()
    replaced = {name for name, value in weights.items() if value.shape != random[name].shape}
    if source.num_classes == num_classes:  # other classes, but as many
        layers = tuple(f"{layer}." for layer in _classifiers(source))
        replaced = {name for name, value in weights.items() if name.startswith(layers) and len(value) == num_classes}
        if not replaced:
            raise UserError(
                f"student '{config.name}': its weights are of other classes than the dataset, and timm does not say "
                "which layer its classifier is. Use another model"
            )
    kept = {name: value for name, value in weights.items() if name not in replaced}
    model.load_state_dict({**random, **kept})
    model.pretrained_cfg = source.pretrained_cfg
    return model


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """The layers that give a model's logits: timm names one, or several, or none."""
    names = model.pretrained_cfg.get("classifier")
    return (names,) if isinstance(names, str) else tuple(names or ())


def starting_weights(name: str, checkpoint: Path | None) -> Checkpoint | None:
    """The weights of a checkpoint, or of the folder or repository that a model is named by; None for timm's own."""
    if checkpoint is not None:
        return read_checkpoint(checkpoint)
    if folder := named_folder(name):
        return Checkpoint(read_weights(folder.weights_file()), folder.classes, name)
    return None


def architecture(name: str) -> str:
    """timm's name of a model that is named in any way: by timm's name, a folder, or a repository of the hub."""
    folder = named_folder(name)
    return known_name(folder.architecture if folder else name)


def known_name(name: str) -> str:
    """timm's name of a model; a UserError if it has none."""
    name = _ALIASES.get(name, name)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists them; null is no model"
        raise UserError(f"unknown model '{clipped(name)}'; {hint}")
    return name


def num_outputs(name: str, weights: dict[str, torch.Tensor]) -> int | None:
    """How many classes the weights of a model tell apart; None where they have no classifier under timm's name."""
    config = timm.get_pretrained_cfg(architecture(name))
    layers = config.classifier if config else ()
    layers = (layers,) if isinstance(layers, str) else layers or ()
    found = (weights.get(f"{layer}.weight") for layer in layers)
    return next((len(weight) for weight in found if weight is not None), None)


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
