"""Models from timm, and the files that hold their weights."""

import copy
import dataclasses
import difflib
from pathlib import Path

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from pipelines.errors import UserError
from trainer.config import Kwargs, StudentConfig
from trainer.distributed import World
from trainer.optim import batch_norms

# Names that differ between the authors' code and timm.
_ALIASES = {"tresnet_l_v2": "tresnet_v2_l"}
# Where the weights lie in checkpoints of this trainer, of timm and of the authors.
_NESTED = {"ema": ("ema", "state_dict_ema", "model_ema"), "raw": ("student", "state_dict", "model")}
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


def build_student(config: StudentConfig, num_classes: int, image_size: int) -> nn.Module:
    """The model to train, in training mode.

    Weights of a model with other classes are taken all but the classifier's; `new_classifier` tells.

    Raises:
      UserError: an unknown model, a checkpoint that does not fit, or weights that cannot be downloaded.
    """
    if config.pretrained:
        pretrained_outputs(config.name, "student")
        return download(config.name, num_classes, image_size, config.kwargs, "student").train()
    if config.checkpoint is None:
        return create_model(config.name, num_classes, image_size, config.kwargs).train()
    weights = read_weights(config.checkpoint)
    classes = num_outputs(config.name, weights) or num_classes
    model = create_model(config.name, classes, image_size, config.kwargs, weights, config.checkpoint)
    if classes != num_classes:
        model = _with_new_classifier(config, model, num_classes, image_size)
    return model.train()


def new_classifier(student: nn.Module, num_classes: int) -> str | None:
    """One sentence if a student that started from weights was given a new classifier; None if it was not.

    Source: timm keeps the number of classes that the weights were of in `pretrained_cfg`, and the model's own beside.
    """
    classes = student.pretrained_cfg["num_classes"]
    if classes == num_classes:
        return None
    layers = ", ".join(_classifiers(student.pretrained_cfg.get("classifier")))
    return f"they are of {classes} classes, the dataset has {num_classes}: the classifier ({layers}) starts anew"


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
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model '{name}' cannot take images of {image_size} px ({reason}). {advice}") from error
    finally:
        model.train(training)


@torch.no_grad()
def refuse_outputs(student: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Raise a UserError if a student does not give one logit for each class in training.

    Some of timm's give features (encoders) or, asked for by their arguments, a second output beside the logits.
    """
    with torch.random.fork_rng(devices=[]):  # a copy: BatchNorm's statistics stay what they are
        outputs = copy.deepcopy(student).train()(torch.zeros(2, 3, image_size, image_size))
    if not torch.is_tensor(outputs):
        found = f"{len(outputs)} outputs"
    elif outputs.shape != (2, num_classes):
        found = f"{list(outputs.shape)}"
    else:
        return
    raise UserError(
        f"model '{name}' gives {found} for 2 images in training, not [2, {num_classes}]: it cannot be trained as a "
        "classifier. Change student.kwargs, or use another model"
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file says of a model.

    Attributes:
      weights: tensors by name.
      classes: names of the model's outputs in their order, in checkpoints of this trainer; None in other files.
    """

    weights: dict[str, torch.Tensor]
    classes: list[str] | None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights alone, as `read_checkpoint`."""
    return read_checkpoint(path).weights


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of this trainer (the averaged weights if it has some), of timm or of the authors.

    Raises:
      UserError: the file is missing, damaged, or holds more than plain data.
    """
    content = read_file(path)
    classes = content.get("classes") if isinstance(content, dict) else None
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        classes = None
    return Checkpoint(select_weights(path, content)[0], classes)


def select_weights(path: Path, content: object, which: str = "auto") -> tuple[dict[str, torch.Tensor], str]:
    """The weights in what a file holds.

    Args:
      which: ema, raw, or auto: the averaged ones if there are some, as timm does.
    Returns:
      tensors by name, and which they are, "" where the file does not say.
    Raises:
      UserError: there are none of that kind.
    """
    entries = content if isinstance(content, dict) else {}
    found = {kind: entries[key] for kind, keys in _NESTED.items() for key in keys if isinstance(entries.get(key), dict)}
    if kind := entries.get("weights") if "state_dict" in entries else None:  # best.pt says which ones it holds
        found = {kind: entries["state_dict"]}
    if not found and any(torch.is_tensor(value) for value in entries.values()):
        found = {"": entries}
    kind = next(iter(found), "") if which == "auto" else which
    weights = found.get(kind, {})
    if not any(torch.is_tensor(value) for value in weights.values()):
        if found and which != "auto":
            raise UserError(f"{path}: holds no {which} weights, only {', '.join(map(_kind_in_words, found))}")
        keys = ", ".join(key for keys in _NESTED.values() for key in keys)
        raise UserError(f"{path}: holds no weights; expected tensors by name, or nested under {keys}")
    return {name.removeprefix("module."): value for name, value in weights.items()}, kind


def _kind_in_words(kind: str) -> str:
    return f"{kind} ones" if kind else "some without a name"


def read_file(path: Path):
    """What a file of weights holds, plain data alone; nothing in it is run.

    Raises:
      UserError: the file is missing, damaged, or holds more than plain data.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        hint = "a file of weights; a run's best ones are in RUN/checkpoints/best.pt"
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Give {hint}") from error
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise errors of their own
        raise UserError(
            f"{path}: damaged, or holds more than weights, which is not loaded ({type(error).__name__}). "
            "Save its state_dict alone"
        ) from error


def create_model(
    name: str,
    num_classes: int,
    image_size: int,
    kwargs: Kwargs,
    weights: dict[str, torch.Tensor] | None = None,
    path: Path | None = None,
    **pretrained,
) -> nn.Module:
    """A timm model, with weights if there are some; timm renames the keys of older and foreign files.

    Args:
      weights, path: what was read, of `num_classes` classes, and from where.
      pretrained: further arguments for timm.create_model.
    Raises:
      UserError: an unknown model or argument, or weights that do not fit.
    """
    name = known_name(name)
    kwargs = {"num_classes": num_classes, **with_size(name, image_size, kwargs)}
    if weights is not None:
        overlay = {"state_dict": weights, "num_classes": num_classes, "source": ""}
        pretrained = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        model = timm.create_model(name, **kwargs, **pretrained)
    except TypeError as error:
        raise UserError(f"model '{name}' does not take these arguments ({error}). Change its kwargs") from error
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"model '{name}' cannot be built for images of {image_size} px with these arguments "
            f"({str(error) or type(error).__name__}). Change data.image_size or its kwargs"
        ) from error
    except RuntimeError as error:
        if weights is None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: does not fit model '{name}' ({reason[:300]}). Give the model it was saved from"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)
    return model


def with_size(name: str, image_size: int, kwargs: Kwargs) -> Kwargs:
    """The arguments that a model is built with: some of timm's are built for one image size, pixels."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return kwargs
    return {"img_size": image_size, **kwargs}


def _with_new_classifier(config: StudentConfig, source: nn.Module, num_classes: int, image_size: int) -> nn.Module:
    """The model of `source`, with its weights, but with another number of classes.

    `source` has taken the file's weights, every one of them. Of a second model, as random as one that is trained from
    scratch, exactly those tensors stay whose shape depends on the number of classes.
    """
    model = create_model(config.name, num_classes, image_size, config.kwargs)
    random = model.state_dict()
    kept = {name: value for name, value in source.state_dict().items() if value.shape == random[name].shape}
    model.load_state_dict({**random, **kept})
    model.pretrained_cfg = source.pretrained_cfg
    return model


def _classifiers(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """timm names one layer, or several, or none."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def known_name(name: str) -> str:
    """timm's name of a model; a UserError if it has none."""
    name = _ALIASES.get(name, name)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists them; null is no model"
        raise UserError(f"unknown model '{name}'; {hint}")
    return name


def num_outputs(name: str, weights: dict[str, torch.Tensor]) -> int | None:
    """How many classes the weights of a model tell apart; None where they have no classifier under timm's name."""
    config = timm.get_pretrained_cfg(known_name(name))
    found = (weights.get(f"{layer}.weight") for layer in _classifiers(config.classifier if config else None))
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
