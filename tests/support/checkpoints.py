"""Checkpoints as tests need them."""

import torch


def least_content(step: int, **more) -> dict:
    """The least that a run's checkpoint holds."""
    content = {
        "format_version": 1,
        "step": step,
        "config": {},
        "plan": {},
        "student": {"w": torch.zeros(2)},
        "ema": None,
    }
    return {**content, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}, **more}
