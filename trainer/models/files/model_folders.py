"""Models in folders, and in repositories of Hugging Face's hub, as timm writes them: config.json beside weights."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pipelines.common.errors import UserError, clipped
from pipelines.common.files import sha256_of
from pipelines.common.settings import misfit
from pipelines.plan.plan import LARGEST_SIDE
from trainer.config.model_arguments import Kwargs, check_sizes, without_reserved
from trainer.config.sections import Config
from trainer.models.files.hub import offline_if_unreachable

CONFIG = "config.json"
# Where timm looks for weights, in its order. Source: timm.models._hub._PREFERRED_FILES.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
SOURCES = _HUB, _FOLDER = ("hf-hub:", "local-dir:")


_Size = Annotated[int, lambda value: 1 <= value <= LARGEST_SIDE]
_Sizes = tuple[Annotated[int, lambda value: value == 3], _Size, _Size]  # RGB, height, width
_Fraction = Annotated[float, lambda value: 0 <= value <= 1]
_Positive = Annotated[float, lambda value: 0 < value < 1e6]


class _Configuration(TypedDict, total=False):
    """The keys of timm's configuration that are used here, and of what stands around it; others are left alone."""

    architecture: str
    model_args: dict[str, Any] | None
    label_names: list[str | int] | dict | None

    mean: tuple[_Fraction, _Fraction, _Fraction]
    std: tuple[_Positive, _Positive, _Positive]
    input_size: _Sizes
    test_input_size: _Sizes
    min_input_size: _Sizes
    fixed_input_size: bool
    crop_pct: _Positive
    test_crop_pct: _Positive
    interpolation: str
    crop_mode: str
    classifier: str | list[str]
    first_conv: str | list[str]
    num_classes: Annotated[int, lambda value: 0 <= value < 1e6]


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model as a folder describes it.

    Attributes:
      path: the folder; name: the name that it was given by, for messages.
      architecture: timm's name of the model.
      config: timm's configuration of the weights: normalisation, image size, classifier.
      kwargs: further arguments of timm.create_model.
      num_classes: outputs of the weights; classes: their names in order, None where the folder has none.
      kind: ema or raw, "" where it does not say.
    """

    path: Path
    name: str
    architecture: str
    config: dict
    kwargs: Kwargs
    num_classes: int
    classes: list[str] | None
    kind: str

    def __str__(self) -> str:
        return self.name

    @property
    def is_on_hub(self) -> bool:
        """True for a repository of Hugging Face's hub; `path` is then named by its revision."""
        return self.name.startswith(_HUB)

    def weights_file(self) -> Path:
        """The file of its weights; a UserError if there is none."""
        for file in WEIGHTS:
            if (self.path / file).is_file():
                return self.path / file
        if self.is_on_hub:
            repository, revision = self.name.partition("@")[0], self.path.name  # The revision of config.json.
            return _any_hub_file(f"{repository}@{revision}", WEIGHTS)
        raise UserError(f"{self.path}: has no weights ({', '.join(WEIGHTS)}). Put one of these beside {CONFIG}")


def source_name(name: str) -> str:
    """A model's name with its source spelled as timm does today: hf_hub:NAME is hf-hub:NAME."""
    source, colon, rest = name.partition(":")
    return f"{source.lower().replace('_', '-')}:{rest}" if colon else name


def named_folder(name: str | ModelFolder) -> ModelFolder | None:
    """The folder of a model that is named by one, local-dir:FOLDER or hf-hub:ORGANISATION/REPOSITORY[@REVISION].

    Args:
      name: or what this function has returned for it, which stays unchanged. So a model is built from one reading of
        its description, even if the file changes meanwhile.
    Returns:
      None for a name of timm's own.
    Raises:
      UserError: there is no such folder or repository, or its config.json is no description of a model.
    """
    if isinstance(name, ModelFolder):
        return name
    name = source_name(name)
    if name.startswith(_FOLDER):
        folder = Path(name.removeprefix(_FOLDER)).expanduser()
        if not (folder / CONFIG).is_file():
            raise UserError(f"{name}: there is no {CONFIG}. Give a folder that timm or tools/export.py wrote")
        return read_folder(folder, name)
    if name.startswith(_HUB):
        return read_folder(_any_hub_file(name, (CONFIG,)).parent, name)
    return None


@functools.cache
def _any_hub_file(name: str, files: tuple[str, ...]) -> Path:
    """The first of some files that a repository of the hub has, on this machine."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = name.removeprefix(_HUB).partition("@")
    try:
        with offline_if_unreachable():
            for file in files:
                with contextlib.suppress(EntryNotFoundError):
                    return Path(hf_hub_download(repository, file, revision=revision or None))
            raise FileNotFoundError(f"none of {', '.join(files)}")
    except Exception as error:  # The hub's library, its network's and the file system's all have errors of their own.
        raise UserError(
            f"{name}: {files[0]} cannot be had from Hugging Face's hub ({clipped(error, 100)}). Check the name and the "
            "network, or give a folder on this machine as local-dir:FOLDER"
        ) from error


def layer_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The layers that timm's configuration names under classifier or first_conv: one, several, or none."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def read_folder(path: Path, name: str) -> ModelFolder:
    """Read and check a folder's config.json.

    Raises:
      UserError: it is not what timm writes; the key is named where one of them is wrong.
    """
    file = path / CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8-sig"))
        if "pretrained_cfg" not in said:  # timm before 0.9 wrote all of it in one
            said = {**said, "pretrained_cfg": said, "label_names": said.get("label_names") or said.get("labels")}
        config = {key: value for key, value in said["pretrained_cfg"].items() if value is not None}
        config["num_classes"] = said.get("num_classes", config.get("num_classes"))
        architecture = said["architecture"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: not what timm writes for a model ({clipped(repr(error), 100)}). Export it again"
        ) from error
    if key := misfit({**said, **config, "architecture": architecture}, _Configuration):
        value = clipped(config.get(key, said.get(key)))
        raise UserError(f"{file}: {key} is {value}, which timm never writes. Correct it, or export the model again")
    config.pop("architecture", None)
    names, kind = said.get("label_names"), said.get("weights")
    outputs: Any = config["num_classes"]
    classes = [str(each) for each in names] if isinstance(names, list) else None  # A dictionary has words for classes.
    if classes is not None and len(classes) != outputs:
        raise UserError(
            f"{file}: has {len(classes):,} label_names for {outputs:,} outputs. Correct it, or leave them out"
        )
    kwargs = kwargs_of_file(file, said.get("model_args") or {})
    kind = kind if isinstance(kind, str) else ""
    return ModelFolder(path, name, architecture, config, kwargs, outputs, classes, kind)


def kwargs_of_file(path: Path, arguments: dict) -> Kwargs:
    """The arguments of timm.create_model that a file says, without those that are decided elsewhere.

    Raises:
      UserError: one is no plain value, or a number so large that the model could not be built.
    """
    kwargs = without_reserved(arguments)  # first: timm writes num_classes among them, and it may be larger
    check_sizes(f"{path}: the model's argument ", kwargs, "Correct it, or export the model again")
    return kwargs


def model_contents(config: Config) -> dict[str, str | None]:
    """Short hashes of the files that the student and every teacher come from: {"content of KEY": hash, or None}.

    Weights on Hugging Face's hub are not read: they may have to be downloaded first, which takes longer than ranks wait
    for each other. The revision of their repository stands for them.
    """
    found: dict[str, str | None] = {}
    live = [(key, teacher) for key, teacher in config.teacher.members if teacher.store is None]
    for key, model in [("student", config.student), *live]:
        files = {f"{key}.checkpoint": model.checkpoint, f"{key}.classes": model.classes}
        if folder := named_folder(model.name):
            files[f"{key}.name ({CONFIG})"] = folder.path / CONFIG
            is_random = key == "student" and not config.student.pretrained
            if folder.is_on_hub:
                found[f"revision of {key}.name"] = folder.path.name
            elif model.checkpoint is None and not is_random:
                files[f"{key}.name (weights)"] = folder.weights_file()
        for name, path in files.items():
            found[f"content of {name}"] = sha256_of(path)[:12] if path and path.is_file() else None
    return found
