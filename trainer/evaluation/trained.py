"""Trained models for use: their weights, and all that belongs to them.

A model comes from a checkpoint of this trainer, a run's folder, a folder that tools/export.py or timm wrote, any other
file of weights with the model's name, or from timm with its pretrained weights.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

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
from trainer.models.checkpoint_format import is_of_trainer
from trainer.models.checks import check_size
from trainer.models.class_names import read_classes
from trainer.models.factory import (
    architecture,
    create_model,
    download,
    num_outputs,
    preprocessing,
    pretrained_outputs,
    with_size,
)
from trainer.models.model_folders import (
    CONFIG,
    SOURCES,
    ModelFolder,
    kwargs_of_file,
    named_folder,
    read_folder,
    source_name,
)
from trainer.models.normalize import Normalize
from trainer.models.weights import named_model, named_outputs, read_file, select_weights
from trainer.state import checkpoint
from trainer.state.checkpoint import checkpoints_folder
from trainer.state.checkpoint_settings import check_settings, with_defaults

WEIGHTS = "model.safetensors"  # of an exported folder, as timm names it
KINDS = ("auto", "ema", "raw")
CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
_LONGEST_NAME = 100  # of a model, in characters; timm's longest has about 60
_SIZE_ADVICE = "Leave the size to the model, or use another model"


class NamelessError(UserError):
    """A file of weights that does not say which model it is of."""


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What a model sees of an image outside of training.

    Attributes:
      image_size: side of the square crop, pixels.
      crop_pct, crop_mode, interpolation: of the resize before it, as for EvalPlan.
    """

    image_size: int
    crop_pct: float
    crop_mode: str
    interpolation: str

    def __post_init__(self):
        if self.image_size < 1:
            raise UserError(f"the image size is {self.image_size}; it must be at least 1")
        if not 0 < self.crop_pct <= 1:
            raise UserError(
                f"crop_pct is {self.crop_pct}; it lies in (0, 1]: above 1 the resized image is smaller than the crop, "
                "and timm pads it with black, which is not done here. Give one in (0, 1], or use another model"
            )
        for name, known in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is '{getattr(self, name)}', not {' or '.join(known)}. Name one of these")

    def plan(self, index: ShardIndex) -> EvalPlan:
        """The plan that shows the images of a split so."""
        return EvalPlan(index, self.image_size, self.crop_pct, self.interpolation, self.crop_mode)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model to be used.

    Attributes:
      model: on the CPU in float32, in evaluation mode.
      name: timm's name of it; kwargs: further arguments that timm built it with.
      view: what it sees of an image.
      classes: names of its outputs in their order; None where nothing names them.
      classes_guessed: they are those of ImageNet's subset with as many classes.
      source: the file or timm's weights that it comes from, for people.
      weights: ema or raw, "" where that is not known.
      origin: what a checkpoint of this trainer says of the run that wrote it; {} for others.
    """

    model: nn.Module
    name: str
    kwargs: Kwargs
    view: EvalTransform
    classes: list[str] | None
    source: str
    weights: str = ""
    origin: dict = dataclasses.field(default_factory=dict)
    classes_guessed: bool = False

    def digest(self) -> str:
        """sha256 over the names and values of its weights, in hex; the same for a checkpoint and what is made of it."""
        return checkpoint.digest_of(checkpoint.to_host(self.model.state_dict()))

    def has_names_for(self, classes: list[str]) -> bool:
        """True if its outputs have names that can be relied on for these classes: guessed ones must contain them."""
        return self.classes is not None and (not self.classes_guessed or set(classes) <= set(self.classes))

    @property
    def num_outputs(self) -> int:
        """How many classes it tells apart."""
        return getattr(self.model, "num_classes", 0)  # models of features have none

    def normalize(self, precision: torch.dtype = torch.float32) -> Normalize:
        """Its own normalisation of raw pixels."""
        expects = preprocessing(self.model)
        return Normalize(expects.mean, expects.std, precision)


def load(
    name: str | None,
    path: Path | None,
    *,
    weights: str = "auto",
    kwargs: Kwargs | None = None,
    classes: Path | None = None,
    key: str = "student",
    **view,
) -> Trained:
    """A model with its weights.

    Args:
      name: timm's name; may be left out where the file says it.
      path: of a file or folder; None downloads timm's pretrained weights.
      weights: ema, raw, or auto: the EMA if there is one, and of a run the best.
      kwargs: for timm.create_model, instead of those that the file says.
      classes: text file that names the outputs, one on a line.
      key: how errors call the model's settings: student.name; "" is for programs that have --name.
      view: fields of EvalTransform that are not to be the model's own.
    Raises:
      UserError: whatever is missing, damaged, or does not fit.
    """
    if weights not in KINDS:
        raise UserError(f"{_flag(key, 'weights')} is '{weights}', not one of {', '.join(KINDS)}")
    found = _found(name, path, weights, kwargs, key, view)
    if classes is not None:
        found = _with_classes(found, classes)
    found.model.eval().requires_grad_(False)
    check_size(found.model, found.name, found.view.image_size, _SIZE_ADVICE)
    return found


def _found(name: str | None, path: Path | None, weights: str, kwargs: Kwargs | None, key: str, view: dict) -> Trained:
    """The model of `load`, from whichever source it comes."""
    if path is not None and (path / CONFIG).is_file():
        return _exported(read_folder(path, str(path)), name, weights, kwargs, key, view)
    if path is not None:
        path = _file_of(path, weights)
        return _of_checkpoint(path, read_file(path), name, weights, kwargs, key, view)
    if name is None:
        raise UserError(
            f"which model? Give a checkpoint or run folder with {_flag(key, 'checkpoint')}, or {_flag(key, 'name')}"
        )
    if folder := named_folder(name):
        return _exported(folder, None, weights, kwargs, key, view)
    if weights != "auto":
        raise UserError(
            f"{_flag(key, 'weights')} is '{weights}', but timm has one kind of weights for '{name}'. Leave it out"
        )
    return _pretrained(name, kwargs or {}, key, view)


def _with_classes(trained: Trained, file: Path) -> Trained:
    """The model with its outputs named by a text file."""
    names = read_classes(file)
    if len(names) != trained.num_outputs:
        raise UserError(
            f"{file}: names {len(names)} classes, {trained.source} has {trained.num_outputs} outputs. Name every "
            "output, one on a line, in their order"
        )
    return dataclasses.replace(trained, classes=names, classes_guessed=False)


def load_named(text: str, name: str | None = None, **settings) -> Trained:
    """A model given by one word: the path of a file or folder, or timm's name for its pretrained weights.

    Args:
      name: timm's name of what is in a file that does not say it.
      settings: as for `load`.
    """
    if source_name(text).startswith(SOURCES):
        return load(text, None, **{"key": "", **settings})
    path, settings = expanded(text), {"key": "", **settings}
    if os.path.exists(path):  # False also for what is too long to be a path
        return load(name, path, **settings)
    if path.suffix in (".pt", ".pth", ".safetensors") or len(path.parts) > 1 or len(text) > _LONGEST_NAME:
        raise UserError(
            f"{clipped(text, 120)}: not found. Give a checkpoint, a run's folder, an exported folder, or timm's name"
        )
    return load(text, None, **settings)


def load_model(source: Path | str, **settings) -> Trained:
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


# What is used of the settings in a checkpoint; those of `data` are checked where a DataConfig is made of them.
_USED = ("student.name", "student.kwargs")


def check_fits(path: Path, content: dict) -> None:
    """Raise a UserError if the weights that a checkpoint of this trainer holds are not those of its model.

    A model that a folder or repository describes, which may be elsewhere, is not looked for.
    """
    check_settings(path, content["config"], _USED)
    if not source_name(content["config"]["student"]["name"]).startswith(SOURCES):
        _of_checkpoint(path, content, None, "auto", None, "", {})


def _of_checkpoint(
    path: Path, content: object, name: str | None, weights: str, kwargs: Kwargs | None, key: str, view: dict
) -> Trained:
    origin = {}
    if is_of_trainer(content):
        check_settings(path, content["config"], _USED)
        origin = content = {**content, "config": with_defaults(content["config"])}
    tensors, kind = select_weights(path, content, weights)
    settings = origin.get("config", {}).get("student", {})
    named = settings.get("name") or name or named_model(content)
    if named is None:
        raise NamelessError(f"{path}: does not say which model it is of. Name it with {_flag(key, 'name')}")
    folder = named_folder(named)
    named = folder or named
    _check_same_model(name, named, path, key)
    name = architecture(named)
    kwargs = kwargs_of_file(path, settings.get("kwargs", {})) if kwargs is None else kwargs
    kwargs = {**(folder.kwargs if folder else {}), **kwargs}
    classes = named_outputs(content)
    outputs = _outputs(path, num_outputs(name, tensors), classes) or _own_config(named)["num_classes"]
    own = _view_of_run(path, origin["config"]["data"]) if origin else {}
    data = _own_view(_own_config(named)) | own | view
    size = _built_for(origin, kwargs) or data["image_size"]
    kwargs = with_size(name, size, kwargs)
    model = create_model(named, outputs, size, kwargs, tensors, path)
    origin = {key: value for key, value in origin.items() if key not in ("student", "ema", "optimizer", "state_dict")}
    found = Trained(model, name, kwargs, EvalTransform(**data), classes, str(path), kind, origin)
    return found if origin or classes else _with_guessed_classes(found)


def _outputs(path: Path, found: int | None, classes: list[str] | None) -> int | None:
    """How many outputs weights have, by themselves and by the names that their file gives; None where neither says."""
    if found and classes is not None and found != len(classes):
        raise UserError(
            f"{path}: names {len(classes)} classes, and its weights have {found} outputs. Save it with a name for each "
            "output, or without 'classes'"
        )
    return found or (len(classes) if classes else None)


def _flag(key: str, name: str) -> str:
    """A model's setting as it is typed: --student.name, or --name."""
    return f"--{key}.{name}" if key else f"--{name}"


def _check_same_model(given: str | None, own: str | ModelFolder, path: Path | str, key: str) -> None:
    """Raise a UserError if a model is named otherwise than its file names it."""
    if given is not None and _architecture(given) != _architecture(own):
        raise UserError(f"{path}: is of model '{architecture(own)}', not of '{given}'. Leave {_flag(key, 'name')} out")


def _architecture(name: str | ModelFolder) -> str:
    """Timm's name without the tag of its pretrained weights, which a file has others than."""
    return architecture(name).partition(".")[0]


def _view_of_run(path: Path, data: dict) -> dict:
    """What a run evaluates its student with; the filter is the model's own."""
    try:
        settings = DataConfig(**{name: data[name] for name in ("image_size", "eval_image_size", "eval_crop_pct")})
    except UserError as error:
        raise UserError(f"{path}: its settings cannot be used: {error}. Give a file of another run") from error
    return {"image_size": settings.eval_size, "crop_pct": settings.eval_crop_pct, "crop_mode": "center"}


def _built_for(origin: dict, kwargs: Kwargs) -> int | None:
    """The size that a model of any size was built for; others are built for the size they see."""
    if not origin or not kwargs.get("dynamic_img_size"):
        return None
    return DataConfig(image_size=origin["config"]["data"]["image_size"]).train_sizes[-1]


def _exported(
    folder: ModelFolder, name: str | None, weights: str, kwargs: Kwargs | None, key: str, view: dict
) -> Trained:
    """A folder or repository as timm writes it for Hugging Face's hub."""
    if folder.kind and weights not in ("auto", folder.kind):
        raise UserError(
            f"{folder.name}: holds no {weights} weights, only {folder.kind} ones. Leave {_flag(key, 'weights')} out"
        )
    _check_same_model(name, folder, folder.name, key)
    name = architecture(folder)
    data = _own_view(folder.config) | view
    kwargs = with_size(name, data["image_size"], folder.kwargs if kwargs is None else kwargs)
    file = folder.weights_file()
    tensors, _ = select_weights(file, read_file(file))
    model = create_model(name, folder.num_classes, data["image_size"], kwargs, tensors, file)
    model.pretrained_cfg.update(folder.config)
    found = Trained(model, name, kwargs, EvalTransform(**data), folder.classes, folder.name, folder.kind)
    return found if folder.classes else _with_guessed_classes(found)


def _pretrained(name: str, kwargs: Kwargs, key: str, view: dict) -> Trained:
    outputs = pretrained_outputs(name, key)
    data = _own_view(_own_config(name)) | view
    kwargs = with_size(architecture(name), data["image_size"], kwargs)
    model = download(name, outputs, data["image_size"], kwargs, key)
    found = Trained(model, architecture(name), kwargs, EvalTransform(**data), None, f"timm's {name}")
    return _with_guessed_classes(found)


def _with_guessed_classes(trained: Trained) -> Trained:
    """Named as ImageNet's synsets, if it has as many outputs as a known subset of ImageNet.

    Source: timm.data.infer_imagenet_subset.
    """
    subset = infer_imagenet_subset(trained.model)
    names = None if subset is None else list(ImageNetInfo(subset).label_names())
    return dataclasses.replace(trained, classes=names, classes_guessed=names is not None)


def _own_config(name: str | ModelFolder) -> dict:
    """Timm's configuration of a model; what the folder says that it may be named by comes first."""
    config, folder = timm.get_pretrained_cfg(architecture(name)), named_folder(name)
    config = config.to_dict() if config is not None else {"num_classes": 1000}
    return config | (folder.config if folder else {})


def _own_view(config: dict) -> dict:
    """The size, crop and filter of timm's own validation."""
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
    """Words for classes: WordNet's for ImageNet's synset ids, other names as they are."""
    info = ImageNetInfo()
    words = []
    for name in names:
        try:
            words.append(info.label_name_to_description(name))
        except KeyError:
            words.append(name)
    return words
