"""Weights and configuration as timm itself loads them, from a folder or from Hugging Face's hub."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from timm.layers import to_2tuple
from torch import nn

from pipelines.common.errors import UserError, named
from tools.lib.common.onnx_file import largest_difference
from trainer.config.sections import DataConfig
from trainer.evaluation.trained import CONFIG, WEIGHTS, TrainedModel, descriptions
from trainer.models.checkpoint_format import not_finite
from trainer.models.preprocessing import preprocessing, timm_config

# These keys of timm's configuration of a model describe the architecture, not the weights that timm has for it.
_OF_ARCHITECTURE = ("first_conv", "classifier", "min_input_size")


def write_folder(trained: TrainedModel, folder: Path) -> None:
    """Write model.safetensors and config.json into a folder, and see that timm makes the same model of them.

    Raises:
      UserError: weights are not finite, or timm makes another model of the files.
    """
    if name := not_finite(trained.module.state_dict().items()):
        raise UserError(f"{trained.source}: '{name}' is not finite. Export a checkpoint from before that")
    # Cloned tensors share no memory; the format cannot say that they do.
    tensors = {name: value.detach().clone().contiguous() for name, value in trained.module.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(hub_config(trained), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _check_same_model(trained, folder)


def hub_config(trained: TrainedModel) -> dict:
    """What config.json holds; timm.models.save_config_for_hf has the meaning of the keys.

    Written here and not by that function, which in older versions keeps what timm's own weights are evaluated with.
    """
    own, size = timm_config(trained.module), _trained_with(trained)
    transform, expects = trained.transform, preprocessing(trained.module)
    arguments, known = dict(trained.kwargs), timm.get_pretrained_cfg(trained.name)
    # The architecture decides it, whatever a description says.
    is_fixed = known is not None and known.fixed_input_size
    if is_fixed and size != to_2tuple(trained.transform.image_size):
        arguments.setdefault("img_size", size[0])
    adapts = arguments.get("dynamic_img_size") or not arguments.get("strict_img_size", True)
    config = {
        "architecture": trained.name.partition(".")[0],
        "num_classes": trained.num_outputs,
        "weights": trained.weights,
        "model_args": arguments,
        "pretrained_cfg": {
            **{key: own[key] for key in _OF_ARCHITECTURE if own.get(key) is not None},
            "test_input_size": [3, transform.image_size, transform.image_size],
            "interpolation": transform.interpolation,
            "crop_pct": transform.crop_pct,
            "crop_mode": transform.crop_mode,
            "mean": list(expects.mean),
            "std": list(expects.std),
            "input_size": [3, *size],
            "fixed_input_size": is_fixed and not adapts,
            "pool_size": None,
            "num_classes": trained.num_outputs,
        },
    }
    return {**config, **_labels(trained)}


def _labels(trained: TrainedModel) -> dict:
    """Names of the outputs and words for them; nothing if they were guessed, which timm does itself."""
    if trained.classes is None or trained.classes_guessed:
        return {}
    words = dict(zip(trained.classes, descriptions(trained.classes), strict=True))
    described = any(name != word for name, word in words.items())
    return {"label_names": trained.classes, **({"label_descriptions": words} if described else {})}


def _trained_with(trained: TrainedModel) -> tuple[int, int]:
    """The image size that the model was trained with or built for, pixels: a hint for whoever trains it further."""
    if size := trained.kwargs.get("img_size"):
        height, width = (int(side) for side in to_2tuple(size))
    elif trained.origin:
        height = width = DataConfig(image_size=trained.origin["config"]["data"]["image_size"]).train_sizes[-1]
    else:
        height, width = timm_config(trained.module)["input_size"][1:]
    return height, width


def timm_model(folder: Path) -> nn.Module:
    """The model of a folder as timm alone makes it, in evaluation mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def _check_same_model(trained: TrainedModel, folder: Path) -> None:
    """Compare weights exactly, and logits but for rounding: kernels round by where in memory a weight begins."""
    made, state = timm_model(folder), trained.module.state_dict()
    others = [name for name, value in made.state_dict().items() if not torch.equal(value, state[name])]
    difference = largest_difference(trained.module, made, noise(trained, 2))
    if others or not difference.is_small:
        what = f"weights: {named(others)}" if others else f"logits: they are off by up to {difference}"
        raise UserError(f"{trained.source}: timm makes a model of the exported files with other {what}. Report this")


def noise(trained: TrainedModel, count: int) -> torch.Tensor:
    """Images of a model's size, float32 [count, 3, S, S], like normalised pixels; the same ones each time."""
    size = trained.transform.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
