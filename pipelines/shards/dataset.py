"""A dataset folder with its splits, as a notebook opens it."""

import dataclasses
import functools
from pathlib import Path

from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.manifest import Manifest, read_manifest


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset folder. A split is read, and checked against its manifest, when it is first used.

    Attributes:
      root: the folder.
      manifest: what it holds, with a hash of each file.
    """

    root: Path
    manifest: Manifest

    @property
    def classes(self) -> list[str]:
        """The ids of the classes in the order of their labels."""
        return self.manifest["classes"]

    @functools.cached_property
    def train(self) -> ShardIndex:
        """The training split. Raises a UserError as `read_index`."""
        return read_index(self.root, "train")

    @functools.cached_property
    def val(self) -> ShardIndex | None:
        """The validation split; None where the dataset has none. Raises a UserError as `read_index`."""
        return read_index(self.root, "val") if "val" in self.manifest["splits"] else None


def open_dataset(root: Path | str) -> Dataset:
    """Open a dataset folder.

    Raises:
      UserError: it has no manifest, or one that is damaged or of another format version.
    """
    return Dataset(Path(root), read_manifest(root))
