"""The student and the frozen teacher, both from timm."""

import copy
import dataclasses
import difflib
from pathlib import Path

import timm
import torch
from torch import nn

from pipelines.errors import UserError
from trainer.config import Kwargs, StudentConfig, TeacherConfig

# Names that differ between the authors' code and timm.
_ALIASES = {"tresnet_l_v2": "tresnet_v2_l"}
# Where the weights lie in checkpoints of this trainer, of timm and of the authors; the average comes first, as in timm.
_NESTED = ("ema", "student", "state_dict_ema", "model_ema", "state_dict", "model")


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
        return _download(config, num_classes, image_size, role="student").train()
    if config.checkpoint is None:
        return _create(config.name, num_classes, image_size, config.kwargs).train()
    weights = read_weights(config.checkpoint)
    classes = _classes(config.name, weights) or num_classes
    model = _create(config.name, classes, image_size, config.kwargs, weights, config.checkpoint)
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


def build_teacher(config: TeacherConfig, num_classes: int, image_size: int) -> nn.Module | None:
    """The frozen teacher in evaluation mode, or None where the configuration names none.

    Raises:
      UserError: an unknown model, no weights, weights that do not fit, or another number of classes.
    """
    if config.name is None:
        return None
    if config.checkpoint is not None:
        weights = read_weights(config.checkpoint)
        model = _create(config.name, num_classes, image_size, config.kwargs, weights, config.checkpoint)
    else:
        model = _download(config, num_classes, image_size)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def refuse_size(model: nn.Module, name: str, image_size: int) -> None:
    """Raise a UserError if a model cannot take images of this size."""
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model '{name}' cannot take images of {image_size} px ({reason}). Change data.image_size or "
            "data.eval_image_size, or use another model; some of timm's take any size with "
            "--student.kwargs.dynamic_img_size true"
        ) from error
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


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of this trainer (the average if it has one), of timm or of the authors.

    Raises:
      UserError: the file is missing, damaged, or holds more than plain data.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise errors of their own
        raise UserError(
            f"{path}: damaged, or holds more than weights, which is not loaded ({type(error).__name__}). "
            "Save its state_dict alone"
        ) from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not any(torch.is_tensor(value) for value in content.values()):
        raise UserError(f"{path}: holds no weights; expected tensors by name, or nested under {', '.join(_NESTED)}")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _create(
    name: str,
    num_classes: int,
    image_size: int,
    kwargs: Kwargs,
    weights: dict[str, torch.Tensor] | None = None,
    path: Path | None = None,
    **pretrained,
) -> nn.Module:
    """A timm model, with weights if there are some; timm renames the keys of older and foreign files."""
    name = _known(name)
    config = timm.get_pretrained_cfg(name)
    kwargs = {"num_classes": num_classes, **kwargs}
    if config is not None and config.fixed_input_size and config.input_size[-1] != image_size:
        kwargs.setdefault("img_size", image_size)
    if weights is not None:
        _check_classes(path, weights, config.classifier if config else None, num_classes)
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


def _with_new_classifier(config: StudentConfig, source: nn.Module, num_classes: int, image_size: int) -> nn.Module:
    """The model of `source`, with its weights, but with another number of classes.

    `source` has taken the file's weights, every one of them. Of a second model, as random as one that is trained from
    scratch, exactly those tensors stay whose shape depends on the number of classes.
    """
    model = _create(config.name, num_classes, image_size, config.kwargs)
    random = model.state_dict()
    kept = {name: value for name, value in source.state_dict().items() if value.shape == random[name].shape}
    model.load_state_dict({**random, **kept})
    model.pretrained_cfg = source.pretrained_cfg
    return model


def _classes(name: str, weights: dict[str, torch.Tensor]) -> int | None:
    """The number of classes of the model that was saved; None where the file calls its classifier something else."""
    config = timm.get_pretrained_cfg(_known(name))
    found = (weights.get(f"{layer}.weight") for layer in _classifiers(config.classifier if config else None))
    return next((len(weight) for weight in found if weight is not None), None)


def _classifiers(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """timm names one layer, or several, or none."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _known(name: str) -> str:
    name = _ALIASES.get(name, name)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists them; null is no model"
        raise UserError(f"unknown model '{name}'; {hint}")
    return name


def _check_classes(path: Path, weights: dict, classifier: str | tuple[str, ...] | None, num_classes: int) -> None:
    for layer in _classifiers(classifier):
        weight = weights.get(f"{layer}.weight")
        if weight is not None and len(weight) != num_classes:
            raise UserError(
                f"{path}: a model of {len(weight)} classes, the dataset has {num_classes}. "
                "Use a checkpoint trained on the same classes"
            )


def _download(
    config: StudentConfig | TeacherConfig, num_classes: int, image_size: int, role: str = "teacher"
) -> nn.Module:
    """A model with timm's pretrained weights; a student's of other classes are taken all but the classifier's."""
    give_file = f"Give its weights with --{role}.checkpoint FILE"
    source = timm.get_pretrained_cfg(_known(config.name))
    if source is None or not source.has_weights:
        raise UserError(f"{role} '{config.name}': timm has no pretrained weights for it. {give_file}")
    if role == "teacher" and source.num_classes != num_classes:
        raise UserError(
            f"teacher '{config.name}': timm's weights have {source.num_classes} classes, the dataset has "
            f"{num_classes}. Give a teacher trained on the same classes with --teacher.checkpoint FILE"
        )
    try:
        return _create(config.name, num_classes, image_size, config.kwargs, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # whatever the download library raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{role} '{config.name}': its weights cannot be downloaded ({reason[0]}). {give_file}"
        ) from error
