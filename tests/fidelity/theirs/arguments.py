"""The authors' command line: their defaults, for the factories of timm 0.5.4 that take them."""

import os
import types

# Source: the argument parser in train.py of Alibaba-MIIL/Solving_ImageNet; docs/recipe.md lists all of them. The
# oracle `defaults` reads them from the parser itself where a clone is given.
_DEFAULTS = {
    "opt": "adamw",
    "opt_eps": None,
    "opt_betas": None,
    "momentum": 0.9,
    "weight_decay": 2e-2,
    "sched": "cosine",
    "lr": 2e-3,
    "lr_noise": None,
    "lr_noise_pct": 0.67,
    "lr_noise_std": 1.0,
    "lr_cycle_mul": 1.0,
    "lr_cycle_decay": 0.5,
    "lr_cycle_limit": 1,
    "lr_k_decay": 1.0,
    "warmup_lr": 0.0001,
    "min_lr": 1e-6,
    "epochs": 300,
    "warmup_epochs": 5,
    "cooldown_epochs": 10,
    "scale": [0.08, 1.0],
    "ratio": [3 / 4, 4 / 3],
    "hflip": 0.5,
    "aa": "rand-m7-mstd0.5-inc1",
    "aug_repeats": 3,
    "drop": 0.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "smoothing": 0.0,
    "train_interpolation": "bicubic",
    "crop_pct": 0.95,
    "model_ema_decay": 0.99996,
    "alpha_kd": 5,
    "seed": 42,
}


def has_clone() -> bool:
    """Return whether the authors' own modules can be imported."""
    return bool(os.environ.get("AUTHORS"))


def defaults(**changed) -> types.SimpleNamespace:
    """The authors' arguments, some of them changed; from their own parser where a clone is given."""
    values = _DEFAULTS
    if has_clone():
        import train

        values = vars(train.parser.parse_args(["DIR"]))
    return types.SimpleNamespace(**{**values, **changed})


def mixing() -> dict:
    """The arguments of timm's Mixup and FastCollateMixup, without the number of classes."""
    args = defaults()
    return {
        "mixup_alpha": args.mixup,
        "cutmix_alpha": args.cutmix,
        "cutmix_minmax": args.cutmix_minmax,
        "prob": args.mixup_prob,
        "switch_prob": args.mixup_switch_prob,
        "mode": args.mixup_mode,
        "label_smoothing": args.smoothing,
    }
