"""Files of weights: ours, timm's and others'. What lies beside the weights is never built or run."""

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from pipelines.common.errors import UserError, clipped, named
from pipelines.common.files import instead_of_content
from trainer.models.checkpoint_format import DamagedError, checked, is_of_trainer
from trainer.models.files.torch_files import ClaimError, load_plain, memory_for, require_regular

# Where the weights lie in checkpoints of this trainer, of timm and of the authors.
_NESTED = {
    "ema": ("ema", "state_dict_ema", "model_ema", "ema_state_dict"),
    "raw": ("student", "state_dict", "model", "model_state_dict", "model_state"),
}
# All names begin with one of these where a model is an attribute of what was saved, as in Lightning's modules.
_HOLDERS = ("model.", "net.", "network.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's weights as they were read from a file.

    Attributes:
      weights: tensors by name.
      classes: names of the model's outputs in their order; None where the file has none.
      source: the file, for messages.
    """

    weights: dict[str, torch.Tensor]
    classes: list[str] | None
    source: str


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights alone, as `read_checkpoint`."""
    return read_checkpoint(path).weights


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of this trainer (the EMA if it has one), of timm or of the authors.

    Raises:
      UserError: the file is missing, damaged, or holds more than plain data.
    """
    content = read_file(path)
    return Checkpoint(select_weights(path, content)[0], named_outputs(content), str(path))


def named_outputs(content: object) -> list[str] | None:
    """The names of a model's outputs in their order, which a file may hold as `classes`; None where it does not."""
    classes = content.get("classes") if isinstance(content, dict) else None
    return classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else None


def named_model(content: object) -> str | None:
    """Timm's name of the model that a file is of, which timm's training script writes as `arch`; None elsewhere."""
    name = content.get("arch") if isinstance(content, dict) else None
    return name if isinstance(name, str) and timm.is_model(name) else None


def select_weights(path: Path, content: object, which: str = "auto") -> tuple[dict[str, torch.Tensor], str]:
    """The weights in what a file holds.

    Args:
      which: ema, raw, or auto: the EMA if there is one, as timm does.
    Returns:
      tensors by the model's own names, and which they are, "" where the file does not say.
    Raises:
      UserError: there are none of that kind.
    """
    entries = content if isinstance(content, dict) else {}
    found = {kind: entries[key] for kind, keys in _NESTED.items() for key in keys if _has_tensors(entries.get(key))}
    if "state_dict" in entries and str(entries.get("weights")) in _NESTED:  # best.pt says which ones it holds
        found = {entries["weights"]: entries["state_dict"]}
    if not found and _has_tensors(entries):
        found = {"": entries}
    kind = next(iter(found), "") if which == "auto" else which
    weights = found.get(kind, {})
    if not _has_tensors(weights):
        if found and which != "auto":
            raise UserError(f"{path}: holds no {which} weights, only {', '.join(map(_kind_in_words, found))}")
        keys = ", ".join(key for keys in _NESTED.values() for key in keys)
        raise UserError(f"{path}: holds no weights; expected tensors by name, or nested under {keys}")
    for name, value in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise UserError(
                f"{path}: '{clipped(name)}' among its weights is {type(value).__name__}, not a tensor with a name. "
                "Save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
            )
    return unwrapped(weights), kind


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(torch.is_tensor(each) for each in value.values())


def _kind_in_words(kind: str) -> str:
    return f"{kind} ones" if kind else "some without a name"


def unwrapped(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the model's own names: DDP, torch.compile, AveragedModel and Lightning put others before them.

    Names stay unchanged where two of them would become one.
    """
    names = {name: _unwrapped_name(name) for name in weights}
    if any(name != own for name, own in names.items()):
        names.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel counts its updates in it
    if len({*names.values()}) < len(names):
        return weights
    for holder in _HOLDERS:
        if names and all(own.startswith(holder) for own in names.values()):
            return unwrapped({own.removeprefix(holder): weights[name] for name, own in names.items()})
    return {own: weights[name] for name, own in names.items()}


def _unwrapped_name(name: str) -> str:
    name = name.replace("_orig_mod.", "")  # any part of a model can be compiled by itself
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


class PlainData:
    """Stands for a value in a file that no weights depend on: nothing is built or run from what the file says of it."""

    def __init__(self, *_args):
        pass

    def __new__(cls, *_args):  # noqa: D102
        return super().__new__(cls)

    def __setstate__(self, _state):
        pass


class PlainMapping:
    """Stands for a dictionary of another type: what is made of it is an OrderedDict, which gets the items."""

    def __new__(cls, *_args):  # noqa: D102
        return collections.OrderedDict()


def _plain_types() -> tuple[tuple[type, str], ...]:
    """The types that training scripts save beside weights, by their full names, and what stands for each."""
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    cores = ("numpy.core.multiarray", "numpy._core.multiarray")  # The name changed with numpy 2.
    values = [
        *("argparse.Namespace", "types.SimpleNamespace", "typing.Any"),
        *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),  # in defaultdicts
        *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in paths),
        *("numpy.dtype", "numpy.ndarray", *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__)),
        *(f"{core}.{name}" for core in cores for name in ("scalar", "_reconstruct")),
        *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
        *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    ]
    mappings = [
        *("collections.defaultdict", "yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict"),
        "pytorch_lightning.utilities.parsing.AttributeDict",
        *(f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")),
    ]
    return (*((PlainData, name) for name in values), *((PlainMapping, name) for name in mappings))


def read_file(path: Path) -> Any:
    """Load what a file of weights holds, plain data alone; nothing in it is run.

    A checkpoint of this trainer is checked, and comes without its digest.

    Raises:
      UserError: the file is missing, damaged, or holds more than plain data; or memory is too short for it.
    """
    content = _load(path)
    if not is_of_trainer(content):
        return content
    try:
        return checked(path, content)
    except DamagedError as error:
        raise UserError(f"{error}. Copy it again, or give another one") from error


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            require_regular(path)
            with memory_for(path):
                return load_file(path)
        return load_plain(path, _plain_types())
    except UserError:
        raise
    except OSError as error:
        hint = "a file of weights; a run's best ones are in RUN/checkpoints/best.pt"
        if path.is_dir() and (files := sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)):
            hint = f"one of the files in it: {named(files)}"
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Give {hint}") from error
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise errors of their own
        raise UserError(f"{path}: {_why_not_loaded(path, error)}") from error


_SUFFIXES = (".pt", ".pth", ".tar", ".safetensors", ".ckpt", ".bin")
# The first bytes of files that people take for weights.
_OTHER_FILES = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"PAR1": "a parquet file",
    b"GGUF": "a GGUF file",
}


def _why_not_loaded(path: Path, error: Exception) -> str:
    save = "save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
    with open(path, "rb") as file:
        head = file.read(512)
    if found := instead_of_content(head):
        return found
    if not head:
        return "an empty file. Copy it again"
    if other := next((what for magic, what in _OTHER_FILES.items() if head.startswith(magic)), ""):
        return f"{other}, not a file of weights. Give the file that the training wrote"
    if path.suffix != ".safetensors" and head[8:9] == b"{":
        return "a safetensors file under another name. Rename it so that it ends in .safetensors"
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"holds '{clipped(refused[1])}', which is no plain data and could run code, so the file is not loaded. In "
            f"the program that wrote it, {save}"
        )
    if "TorchScript" in str(error):
        return f"holds a TorchScript program, which is not loaded. With model = torch.jit.load(FILE), {save}"
    reason = clipped(error, 120) if isinstance(error, ClaimError) else type(error).__name__
    return f"damaged, or no file of weights ({reason}). Copy it again, or {save}"
