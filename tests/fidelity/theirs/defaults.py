"""The authors' arguments: those that the oracles take, or all of their parser where a clone is given."""

import arguments
import numpy as np


def run(given: dict) -> dict:
    """Return names and values, str [n]; a value is the text of a Python literal."""
    values = vars(arguments.defaults())
    return {"names": np.array(list(values)), "values": np.array([repr(value) for value in values.values()])}
