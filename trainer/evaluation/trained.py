"""Trained models for use: their weights, and all that belongs to them.

A model comes from a checkpoint of this trainer, a run's folder, a folder that tools/export.py or timm wrote, any other
file of weights with the model's name, or from timm with its pretrained weights.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn

from pipelines.common.errors import UserError, clipped
from pipelines.common.machine import expanded
from pipelines.common.settings import Section, setting
from pipelines.plan.plan import EvalPlan
from pipelines.shards.index import ShardIndex
from trainer.config.model_arguments import Kwargs
from trainer.config.sections import DataConfig
from trainer.models.checkpoint_format import is_of_trainer
from trainer.models.checks import check_images
from trainer.models.class_names import check_order_stated, class_order, read_classes
from trainer.models.factory import architecture, create_model, num_outputs, pretrained_outputs, with_size
from trainer.models.files.model_folders import (
    CONFIG,
    SOURCES,
    ModelFolder,
    kwargs_of_file,
    named_folder,
    read_folder,
    source_name,
)
from trainer.models.files.weights import named_model, named_outputs, read_file, select_weights
from trainer.models.normalize import Normalize
from trainer.models.preprocessing import preprocessing
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints_folder
from trainer.state.checkpoint_settings import check_settings, with_defaults

# The file of weights in an exported folder, as timm names it.
WEIGHTS = "model.safetensors"
Kind = Literal["auto", "ema", "raw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# The settings of a checkpoint that are used; those of `data` are checked where a DataConfig is made of them.
_USED = ("student.name", "student.kwargs")
# The fields of a checkpoint that hold weights and moments.
_NOT_OF_ORIGIN = ("student", "ema", "optimizer", "state_dict")


@dataclasses.dataclass(frozen=True)
class EvalTransform(Section):
    """How an image becomes a model's input outside of training.

    Attributes:
      image_size: side of the square crop, pixels.
      crop_pct, crop_mode, interpolation: parameters of the resize before it, as for EvalPlan. Above a crop_pct of 1
        timm pads the image with black, which is not done here.
    Raises:
      UserError: a value that the pipelines cannot carry out.
    """

    image_size: int = setting(at_least=1)
    crop_pct: float = setting(above=0, at_most=1)
    crop_mode: Literal["center", "squash"] = setting()
    interpolation: Literal["bicubic", "bilinear"] = setting()

    def plan(self, index: ShardIndex) -> EvalPlan:
        """The plan that transforms the images of a split."""
        return EvalPlan(index, self.image_size, self.crop_pct, self.interpolation, self.crop_mode)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model to be used.

    Attributes:
      module: the model on the CPU in float32, in evaluation mode.
      name: timm's name of it; kwargs: further arguments that timm built it with.
      transform: how an image becomes its input.
      classes: names of its outputs in their order; None where nothing names them.
      source: the file or timm's weights that it comes from, for people.
      weights: ema or raw, "" where that is not known.
      origin: a checkpoint's record of the run that wrote it; {} for files of other programs.
      classes_guessed: `classes` are those of ImageNet's subset with the same number of classes.
    """

    module: nn.Module
    name: str
    kwargs: Kwargs
    transform: EvalTransform
    classes: list[str] | None
    source: str
    weights: str = ""
    origin: dict = dataclasses.field(default_factory=dict)
    classes_guessed: bool = False

    def digest(self) -> str:
        """sha256 over the names and values of its weights, in hex; the same for a checkpoint and what is made of it."""
        return checkpoint.digest_of(checkpoint.to_host(self.module.state_dict()))

    def has_names_for(self, classes: list[str]) -> bool:
        """True if its outputs have names that can be relied on for these classes: guessed ones must contain them."""
        return self.classes is not None and (not self.classes_guessed or set(classes) <= set(self.classes))

    def order_of(self, names: list[str], doubt: str) -> list[int] | None:
        """Which output is each of the dataset's classes; None where they are in the same order.

        Args:
          names: the dataset's classes; doubt: as trainer.models.class_names.order_doubt.
        Raises:
          UserError: the model does not know a class, or nothing names its outputs and there are not as many, or it is
            in doubt in which order they are.
        """
        if self.classes is not None and self.has_names_for(names):
            return None if self.classes == names else class_order(names, self.classes, self.source)
        if self.num_outputs != len(names):
            raise UserError(
                f"{self.source}: has {self.num_outputs} outputs, the dataset has {len(names)} classes. Use a model of "
                "these classes, or name all its outputs in a file (option classes)"
            )
        check_order_stated(doubt, self.source)
        return None

    @property
    def num_outputs(self) -> int:
        """How many classes it distinguishes; 0 for a model of features."""
        return getattr(self.module, "num_classes", 0)

    def normalize(self, precision: torch.dtype = torch.float32) -> Normalize:
        """Its own normalisation of raw pixels."""
        expects = preprocessing(self.module)
        return Normalize(expects.mean, expects.std, precision)


def load_model(source: Path | str, name: str | None = None, **settings: Any) -> TrainedModel:
    """A trained model: from a run's folder (its best weights), a checkpoint, an exported folder, or timm's name.

    Args:
      name: timm's name of what is in a file that does not say it.
      settings: as for `load`.
    """
    text = str(source)
    if source_name(text).startswith(SOURCES):
        return load(text, None, **settings)
    path = expanded(text)
    if os.path.exists(path):  # This is False also for text that is too long to be a path.
        return load(name, path, **settings)
    if path.suffix in (".pt", ".pth", ".safetensors") or len(path.parts) > 1:
        raise UserError(
            f"{clipped(text, 120)}: not found. Give a checkpoint, a run's folder, an exported folder, or timm's name"
        )
    return load(text, None, **settings)


def load(
    name: str | None,
    checkpoint: Path | None,
    *,
    weights: Kind = "auto",
    kwargs: Kwargs | None = None,
    classes: Path | None = None,
    **transform: Any,
) -> TrainedModel:
    """A model with its weights.

    Args:
      name: timm's name; may be left out where the file says it.
      checkpoint: path of a file or folder; None downloads timm's pretrained weights.
      weights: ema, raw, or auto: the EMA if there is one, and of a run the best.
      kwargs: for timm.create_model, besides or instead of those that the file says.
      classes: text file that names the outputs, one on a line.
      transform: fields of EvalTransform that are not to be the model's own.
    Raises:
      UserError: something is missing, damaged, or does not fit.
    """
    if weights not in KINDS:
        raise UserError(f"the kind of weights is '{weights}'. Choose one of {', '.join(KINDS)}")
    kwargs = kwargs or {}
    if checkpoint is not None and (checkpoint / CONFIG).is_file():
        found = _of_folder(read_folder(checkpoint, str(checkpoint)), weights, kwargs, transform, name)
    elif checkpoint is not None:
        path = _file_of(checkpoint, weights)
        found = _of_file(path, read_file(path), weights, kwargs, transform, name)
    elif name is None:
        raise UserError(
            "no model is named. Give a checkpoint or run folder (option checkpoint), or a name (option name)"
        )
    elif folder := named_folder(name):
        found = _of_folder(folder, weights, kwargs, transform)
    else:
        if weights != "auto":
            raise UserError(f"timm has one kind of weights for '{name}', and '{weights}' was asked for. Leave that out")
        found = _built(name, None, f"timm's {name}", pretrained_outputs(name), kwargs, transform)
    if classes is not None:
        names = read_classes(classes)
        if len(names) != found.num_outputs:
            raise UserError(
                f"{classes}: names {len(names)} classes, {found.source} has {found.num_outputs} outputs. Name every "
                "output, one on a line, in their order"
            )
        found = dataclasses.replace(found, classes=names, classes_guessed=False)
    advice = "Leave size and arguments to the model, or use another model"
    check_images(found.module, found.name, found.transform.image_size, advice)
    return found


def check_fits(path: Path, content: dict) -> None:
    """Raise a UserError if the weights that a checkpoint of this trainer holds are not those of its model.

    A model that a folder or repository describes, which may be elsewhere, is not looked for.
    """
    check_settings(path, content["config"], _USED)
    if not source_name(content["config"]["student"]["name"]).startswith(SOURCES):
        _of_file(path, content, "auto", {}, {})


def _file_of(path: Path, weights: str) -> Path:
    """The checkpoint that a run's folder stands for; a file stands for itself."""
    if not path.is_dir():
        return path
    best = checkpoints_folder(path) / checkpoint.BEST
    if weights == "auto" and best.is_file():
        return best
    if steps := checkpoint.checkpoints(checkpoints_folder(path)):
        return steps[-1]
    raise UserError(
        f"{clipped(path, 120)}: neither a run's folder with checkpoints nor an exported one with {CONFIG}. Give what "
        "--run.out was, a checkpoint in it, or what tools/export.py wrote"
    )


def _of_file(
    path: Path, content: Any, weights: Kind, kwargs: Kwargs, transform: dict[str, Any], name: str | None = None
) -> TrainedModel:
    """The model of a file of weights, whose content was read; other arguments as of `load`."""
    origin: dict[str, Any] = {}
    if is_of_trainer(content):
        check_settings(path, content["config"], _USED)
        origin = content = {**content, "config": with_defaults(content["config"])}
    tensors, kind = select_weights(path, content, weights)
    student = origin.get("config", {}).get("student", {})
    named = student.get("name") or name or named_model(content)
    if named is None:
        raise UserError(f"{path}: does not say which model it is of. Name it (option name)")
    named = named_folder(named) or named
    _check_name(name, named, path)
    classes, found = named_outputs(content), num_outputs(named, tensors)
    if found and classes is not None and found != len(classes):
        raise UserError(
            f"{path}: names {len(classes)} classes, and its weights have {found} outputs. Save it with a name for each "
            "output, or without 'classes'"
        )
    outputs = found or len(classes or ()) or _own_config(named)["num_classes"]
    kwargs = {**kwargs_of_file(path, student.get("kwargs", {})), **kwargs}
    built_for = 0
    if origin:
        try:
            data = origin["config"]["data"]
            data = DataConfig(**{key: data[key] for key in ("image_size", "eval_image_size", "eval_crop_pct")})
        except UserError as error:
            raise UserError(f"{path}: its settings cannot be used: {error}. Give a file of another run") from error
        transform = {"image_size": data.eval_size, "crop_pct": data.eval_crop_pct, "crop_mode": "center", **transform}
        built_for = data.train_sizes[-1] if kwargs.get("dynamic_img_size") else 0
    origin = {key: value for key, value in origin.items() if key not in _NOT_OF_ORIGIN}
    model = _built(
        named, tensors, str(path), outputs, kwargs, transform, classes, is_of_run=bool(origin), built_for=built_for
    )
    return dataclasses.replace(model, weights=kind, origin=origin)


def _of_folder(
    folder: ModelFolder, weights: Kind, kwargs: Kwargs, transform: dict[str, Any], name: str | None = None
) -> TrainedModel:
    """The model of a folder or repository as timm writes it for Hugging Face's hub; other arguments as of `load`."""
    if folder.kind and weights not in ("auto", folder.kind):
        raise UserError(f"{folder.name}: holds {folder.kind} weights, and '{weights}' was asked for. Leave that out")
    _check_name(name, folder, folder.name)
    file = folder.weights_file()
    tensors, _ = select_weights(file, read_file(file))
    model = _built(folder, tensors, folder.name, folder.num_classes, kwargs, transform, folder.classes)
    return dataclasses.replace(model, weights=folder.kind)


def _check_name(given: str | None, own: str | ModelFolder, source: Path | str) -> None:
    """Raise a UserError if a model is named otherwise than its file names it, but for the tag of timm's own weights."""
    if given is not None and architecture(given).partition(".")[0] != architecture(own).partition(".")[0]:
        raise UserError(f"{source}: is of model '{architecture(own)}', not of '{given}'. Leave the name out")


def _built(
    name: str | ModelFolder,
    weights: dict[str, torch.Tensor] | None,
    source: str,
    outputs: int,
    kwargs: Kwargs,
    transform: dict[str, Any],
    classes: list[str] | None = None,
    *,
    is_of_run: bool = False,
    built_for: int = 0,
) -> TrainedModel:
    """The model, in evaluation mode.

    Outputs without names are named as ImageNet's synsets, if there are as many as in a known subset of ImageNet.

    Args:
      weights: by name; None for timm's own, which are downloaded.
      built_for: the image size that the model is built for; 0 is the one that it sees.
    Source: timm.data.infer_imagenet_subset.
    """
    folder, own = named_folder(name), EvalTransform(**{**_own_transform(_own_config(name)), **transform})
    size = built_for or own.image_size
    kwargs = with_size(name, size, {**(folder.kwargs if folder else {}), **kwargs})
    module = create_model(name, outputs, size, kwargs, weights, source, pretrained=weights is None)
    module.eval().requires_grad_(False)
    is_guessed = False
    if not classes and not is_of_run and (subset := infer_imagenet_subset(module)):
        classes, is_guessed = list(ImageNetInfo(subset).label_names()), True
    return TrainedModel(module, architecture(name), kwargs, own, classes, source, classes_guessed=is_guessed)


def _own_config(name: str | ModelFolder) -> dict[str, Any]:
    """The configuration of a model: that of the folder that it is named by, or timm's."""
    if folder := named_folder(name):
        return folder.config
    config = timm.get_pretrained_cfg(architecture(name))
    return config.to_dict() if config is not None else {"num_classes": 1000}


def _own_transform(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the transform in timm's own validation."""
    resolved = resolve_data_config(pretrained_cfg=config, use_test_size=True)
    _, height, width = resolved["input_size"]
    if height != width:
        raise UserError(f"the model takes images of {height} x {width} px, and only square ones are made here")
    return {"image_size": height, **{key: resolved[key] for key in ("crop_pct", "crop_mode", "interpolation")}}


def descriptions(names: Sequence[str]) -> list[str]:
    """Words for classes: WordNet's for ImageNet's synset ids, other names unchanged."""
    info = ImageNetInfo()
    words = []
    for name in names:
        try:
            words.append(info.label_name_to_description(name))
        except KeyError:
            words.append(name)
    return words
