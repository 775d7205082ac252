"""Models from timm, with weights from files, folders, Hugging Face's hub or timm itself."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from pipelines.common.errors import UserError, clipped, named, reason_of
from trainer.cluster.memory import is_out_of_memory
from trainer.config.model_arguments import Kwargs
from trainer.models.checkpoint_format import not_finite
from trainer.models.class_names import read_classes
from trainer.models.files.hub import offline_if_unreachable
from trainer.models.files.model_folders import ModelFolder, layer_names, named_folder
from trainer.models.files.weights import named_outputs, read_file, select_weights
from trainer.models.preprocessing import timm_config

# Names that differ between the authors' code and timm.
_ALIASES = {"tresnet_l_v2": "tresnet_v2_l"}


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
      UserError: an unknown model or argument, weights that do not fit, or that cannot be downloaded.
    """
    folder = named_folder(name)
    name = architecture(folder or name)
    kwargs = with_size(name, image_size, {**(folder.kwargs if folder else {}), **kwargs})
    overlay = None
    if weights is not None:
        # Some weight of a classifier has a row for each class. No larger one is made, which might take all memory.
        if num_classes > max((length for value in weights.values() for length in value.shape), default=0):
            problem = f"does not fit model '{name}' (none of its weights has {num_classes:,} outputs)"
            raise UserError(f"{source}: {problem}. Give the model it was saved from")
        overlay = {"state_dict": weights, "num_classes": num_classes, "source": ""}
    arguments: dict[str, Any] = {"num_classes": num_classes, **kwargs}
    try:
        nothing = contextlib.nullcontext()
        with (
            all_weights_required() if weights is not None else nothing,
            offline_if_unreachable() if pretrained else nothing,
        ):
            has_weights = pretrained or weights is not None
            model = timm.create_model(name, pretrained=has_weights, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:  # Every model checks its arguments in its own way, and a download fails in many ways.
        given = source if weights is not None else None
        raise UserError(_failure(error, name, image_size, given, pretrained)) from error
    if weights is not None:
        check_values(model, weights, source)
    config = timm_config(model)
    config.pop("state_dict", None)
    config.update(folder.config if folder else {})
    return model


def _failure(error: Exception, name: str, image_size: int, source: Path | str | None, pretrained: bool) -> str:
    """Why a model cannot be built, and what to do. `source` is that of given weights, None without them."""
    reason = f"({type(error).__name__}: {reason_of(error, 160)})"
    if is_out_of_memory(error):
        return f"model '{name}': memory is too short for it {reason}. Free some memory, or use a smaller model"
    if isinstance(error, MisfitError):
        advice = "Give the model it was saved from, or a file of this one"
        return f"{source}: does not fit model '{name}' ({error}). {advice}"
    if source is not None and isinstance(error, RuntimeError):
        return f"{source}: does not fit model '{name}' {reason}. Give the model it was saved from"
    if pretrained and not isinstance(error, TypeError | AssertionError | ValueError):
        return f"model '{name}': its weights cannot be downloaded {reason}. Give a file with its weights"
    return (
        f"model '{name}' cannot be built for images of {image_size} px with these arguments {reason}. Change the image "
        "size or its kwargs"
    )


class MisfitError(RuntimeError):
    """Weights that are not those of a model: the message names the first that differ."""


@contextlib.contextmanager
def all_weights_required() -> Iterator[None]:
    """Inside, weights that do not fit a model are a MisfitError, as is a weight that a model would not get.

    For some models (DLA) timm would keep random ones in silence.

    This replaces a method of nn.Module for the whole process, so models are built in one thread. Parts that a model
    loads while it is itself loaded may lack weights, as they may elsewhere.
    """
    load, loading = nn.Module.load_state_dict, []

    def load_all(self, state_dict, *args, **options):
        loading.append(self)
        try:
            found = load(self, state_dict, *args, **options)
        except RuntimeError as error:
            if len(loading) == 1 and not is_out_of_memory(error) and (text := misfit(self.state_dict(), state_dict)):
                raise MisfitError(text) from error
            raise
        finally:
            loading.pop()
        if found.missing_keys and not loading:
            raise MisfitError(f"it lacks {_named(found.missing_keys)}")
        return found

    nn.Module.load_state_dict = load_all
    try:
        yield
    finally:
        nn.Module.load_state_dict = load


def misfit(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    """How weights differ from those that a model has, by their first names and shapes; "" if neither differs."""
    lacking, others = [name for name in own if name not in given], [name for name in given if name not in own]
    shapes = [name for name in own if name in given and own[name].shape != given[name].shape]
    differences = [
        f"it lacks {_named(lacking)}" if lacking else "",
        f"it has {_named(others)}, which the model has not" if others else "",
        *(
            f"'{clipped(name)}' is {[*given[name].shape]} and the model's is {[*own[name].shape]}"
            for name in shapes[:1]
        ),
        f"{len(shapes) - 1} more have another shape" if len(shapes) > 1 else "",
    ]
    return "; ".join(filter(None, differences))


def _named(weights: Iterable[str]) -> str:
    return named((f"'{clipped(name)}'" for name in weights), 2)


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


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a model starts from.

    Attributes:
      name: as for `create_model`.
      weights: tensors by name; None for timm's own, which are downloaded when the model is built.
      source: where they come from, for messages.
      outputs: how many classes they distinguish; None where timm does not say which layer the classifier is.
      classes: the names of their outputs in order, None where nothing names them; `namer` is the file that does.
    """

    name: str | ModelFolder
    weights: dict[str, torch.Tensor] | None
    source: str
    outputs: int | None
    classes: list[str] | None
    namer: Path | str

    def build(self, num_classes: int, image_size: int, kwargs: Kwargs) -> nn.Module:
        """The model with these weights; timm itself replaces a classifier of another size that it has downloaded."""
        pretrained = self.weights is None
        return create_model(
            self.name, num_classes, image_size, kwargs, self.weights, self.source, pretrained=pretrained
        )


def starting_weights(name: str, checkpoint: Path | None, classes: Path | None) -> Start:
    """The weights of a checkpoint, of the folder or repository that a model is named by, or timm's own.

    Args:
      classes: names the outputs, instead of the checkpoint or folder.
    """
    folder = named_folder(name)
    path = checkpoint or (folder.weights_file() if folder else None)
    if path is None:
        weights, source, own, outputs = None, f"timm's weights of '{name}'", None, pretrained_outputs(name)
    else:
        content = read_file(path)
        weights, _ = select_weights(path, content)
        source, own, outputs = str(path), named_outputs(content), num_outputs(folder or name, weights)
    if folder and checkpoint is None:
        source, own = folder.name, folder.classes
    listed, namer = (read_classes(classes), classes) if classes else (own, source)
    return Start(folder or name, weights, source, outputs, listed, namer)


def with_size(name: str | ModelFolder, image_size: int, kwargs: Kwargs) -> Kwargs:
    """The arguments that a model is built with: some of timm's are built for one image size, pixels."""
    config = timm.get_pretrained_cfg(architecture(name))
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return kwargs
    return {"img_size": image_size, **kwargs}


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
    """How many classes timm's pretrained weights of a model distinguish; a UserError if there are none."""
    source = timm.get_pretrained_cfg(known_name(name))
    if source is None or not source.has_weights:
        raise UserError(f"model '{name}': timm has no pretrained weights for it. Give a file with its weights")
    return source.num_classes
