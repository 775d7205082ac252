"""Everything at any depth of a folder, with each link followed once on a path."""

import os
from collections.abc import Iterator
from pathlib import Path

from tools.lib.shards.entries import HIDDEN, MISPLACED, Unused, contents_of, printable


def walk(root: Path, folder: str = "", above: frozenset[str] = frozenset()) -> Iterator[str | Unused]:
    """Visible files at any depth, as paths relative to `root` sorted by their parts; everything else is an Unused.

    A link to a folder that it lies in is an Unused, too, whether it leads there at once or through other links.

    Args:
      folder: where to begin, relative to `root`.
      above: resolved paths of the folders that lead to it.
    Raises:
      UserError: a folder cannot be listed.
    """
    real = os.path.realpath(root / folder)
    if real in above:
        yield Unused(MISPLACED, printable(folder), "a link to a folder above it: remove the link")
        return
    inside = contents_of(root / folder)
    for name in inside.hidden:
        yield Unused(HIDDEN, printable(os.path.join(folder, name)))
    folders = set(inside.folders)
    for name in inside.visible:
        path = os.path.join(folder, name)
        if name in folders:
            yield from walk(root, path, above | {real})
        elif reason := inside.others.get(name):
            yield Unused(MISPLACED, printable(path), reason)
        else:
            yield path
