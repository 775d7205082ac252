"""Models in folders, and in repositories of Hugging Face's hub, as timm writes them: config.json beside weights."""

import dataclasses
import functools
import json
from pathlib import Path

from pipelines.errors import UserError, clipped
from trainer.config import Kwargs, without_reserved

CONFIG = "config.json"
# Where timm looks for weights, in its order. Source: timm.models._hub._PREFERRED_FILES.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
SOURCES = _HUB, _FOLDER = ("hf-hub:", "local-dir:")


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

    @property
    def is_on_hub(self) -> bool:
        """True for a repository of Hugging Face's hub; `path` is then named by its revision."""
        return self.name.startswith(_HUB)

    def weights_file(self) -> Path:
        """The file of its weights.

        Raises:
          UserError: there is none.
        """
        for file in WEIGHTS:
            if (self.path / file).is_file():
                return self.path / file
        if self.is_on_hub:
            return _any_hub_file(self.name, WEIGHTS)
        raise UserError(f"{self.path}: has no weights ({', '.join(WEIGHTS)}). Put one of these beside {CONFIG}")


def source_name(name: str) -> str:
    """A model's name with its source spelled as timm does today: hf_hub:NAME is hf-hub:NAME."""
    source, colon, rest = name.partition(":")
    return f"{source.lower().replace('_', '-')}:{rest}" if colon else name


def named_folder(name: str) -> ModelFolder | None:
    """The folder of a model that is named by one, local-dir:FOLDER or hf-hub:ORGANISATION/REPOSITORY[@REVISION].

    Returns:
      None for a name of timm's own.
    Raises:
      UserError: there is no such folder or repository, or its config.json is no description of a model.
    """
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
        for file in files:
            try:
                return Path(hf_hub_download(repository, file, revision=revision or None))
            except EntryNotFoundError as error:
                missing = error
        raise missing
    except Exception as error:  # the hub's library, its network's and the file system's all have their own
        raise UserError(
            f"{name}: {files[0]} cannot be had from Hugging Face's hub ({clipped(error, 100)}). Check the name and the "
            "network, or give a folder on this machine as local-dir:FOLDER"
        ) from error


def read_folder(path: Path, name: str) -> ModelFolder:
    """What a folder's config.json says.

    Raises:
      UserError: it is not what timm writes.
    """
    try:
        said = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if "pretrained_cfg" not in said:  # of timm before 0.9: all in one
            said = {**said, "pretrained_cfg": said, "label_names": said.get("label_names") or said.get("labels")}
        config = {key: value for key, value in said["pretrained_cfg"].items() if key != "architecture"}
        outputs = int(said.get("num_classes", config.get("num_classes")))
        channels = {config.get("input_size", [3])[0], (said.get("model_args") or {}).get("in_chans", 3)}
        numbers = [*config.get("mean", []), *config.get("std", []), *config.get("input_size", [])]
        if channels == {3} and (len(numbers) % 3 or not all(isinstance(value, int | float) for value in numbers)):
            raise ValueError("mean, std and input_size are not three numbers each")
        kwargs = without_reserved(dict(said.get("model_args") or {}))
        architecture, kind = str(said["architecture"]), said.get("weights", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / CONFIG}: not what timm writes for a model ({clipped(repr(error), 100)}). Export it again"
        ) from error
    if channels != {3}:
        raise UserError(
            f"{path / CONFIG}: a model of images with {min(channels - {3})} channels, and images have 3 here (gray "
            "ones, too). Use a model of RGB images"
        )
    classes = said.get("label_names")
    classes = [str(each) for each in classes] if isinstance(classes, list) and len(classes) == outputs else None
    return ModelFolder(
        path, name, architecture, config, kwargs, outputs, classes, kind if isinstance(kind, str) else ""
    )
