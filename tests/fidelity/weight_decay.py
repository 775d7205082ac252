"""Weight decay spares the same parameters as timm's create_optimizer_v2, except those that docs/recipe.md lists.

The installed timm also spares parameters without a dimension, and reads the models' `no_weight_decay()` as patterns.
"""

from collections import Counter
from collections.abc import Iterator

from fidelity.old_timm import models_of
from fidelity.rows import Row
from fidelity.zoo import as_known, differing

_OF_BOTH = {"dm_nfnet_f0", "nest_tiny", "xcit_nano_12_p16_224"}
# timm 0.5.4 decays relative_position_bias_table of these; the authors' models and the installed timm spare it.
_OF_TIMM = {"beit_base_patch16_224", "swin_small_patch4_window7_224", "swin_tiny_patch4_window7_224"}
KNOWN = {"timm 0.5.4": _OF_BOTH | _OF_TIMM, "the authors' models": _OF_BOTH}


def rows() -> Iterator[Row]:
    """All parameters of a hundred models."""
    count, found = differing(lambda ours, theirs: ours.decays != theirs.decays)
    shown = [f"{model} ({_kinds(names)})" for model, names in found.items()]
    yield as_known(
        f"groups of the parameters, {models_of()}",
        *(("build_optimizer", "create_optimizer_v2"), count, found.keys(), KNOWN, ", ".join(shown)),
    )


def _kinds(names: list[str]) -> str:
    kinds = Counter(name.partition("pos_embed")[1] or name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
