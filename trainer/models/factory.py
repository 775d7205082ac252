"""Models from timm, with weights from files, folders, Hugging Face's hub or timm itself."""

import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from pipelines.common.errors import UserError, clipped, reason_of
from trainer.cluster.memory import is_out_of_memory
from trainer.config.model_arguments import Kwargs
from trainer.config.setting_names import SettingError, Spelling
from trainer.models.checkpoint_format import not_finite
from trainer.models.files.model_folders import ModelFolder, layer_names, named_folder
from trainer.models.files.weights import Checkpoint, read_checkpoint, read_weights
from trainer.models.preprocessing import timm_config

# Names that differ between the authors' code and timm.
_ALIASES = {"tresnet_l_v2": "tresnet_v2_l"}
_MANY_CLASSES = 100_000  # A classifier of more classes is made only for weights that have as many rows.


def create_model(
    name: str | ModelFolder,
    num_classes: int,
    image_size: int,
    kwargs: Kwargs,
    weights: dict[str, torch.Tensor] | None = None,
    source: Path | str = "",
    *,
    pretrained: bool = False,
) -> nn.Module:
    """A timm model, with weights if there are some; timm renames the keys of older and foreign files.

    Args:
      name: timm's, or hf-hub:ORGANISATION/REPOSITORY or local-dir:FOLDER for the architecture that is described there.
      weights, source: what was read, of `num_classes` classes, and from where.
      pretrained: download timm's weights.
    Raises:
      UserError: an unknown model or argument, or weights that do not fit.
    """
    folder = named_folder(name)
    name = architecture(folder or name)
    kwargs = with_size(name, image_size, {**(folder.kwargs if folder else {}), **kwargs})
    overlay = None
    if weights is not None:
        check_num_outputs(name, weights, num_classes, source)
        overlay = {"state_dict": weights, "num_classes": num_classes, "source": ""}
    arguments: dict[str, Any] = {"num_classes": num_classes, **kwargs}
    try:
        with all_weights_required() if weights is not None else contextlib.nullcontext():
            has_weights = pretrained or weights is not None
            model = timm.create_model(name, pretrained=has_weights, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:  # Every model checks its arguments in its own way.
        if weights is None and pretrained and not isinstance(error, TypeError | AssertionError | ValueError):
            raise  # The download failed.
        raise UserError(_why_not_made(name, image_size, weights, source, error)) from error
    if weights is not None:
        check_values(model, weights, source)
    config = timm_config(model)
    config.pop("state_dict", None)
    config.update(folder.config if folder else {})
    return model


@contextlib.contextmanager
def all_weights_required() -> Iterator[None]:
    """Inside, a weight that a model would not get is an error: for some (DLA) timm keeps random ones in silence.

    This replaces a method of nn.Module for the whole process, so models are built in one thread. Parts that a model
    loads while it is itself loaded may lack weights, as they may elsewhere.
    """
    load, loading = nn.Module.load_state_dict, []

    def load_all(self, *args, **named):
        loading.append(self)
        try:
            found = load(self, *args, **named)
        finally:
            loading.pop()
        if found.missing_keys and not loading:
            raise RuntimeError("Missing key(s) in state_dict: " + ", ".join(f'"{name}"' for name in found.missing_keys))
        return found

    nn.Module.load_state_dict = load_all
    try:
        yield
    finally:
        nn.Module.load_state_dict = load


def check_num_outputs(name: str, weights: dict[str, torch.Tensor], num_classes: int, source: Path | str) -> None:
    """Raise a UserError, before a classifier of that size is made, if no weights of a model can be its classifier's."""
    found = num_outputs(name, weights)
    if found is None and num_classes > _MANY_CLASSES:
        found = max((length for value in weights.values() for length in value.shape), default=0)
        found = None if found >= num_classes else found
    if found not in (None, num_classes):
        raise UserError(
            f"{source}: its weights have {found:,} outputs, not the {num_classes:,} that are said to be there. Give "
            "the weights that belong to it"
        )


def check_values(model: nn.Module, weights: dict[str, torch.Tensor], source: Path | str) -> None:
    """Raise a UserError if what a model has taken from weights is not finite, or was whole numbers."""
    own = model.state_dict()
    for name, value in own.items():
        given = weights.get(name)
        if given is not None and value.is_floating_point() and not given.is_floating_point():
            kind = str(given.dtype).removeprefix("torch.")
            raise UserError(
                f"{source}: '{clipped(name)}' holds {kind}, not floating numbers. Give the file as it was saved"
            )
    if name := not_finite(own.items()):
        raise UserError(
            f"{source}: '{clipped(name)}' is not finite: it holds NaN or an infinity. Give weights from before that"
        )


def _why_not_made(
    name: str, image_size: int, weights: dict[str, torch.Tensor] | None, source: Path | str, error: Exception
) -> str:
    if is_out_of_memory(error):
        return (
            f"model '{name}': memory is too short for it ({reason_of(error)}). Free some memory, or use a smaller model"
        )
    if weights is not None and isinstance(error, RuntimeError):
        return f"{source}: {_why_not_fitting(name, weights, error)}"
    return _why_not_built(name, image_size, error)


def _why_not_built(name: str, image_size: int, error: Exception) -> str:
    if isinstance(error, TypeError):
        return f"model '{name}' does not take these arguments ({reason_of(error)}). Change its kwargs"
    return (
        f"model '{name}' cannot be built for images of {image_size} px with these arguments "
        f"({type(error).__name__}: {reason_of(error)}). Change data.image_size or its kwargs"
    )


def _why_not_fitting(name: str, weights: dict[str, torch.Tensor], error: RuntimeError) -> str:
    config = timm.get_pretrained_cfg(name)
    name_of_first = f"{next(iter(layer_names(config and config.first_conv)), '')}.weight"
    first = weights.get(name_of_first)
    if first is not None and first.ndim == 4 and first.shape[1] == 1:
        return (
            "was trained on images of one channel, and images have 3 here (gray ones, too). Give weights that were "
            f"trained on RGB images, or replace '{name_of_first}', w, by w.repeat(1, 3, 1, 1) / 3"
        )
    if prefix := _common_prefix(list(weights)):
        return (
            f"does not fit model '{name}': all its names begin with '{prefix}', as of a larger model that holds it. "
            f"Save {{k.partition('{prefix}')[2]: v for k, v in weights.items()}}"
        )
    return f"does not fit model '{name}' ({reason_of(error, 160)}). Give the model it was saved from"


def _common_prefix(names: list[str]) -> str:
    """Return what all names begin with, up to a dot; "" where there is nothing."""
    return os.path.commonprefix(names).rpartition(".")[0] + "." if "." in os.path.commonprefix(names) else ""


def with_size(name: str | ModelFolder, image_size: int, kwargs: Kwargs) -> Kwargs:
    """The arguments that a model is built with: some of timm's are built for one image size, pixels."""
    config = timm.get_pretrained_cfg(architecture(name))
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return kwargs
    return {"img_size": image_size, **kwargs}


def starting_weights(name: str | ModelFolder, checkpoint: Path | None) -> Checkpoint | None:
    """The weights of a checkpoint, or of the folder or repository that a model is named by; None for timm's own."""
    if checkpoint is not None:
        return read_checkpoint(checkpoint)
    if folder := named_folder(name):
        return Checkpoint(read_weights(folder.weights_file()), folder.classes, folder.name)
    return None


def classifier_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers that give a model's logits: timm names one, or several, or none."""
    return layer_names(timm_config(model).get("classifier"))


def architecture(name: str | ModelFolder) -> str:
    """Timm's name of a model that is named in any way: by timm's name, a folder, or a repository of the hub."""
    folder = named_folder(name)
    return known_name(folder.architecture if folder else str(name))


def known_name(name: str) -> str:
    """Timm's name of a model; a UserError if it has none."""
    name = _ALIASES.get(name, name)
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists them; null is no model"
        raise UserError(f"unknown model '{clipped(name)}'; {hint}")
    return name


def num_outputs(name: str | ModelFolder, weights: dict[str, torch.Tensor]) -> int | None:
    """How many classes the weights of a model tell apart; None where they have no classifier under timm's name."""
    config = timm.get_pretrained_cfg(architecture(name))
    found = (weights.get(f"{layer}.weight") for layer in layer_names(config and config.classifier))
    return next((len(weight) for weight in found if weight is not None and weight.ndim), None)


def pretrained_outputs(name: str) -> int:
    """How many classes timm's pretrained weights of a model distinguish.

    Raises:
      SettingError: there are none.
    """
    source = timm.get_pretrained_cfg(known_name(name))
    if source is None or not source.has_weights:
        raise SettingError(f"model '{name}': timm has no pretrained weights for it", _advice_to_give_weights)
    return source.num_classes


def download(name: str, num_classes: int, image_size: int, kwargs: Kwargs) -> nn.Module:
    """A model with timm's pretrained weights.

    Raises:
      SettingError: they cannot be downloaded.
    """
    try:
        return create_model(name, num_classes, image_size, kwargs, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # The download library has errors of many types.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        problem = f"model '{name}': its weights cannot be downloaded ({reason[0]})"
        raise SettingError(problem, _advice_to_give_weights) from error


def _advice_to_give_weights(spelled: Spelling) -> str:
    checkpoint = spelled("checkpoint")
    return f"Give its weights with {checkpoint} FILE" if checkpoint else "Give a file or folder with its weights"
