"""A hundred models, on both sides: the paper's, and a spread over all files of models in timm 0.5.4."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Set

import numpy as np
import timm
import torch

from fidelity.old_timm import models_of, theirs
from fidelity.rows import Row
from trainer.config.sections import OptimConfig
from trainer.update.optimizer import build_optimizer

# The paper's own. EdgeNeXt is in neither timm 0.5.4 nor the authors' repository.
PAPER = (
    *("resnet50", "tresnet_m", "tresnet_l", "mobilenetv3_large_100", "efficientnet_b0", "levit_384", "convnext_small"),
    *("regnety_032", "vit_small_patch16_224", "swin_small_patch4_window7_224", "tnt_s_patch16_224", "mixer_b16_224"),
    "resmlp_12_224",
)
# One or more of every other file of models in timm 0.5.4, small ones where there is a choice.
SPREAD = (
    *("resnet18", "resnet34", "resnet26d", "resnet26t", "resnet33ts", "resnet50_gn", "resnetblur18"),
    *("resnext50_32x4d", "seresnet18", "seresnet50", "ecaresnet26t", "ecaresnetlight", "gcresnext26ts", "skresnet18"),
    *("eca_resnext26ts", "bat_resnext26ts", "botnet26t_256", "halonet26t", "lambda_resnet26t", "resnetv2_50"),
    *("resnetv2_50d_gn", "resnest14d", "res2net50_14w_8s", "legacy_seresnet18"),
    *("cspresnet50", "darknet53", "densenet121", "dla34", "dla46_c", "dpn68", "dm_nfnet_f0", "eca_nfnet_l0"),
    *("nf_regnet_b0", "nf_resnet50", "ese_vovnet19b_dw", "gernet_s", "repvgg_a2", "regnetx_002", "regnety_002"),
    *("regnetz_b16", "hrnet_w18_small", "mobilenetv2_050", "mobilenetv3_small_050", "lcnet_050", "mnasnet_small"),
    *("tinynet_e", "ghostnet_050", "ghostnet_100", "efficientnet_lite0", "efficientnet_es", "efficientnet_cc_b0_4e"),
    *("efficientnetv2_rw_t", "tf_efficientnet_b0", "mixnet_s", "fbnetc_100"),
    *("fbnetv3_b", "hardcorenas_a", "rexnet_100", "semnasnet_050", "selecsls42", "inception_v3"),
    *(
        "inception_v4",
        "xception41",
        "vgg11_bn",
        "convmixer_1024_20_ks9_p14",
        "convnext_tiny",
        "convit_tiny",
        "coat_lite_tiny",
    ),
    *("cait_xxs24_224", "crossvit_9_240", "beit_base_patch16_224", "deit_tiny_patch16_224", "levit_128s"),
    *("deit_tiny_distilled_patch16_224", "pit_ti_224", "pit_ti_distilled_224", "nest_tiny", "visformer_tiny"),
    *("swin_tiny_patch4_window7_224", "twins_pcpvt_small", "twins_svt_small", "vit_tiny_patch16_224"),
    *("vit_tiny_r_s16_p8_224", "xcit_nano_12_p16_224", "mixer_s16_224", "gmixer_12_224", "gmlp_ti16_224"),
)
MODELS = (*PAPER, *SPREAD)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a model that was just made.

    Attributes:
      name: as its side has it.
      shape: its sides, "64x3x7x7".
      std, mean: of its values.
      decays: whether it is in a group with weight decay.
    """

    name: str
    shape: str
    std: float
    mean: float
    decays: bool

    @property
    def size(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x") if side)


@functools.cache
def both() -> tuple[dict[str, list[Parameter]], dict[str, list[Parameter]]]:
    """The parameters of each model, ours and theirs; a model that is not there is left out."""
    found = _theirs()
    fields = [field.name for field in dataclasses.fields(Parameter)]
    keys = dict(zip(fields, ("names", "shapes", "std", "mean", "decay"), strict=True))
    there = {
        model: [
            Parameter(*values)
            for values in zip(*(found[f"{model} {key}"].tolist() for key in keys.values()), strict=True)
        ]
        for model in MODELS
        if f"{model} names" in found
    }
    return {model: list(_parameters(model)) for model in MODELS}, there


def dropouts() -> tuple[dict[str, float], dict[str, float]]:
    """The largest rate of dropout of each model, ours and theirs."""
    found, ours = _theirs(), {}
    for model in MODELS:
        with torch.device("meta"):
            network = timm.create_model(model)
        rates = [layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)]
        ours[model] = max([0.0, float(getattr(network, "drop_rate", 0.0) or 0.0), *rates])
    return ours, {model: float(found[f"{model} dropout"]) for model in MODELS if f"{model} dropout" in found}


@functools.cache
def _theirs() -> dict[str, np.ndarray]:
    return theirs("zoo", models=np.array(MODELS))


def _parameters(name: str) -> Iterator[Parameter]:
    torch.manual_seed(0)
    model = timm.create_model(name)
    groups = build_optimizer(model, OptimConfig()).param_groups
    decays = {id(each): group["weight_decay"] > 0 for group in groups for each in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        values = parameter.detach().double()
        shape = "x".join(map(str, parameter.shape))
        std, mean = values.std(correction=0).item(), values.mean().item()
        yield Parameter(parameter_name, shape, std, mean, decays[id(parameter)])


def pairs(ours: list[Parameter], theirs: list[Parameter]) -> list[tuple[Parameter, Parameter]]:
    """The parameters of a model that are the same on both sides.

    Those of one name and shape are. Of the others, which a version renamed, those of one shape are taken in their
    order, where both sides have as many of them.
    """
    theirs = [dataclasses.replace(each, name=_present_name(each.name)) for each in theirs]
    sides = [{(each.name, each.shape): each for each in side} for side in (ours, theirs)]
    alike = [key for key in sides[0] if key in sides[1]]
    found = [(sides[0][key], sides[1][key]) for key in alike]
    left: list[dict[str, list[Parameter]]] = [defaultdict(list), defaultdict(list)]
    for side, by_shape in zip(sides, left, strict=True):
        for (_, shape), parameter in side.items():
            if (parameter.name, shape) not in alike:
                by_shape[shape].append(parameter)
    for shape, group in left[0].items():
        if len(group) == len(left[1][shape]):
            found += zip(group, left[1][shape], strict=True)
    return found


def _present_name(name: str) -> str:
    """TResNet's convolutions and norms, which were numbered in timm 0.5.4, by their present names."""
    name = re.sub(r"^(body\..*(?:conv\d|downsample\.\d))(?:\.0)?\.0\.weight$", r"\1.conv.weight", name)
    name = re.sub(r"^(body\..*(?:conv\d|downsample\.\d))(?:\.0)?\.1\.(weight|bias)$", r"\1.bn.\2", name)
    return re.sub(r"^body\.conv1\.0\.weight$", "body.conv1.conv.weight", name)


def differing(is_other: Callable[[Parameter, Parameter], bool]) -> tuple[int, dict[str, list[str]]]:
    """How many parameters were compared, and the models with their parameters for which `is_other` is true."""
    ours, there = both()
    count, found = 0, {}
    for model in there:
        paired = pairs(ours[model], there[model])
        count += len(paired)
        if names := [own.name for own, other in paired if is_other(own, other)]:
            found[model] = names
    return count, found


def as_known(
    what: str, names: tuple[str, str], count: int, found: Set[str], known: dict[str, Set[str]], note: str
) -> Row:
    """The row of a comparison in which some models are known to differ.

    Args:
      found: these models.
      known: those that are known, by whose they are: see `models_of`.
    """
    expected = known[models_of()]
    new, gone = sorted(found - expected), sorted(expected - found)
    changes = [f"{word} {', '.join(models)}" for word, models in (("also", new), ("no longer", gone)) if models]
    difference = f"in {len(found)} of the models"
    return Row(
        what,
        *names,
        count,
        difference,
        f"the {len(expected)} known",
        not changes,
        "; ".join([note, *changes]).strip("; "),
    )
