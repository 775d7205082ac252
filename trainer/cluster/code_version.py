"""Which code a run uses: the hashes of its source files, and the versions of the packages that give its numbers."""

import functools
import hashlib
from pathlib import Path

from pipelines import PIXELS_VERSION
from pipelines.common.machine import package_versions

_REPOSITORY = Path(__file__).resolve().parents[2]
_FOLDERS = ("pipelines", "trainer")


@functools.cache
def source_hashes() -> dict[str, str]:
    """The path of every source file that a run uses -> the first 12 hex digits of its sha256."""
    sources = sorted(path for folder in _FOLDERS for path in (_REPOSITORY / folder).rglob("*.py"))
    return {path.relative_to(_REPOSITORY).as_posix(): _short_hash(path.read_bytes()) for path in sources}


def source_hash() -> str:
    """One hash over all source files, their names included."""
    return _short_hash("".join(f"{name} {content}\n" for name, content in source_hashes().items()).encode())


def code_version() -> dict[str, str | None]:
    """The hashes of all source files and the versions of packages, under names for messages."""
    return {
        **{f"source file {name}": content for name, content in source_hashes().items()},
        **{f"version of {package}": version for package, version in package_versions().items()},
    }


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def software() -> dict[str, str]:
    """What pixels and gradients depend on in their last bits."""
    return {"pipelines": str(PIXELS_VERSION), **package_versions()}
