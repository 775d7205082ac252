"""`tiny_cnn`, a model whose update takes a few milliseconds: timm's smallest ones have four stages and take 25.

It is registered with timm wherever this module has been imported: in the tests, the fault injection and the forks of
`forked_python.py`, but not in a fresh interpreter that a test starts.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

_STAGES = tuple(ByoBlockCfg("edge", d=1, c=channels, s=2, gs=0, br=1.0) for channels in (16, 32))
_NETWORK = ByoModelCfg(blocks=_STAGES, stem_chs=16, stem_type="3x3", stem_pool="")
default_cfgs = generate_default_cfgs(  # timm looks for this name
    {
        "tiny_cnn.untrained": {
            "num_classes": 1000,
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 0.95,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        }
    }
)


@register_model
def tiny_cnn(pretrained: bool = False, **kwargs) -> ByobNet:
    """Two residual blocks of 16 and 32 channels behind a stem, all with BatchNorm."""
    return build_model_with_cfg(ByobNet, "tiny_cnn", pretrained, model_cfg=_NETWORK, **kwargs)
