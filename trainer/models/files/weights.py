"""Files of weights: ours, timm's and others'. What lies beside the weights is never built or run."""

from pathlib import Path
from typing import Any

import timm
import torch

from pipelines.common.errors import UserError, clipped
from pipelines.common.files import instead_of_content
from trainer.models.checkpoint_format import DamagedError, checked, is_of_trainer
from trainer.models.files.torch_files import ClaimError, load_plain

# Where the weights lie in checkpoints of this trainer, of timm and of the authors.
_NESTED = {
    "ema": ("ema", "state_dict_ema", "model_ema", "ema_state_dict"),
    "raw": ("student", "state_dict", "model", "model_state_dict", "model_state"),
}
# All names begin with one of these where a model is an attribute of what was saved, as in Lightning's modules.
_HOLDERS = ("model.", "net.", "network.")
_SAVE_ALONE = "save the weights alone: torch.save(model.state_dict(), 'weights.pth')"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of this trainer (the EMA if it has one), of timm or of others; as `read_file`."""
    return select_weights(path, read_file(path))[0]


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
        kinds = f"only {' and '.join(found)} ones" if any(found) else "no tensors by name, nor nested as timm does"
        wanted = "" if which == "auto" else f"{which} "
        raise UserError(f"{path}: holds no {wanted}weights, {kinds}. Give another file, or {_SAVE_ALONE}")
    for name, value in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise UserError(
                f"{path}: '{clipped(name)}' among its weights is {type(value).__name__}, not a tensor with a name. "
                f"Give another file, or {_SAVE_ALONE}"
            )
    return unwrapped(weights), kind


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(torch.is_tensor(each) for each in value.values())


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


def read_file(path: Path) -> Any:
    """Load what a file of weights holds; nothing in it is run.

    A checkpoint of this trainer is checked, and comes without its digest.

    Raises:
      UserError: the file is missing or damaged, or memory is too short for it.
    """
    try:
        content = load_plain(path)
        return checked(path, content) if is_of_trainer(content) else content
    except DamagedError as error:
        raise UserError(f"{error}. Copy it again, or give another one") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}). Give a file of weights; a run's best ones are in "
            "RUN/checkpoints/best.pt"
        ) from error
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise errors of their own
        with open(path, "rb") as file:
            found = instead_of_content(file.read(512))
        reason = clipped(error, 160) if isinstance(error, ClaimError) else type(error).__name__
        problem = f"damaged, or no file of weights ({reason}). Copy it again, or {_SAVE_ALONE}"
        raise UserError(f"{path}: {found or problem}") from error
