"""The parameters of a hundred models begin with the same mean and spread, except those that docs/recipe.md lists."""

import math
from collections.abc import Iterator

from fidelity.old_timm import models_of
from fidelity.rows import Row
from fidelity.zoo import Parameter, as_known, both, differing

# Two standard deviations may differ by SPREAD in their logarithms, plus ERRORS standard errors.
SPREAD, ERRORS = 0.05, 5.0
_MIXERS = {"gmixer_12_224", "gmlp_ti16_224", "mixer_b16_224", "mixer_s16_224", "resmlp_12_224"}
_TOKENS = {"deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "vit_small_patch16_224", "vit_tiny_patch16_224"}
_REGNETS = {"regnetx_002", "regnety_002", "regnety_032"}
KNOWN = {
    "timm 0.5.4": _MIXERS | _TOKENS | _REGNETS | {"vit_tiny_r_s16_p8_224"},
    "the authors' models": _MIXERS,
}


def rows() -> Iterator[Row]:
    """Standard deviation and mean of each parameter."""
    count, found = differing(begins_otherwise)
    shown = [f"{model} ({_shown(model, names)})" for model, names in found.items()]
    yield as_known(
        f"mean and spread of the parameters, {models_of()}",
        *(("timm.create_model", "create_model"), count, found.keys(), KNOWN, ", ".join(shown)),
    )


def begins_otherwise(ours: Parameter, theirs: Parameter) -> bool:
    """Whether the values of two parameters come from different distributions, judged by mean and spread."""
    error, largest = 1 / math.sqrt(ours.size), max(ours.std, theirs.std)
    if abs(ours.mean - theirs.mean) > ERRORS * math.sqrt(2) * largest * error + 1e-6:
        return True
    if largest == 0 or ours.size == 1:
        return False
    smallest = min(ours.std, theirs.std)
    return smallest == 0 or math.log(largest / smallest) > SPREAD + ERRORS * error


def _shown(model: str, names: list[str]) -> str:
    """The first of a model's parameters that differ, with both standard deviations."""
    ours, theirs = ({each.name: each for each in side[model]} for side in both())
    own, other = ours[names[0]], theirs.get(names[0])
    more = f", {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} {own.std:.3g}, theirs {other.std:.3g}{more}" if other else f"{names[0]}{more}"
