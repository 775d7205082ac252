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
from pipelines.plan.plan import EvalPlan
from pipelines.shards.index import ShardIndex
from pipelines.shards.manifest import MANIFEST
from trainer.config.model_arguments import Kwargs
from trainer.config.sections import DataConfig
from trainer.config.setting_names import SettingError, Spelling
from trainer.models.checkpoint_format import is_of_trainer
from trainer.models.checks import check_size
from trainer.models.class_names import check_order_stated, class_order, read_classes
from trainer.models.factory import (
    architecture,
    create_model,
    download,
    num_outputs,
    pretrained_outputs,
    with_size,
)
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
from trainer.models.preprocessing import preprocessing, timm_config
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints_folder
from trainer.state.checkpoint_settings import check_settings, with_defaults

# The file of weights in an exported folder, as timm names it.
WEIGHTS = "model.safetensors"
Kind = Literal["auto", "ema", "raw"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CropMode = Literal["center", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
_LONGEST_NAME = 100  # The longest name of a timm model has about 60 characters.
_SIZE_ADVICE = "Leave the size to the model, or use another model"


class NamelessError(SettingError):
    """A file of weights that does not say which model it is of."""


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """How an image becomes a model's input outside of training.

    Attributes:
      image_size: side of the square crop, pixels.
      crop_pct, crop_mode, interpolation: parameters of the resize before it, as for EvalPlan.
    Raises:
      UserError: a value that the pipelines cannot carry out.
    """

    image_size: int
    crop_pct: float
    crop_mode: CropMode
    interpolation: Interpolation

    def __post_init__(self):
        if self.image_size < 1:
            raise UserError(f"the image size is {self.image_size}; it must be at least 1")
        if not 0 < self.crop_pct <= 1:
            raise UserError(
                f"crop_pct is {self.crop_pct}; it lies in (0, 1]: above 1 the resized image is smaller than the crop, "
                "and timm pads it with black, which is not done here. Give one in (0, 1], or use another model"
            )
        for name, choices in (("crop_mode", get_args(CropMode)), ("interpolation", get_args(Interpolation))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is '{getattr(self, name)}', not {' or '.join(choices)}. Name one of these")

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
          SettingError: the model does not know a class, or nothing names its outputs and there are not as many, or it
            is in doubt in which order they are.
        """
        if self.classes is not None and self.has_names_for(names):
            return None if self.classes == names else class_order(names, self.classes, self.source)
        if self.num_outputs != len(names):

            def advice(spelled: Spelling) -> str:
                classes = spelled("classes")
                naming = f", or name all its outputs with {classes} FILE" if classes else ""
                return f"Use a model of these classes{naming}"

            problem = f"{self.source}: has {self.num_outputs} outputs, the dataset has {len(names)} classes"
            raise SettingError(problem, advice)
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
      kwargs: for timm.create_model, instead of those that the file says.
      classes: text file that names the outputs, one on a line.
      transform: fields of EvalTransform that are not to be the model's own.
    Raises:
      UserError: something is missing, damaged, or does not fit.
    """
    if weights not in KINDS:
        problem = f"is '{weights}', not one of {', '.join(KINDS)}"
        raise SettingError(f"the kind of weights {problem}", lambda spelled: f"Change {spelled('weights')}")
    found = _found(Wanted(name, checkpoint, weights, kwargs, transform))
    if classes is not None:
        found = _with_classes(found, classes)
    found.module.eval().requires_grad_(False)
    check_size(found.module, found.name, found.transform.image_size, _SIZE_ADVICE)
    return found


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The model to be loaded; arguments of `load`."""

    name: str | None
    checkpoint: Path | None
    weights: Kind = "auto"
    kwargs: Kwargs | None = None
    transform: dict[str, Any] = dataclasses.field(default_factory=dict)


def _found(wanted: Wanted) -> TrainedModel:
    """The model from whichever source it comes."""
    path, name = wanted.checkpoint, wanted.name
    if path is not None and (path / CONFIG).is_file():
        return _exported(read_folder(path, str(path)), wanted)
    if path is not None:
        path = _file_of(path, wanted.weights)
        return _of_checkpoint(path, read_file(path), wanted)
    if name is None:
        raise SettingError("no model is named", _advice_to_name_one)
    if folder := named_folder(name):
        return _exported(folder, dataclasses.replace(wanted, name=None))
    if wanted.weights != "auto":
        problem = f"timm has one kind of weights for '{name}', and '{wanted.weights}' was asked for"
        raise SettingError(problem, lambda spelled: f"Leave {spelled('weights')} out")
    return _pretrained(name, wanted)


def _advice_to_name_one(spelled: Spelling) -> str:
    return f"Give a checkpoint or run folder with {spelled('checkpoint')}, or {spelled('name')}"


def _with_classes(trained: TrainedModel, file: Path) -> TrainedModel:
    """The model with its outputs named by a text file."""
    names = read_classes(file)
    if len(names) != trained.num_outputs:
        raise UserError(
            f"{file}: names {len(names)} classes, {trained.source} has {trained.num_outputs} outputs. Name every "
            "output, one on a line, in their order"
        )
    return dataclasses.replace(trained, classes=names, classes_guessed=False)


def load_named(text: str, name: str | None = None, **settings: Any) -> TrainedModel:
    """A model given by one word: the path of a file or folder, or timm's name for its pretrained weights.

    Args:
      name: timm's name of what is in a file that does not say it.
      settings: as for `load`.
    """
    if source_name(text).startswith(SOURCES):
        return load(text, None, **settings)
    path = expanded(text)
    if os.path.exists(path):  # This is False also for text that is too long to be a path.
        return load(name, path, **settings)
    if path.suffix in (".pt", ".pth", ".safetensors") or len(path.parts) > 1 or len(text) > _LONGEST_NAME:
        raise UserError(
            f"{clipped(text, 120)}: not found. Give a checkpoint, a run's folder, an exported folder, or timm's name"
        )
    return load(text, None, **settings)


def load_model(source: Path | str, **settings: Any) -> TrainedModel:
    """A trained model: from a run's folder (its best weights), a checkpoint, an exported folder, or timm's name.

    Args:
      settings: as for `load`.
    """
    return load_named(str(source), **settings)


def _file_of(path: Path, weights: str) -> Path:
    """The checkpoint that a run's folder stands for; a file stands for itself."""
    if not path.is_dir():
        return path
    best = checkpoints_folder(path) / checkpoint.BEST
    if weights == "auto" and best.is_file():
        return best
    steps = checkpoint.checkpoints(checkpoints_folder(path))
    if not steps:
        what = "a dataset, " if (path / MANIFEST).is_file() or (path.parent / MANIFEST).is_file() else ""
        raise UserError(
            f"{clipped(path, 120)}: {what}neither a run's folder with checkpoints nor an exported one with {CONFIG}. "
            "Give what --run.out was, a checkpoint in it, or what tools/export.py wrote"
        )
    return steps[-1]


# The settings of a checkpoint that are used; those of `data` are checked where a DataConfig is made of them.
_USED = ("student.name", "student.kwargs")


def check_fits(path: Path, content: dict) -> None:
    """Raise a UserError if the weights that a checkpoint of this trainer holds are not those of its model.

    A model that a folder or repository describes, which may be elsewhere, is not looked for.
    """
    check_settings(path, content["config"], _USED)
    if not source_name(content["config"]["student"]["name"]).startswith(SOURCES):
        _of_checkpoint(path, content, Wanted(None, path))


def _of_checkpoint(path: Path, content: Any, wanted: Wanted) -> TrainedModel:
    """The model of a file of weights, whose content was read."""
    origin: dict[str, Any] = {}
    if is_of_trainer(content):
        check_settings(path, content["config"], _USED)
        origin = content = {**content, "config": with_defaults(content["config"])}
    tensors, kind = select_weights(path, content, wanted.weights)
    settings = origin.get("config", {}).get("student", {})
    named = settings.get("name") or wanted.name or named_model(content)
    if named is None:
        raise NamelessError(f"{path}: does not say which model it is of", _advice_to_name_it)
    folder = named_folder(named)
    named = folder or named
    _check_same_model(wanted.name, named, path)
    name = architecture(named)
    kwargs = kwargs_of_file(path, settings.get("kwargs", {})) if wanted.kwargs is None else wanted.kwargs
    kwargs = {**(folder.kwargs if folder else {}), **kwargs}
    classes = named_outputs(content)
    outputs = _outputs(path, num_outputs(name, tensors), classes) or _own_config(named)["num_classes"]
    of_run = _transform_of_run(path, origin["config"]["data"]) if origin else {}
    transform = EvalTransform(**{**_own_transform(_own_config(named)), **of_run, **wanted.transform})
    size = _built_for(origin, kwargs) or transform.image_size
    kwargs = with_size(name, size, kwargs)
    module = create_model(named, outputs, size, kwargs, tensors, path)
    origin = {key: value for key, value in origin.items() if key not in _NOT_OF_ORIGIN}
    found = TrainedModel(module, name, kwargs, transform, classes, str(path), kind, origin)
    return found if origin or classes else _with_guessed_classes(found)


# The fields of a checkpoint that hold weights and moments.
_NOT_OF_ORIGIN = ("student", "ema", "optimizer", "state_dict")


def _advice_to_name_it(spelled: Spelling) -> str:
    return f"Name it with {spelled('name')}"


def _outputs(path: Path, found: int | None, classes: list[str] | None) -> int | None:
    """How many outputs weights have, by themselves and by the names that their file gives; None where neither says."""
    if found and classes is not None and found != len(classes):
        raise UserError(
            f"{path}: names {len(classes)} classes, and its weights have {found} outputs. Save it with a name for each "
            "output, or without 'classes'"
        )
    return found or (len(classes) if classes else None)


def _check_same_model(given: str | None, own: str | ModelFolder, path: Path | str) -> None:
    """Raise a SettingError if a model is named otherwise than its file names it."""
    if given is not None and _architecture(given) != _architecture(own):
        problem = f"{path}: is of model '{architecture(own)}', not of '{given}'"
        raise SettingError(problem, lambda spelled: f"Leave {spelled('name')} out")


def _architecture(name: str | ModelFolder) -> str:
    """Timm's name without the tag of its pretrained weights, since a file has other weights."""
    return architecture(name).partition(".")[0]


def _transform_of_run(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Fields of the transform with which a run evaluates its student; the filter is the model's own."""
    try:
        settings = DataConfig(**{name: data[name] for name in ("image_size", "eval_image_size", "eval_crop_pct")})
    except UserError as error:
        raise UserError(f"{path}: its settings cannot be used: {error}. Give a file of another run") from error
    return {"image_size": settings.eval_size, "crop_pct": settings.eval_crop_pct, "crop_mode": "center"}


def _built_for(origin: dict[str, Any], kwargs: Kwargs) -> int | None:
    """The size that a model of any size was built for; others are built for the size they see."""
    if not origin or not kwargs.get("dynamic_img_size"):
        return None
    return DataConfig(image_size=origin["config"]["data"]["image_size"]).train_sizes[-1]


def _exported(folder: ModelFolder, wanted: Wanted) -> TrainedModel:
    """A folder or repository as timm writes it for Hugging Face's hub."""
    if folder.kind and wanted.weights not in ("auto", folder.kind):
        problem = f"{folder.name}: holds no {wanted.weights} weights, only {folder.kind} ones"
        raise SettingError(problem, lambda spelled: f"Leave {spelled('weights')} out")
    _check_same_model(wanted.name, folder, folder.name)
    name = architecture(folder)
    transform = EvalTransform(**{**_own_transform(folder.config), **wanted.transform})
    kwargs = with_size(name, transform.image_size, folder.kwargs if wanted.kwargs is None else wanted.kwargs)
    file = folder.weights_file()
    tensors, _ = select_weights(file, read_file(file))
    module = create_model(name, folder.num_classes, transform.image_size, kwargs, tensors, file)
    timm_config(module).update(folder.config)
    found = TrainedModel(module, name, kwargs, transform, folder.classes, folder.name, folder.kind)
    return found if folder.classes else _with_guessed_classes(found)


def _pretrained(name: str, wanted: Wanted) -> TrainedModel:
    """A model with the weights that timm has for it."""
    outputs = pretrained_outputs(name)
    transform = EvalTransform(**{**_own_transform(_own_config(name)), **wanted.transform})
    kwargs = with_size(architecture(name), transform.image_size, wanted.kwargs or {})
    module = download(name, outputs, transform.image_size, kwargs)
    return _with_guessed_classes(TrainedModel(module, architecture(name), kwargs, transform, None, f"timm's {name}"))


def _with_guessed_classes(trained: TrainedModel) -> TrainedModel:
    """Named as ImageNet's synsets, if it has as many outputs as a known subset of ImageNet.

    Source: timm.data.infer_imagenet_subset.
    """
    subset = infer_imagenet_subset(trained.module)
    names = None if subset is None else list(ImageNetInfo(subset).label_names())
    return dataclasses.replace(trained, classes=names, classes_guessed=names is not None)


def _own_config(name: str | ModelFolder) -> dict[str, Any]:
    """Timm's configuration of a model; the configuration of a folder that names it comes first."""
    config, folder = timm.get_pretrained_cfg(architecture(name)), named_folder(name)
    config = config.to_dict() if config is not None else {"num_classes": 1000}
    return config | (folder.config if folder else {})


def _own_transform(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the transform in timm's own validation."""
    resolved = resolve_data_config(pretrained_cfg=config, use_test_size=True)
    channels, height, width = resolved["input_size"]
    if height != width:
        raise UserError(f"the model takes images of {height} x {width} px, and only square ones are made here")
    if channels != 3:
        raise UserError(
            f"the model takes images of {channels} channels, and images have 3 here. Use a model of RGB images"
        )
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
