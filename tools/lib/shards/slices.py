"""Images that are ranges of larger files."""

import os
from collections.abc import Callable
from pathlib import Path

from tools.lib.shards.images import MAX_BYTES, RejectedImageError


def slice_reader(root: Path) -> Callable[[str], bytes]:
    """Read locations written as 'file\\noffset\\nbytes', relative to `root`; the files stay open.

    Raises, when it reads:
      RejectedImageError: a range is larger than any image; it is not read into memory.
    """
    opened: dict[str, int] = {}

    def read(location: str) -> bytes:
        name, offset, size = location.split("\n")
        if int(size) > MAX_BYTES:
            raise RejectedImageError(f"{int(size):,} bytes; no image has more than {MAX_BYTES:,}")
        if name not in opened:
            opened[name] = os.open(root / name, os.O_RDONLY)
        content = os.pread(opened[name], int(size), int(offset))
        if len(content) != int(size):
            raise OSError(f"{root / name} ends at byte {int(offset) + len(content)}")
        return content

    return read
