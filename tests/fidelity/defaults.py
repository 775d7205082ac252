"""The authors' defaults in docs/recipe.md equal those that the oracles use, and with AUTHORS those of their parser."""

import ast
from collections.abc import Iterator

from fidelity.old_timm import authors, theirs
from fidelity.rows import Row
from support.authors_defaults import table

_NOT_PARSED = {"config", "data_dir"}  # a parser of its own, and the one argument without a default


def rows() -> Iterator[Row]:
    """All options."""
    documented = {row.name.replace("-", "_"): row.value for row in table() if row.name not in _NOT_PARSED}
    found = theirs("defaults")
    values = dict(zip(found["names"].tolist(), map(ast.literal_eval, found["values"].tolist()), strict=True))
    values.pop("data_dir", None)
    off = [f"{name} is {value!r}" for name, value in values.items() if documented.get(name, ...) != value]
    missing = sorted(set(documented) - set(values)) if authors() else []
    off += [f"{name} is no option" for name in missing]
    names = "docs/recipe.md", "train.py's parser" if authors() else "the oracles' arguments"
    yield Row("defaults", *names, len(values), f"{len(off)} differ", "equal", not off, "; ".join(off))
