"""The authors' side of one oracle: `python tests/fidelity/theirs NAME GIVEN.npz RETURNED.npz`.

The caller puts timm 0.5.4, and a clone of the authors' repository if there is one, in front of the installed packages.
Modules here import nothing of this repository.
"""

import importlib
import sys

import numpy as np
import timm
import torch


def main(name: str, given: str, returned: str) -> None:
    """Call `run(arrays)` of a module and keep what it returns."""
    assert timm.__version__ == "0.5.4", f"timm {timm.__version__} from {timm.__file__} is not the authors'"
    torch.set_num_threads(1)
    # The authors wait for their GPU after every update. PyTorch without one has nothing to wait for, and raises.
    torch.cuda.synchronize = lambda: None
    with np.load(given, allow_pickle=False) as arrays:
        result = importlib.import_module(name).run(dict(arrays))
    np.savez(returned, **result)


main(*sys.argv[1:])
