"""A conversion until it is finished: which one it is, where it lies, and which of its shards are done.

Until it is finished, everything lies in OUT.partial; a shard is complete when its record is there. At the end the
records become the index and the manifest, and OUT.partial is renamed to OUT. Every step may be repeated. Where an empty
OUT is there already, such as a mount point or the present folder, OUT/.partial takes the place of OUT.partial, and its
files are moved up, the manifest last.

    OUT.partial/job.json              what is being converted, and how; a command that differs is refused
    OUT.partial/listing/SPLIT.jsonl   the samples; SPLIT.starts: where each line starts; SPLIT.json: number and hash;
                                      SPLIT.unused.jsonl: what of the source is no sample
    OUT.partial/records/SPLIT/*.json  one for each finished shard
    OUT.partial/SPLIT/*.tar, *.idx    the shards
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.common.errors import UserError, clipped, system_error_text
from pipelines.common.files import locked, write_synced
from pipelines.shards.manifest import FORMAT_VERSION, MANIFEST, Manifest, class_order, manifest_bytes, read_manifest
from tools.lib.shards.images import ImageOptions
from tools.lib.shards.listing import digest_of, listed
from tools.lib.shards.manifest_builder import VERSION, Description, SourceDescription
from tools.lib.shards.sources import Source
from tools.lib.shards.sources.contents import contents_of

JOB = "job.json"


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How a source is converted. The same options and source give the same bytes.

    Attributes:
      seed: decides the order of the training samples.
      samples_per_shard: the last shard of a split may have fewer.
      image: what is done to each image.
    """

    seed: int = 0
    samples_per_shard: int = 5000
    image: ImageOptions = dataclasses.field(default_factory=ImageOptions)

    def __post_init__(self):
        if not 0 <= self.seed < 1 << 64 or self.samples_per_shard < 1:
            raise UserError(f"seed {self.seed}, samples_per_shard {self.samples_per_shard}: out of range")


class Job(Description):
    """The content of job.json. All of it but `splits` becomes part of the manifest."""

    splits: list[str]


class Shard(NamedTuple):
    """One shard of a split, by its number."""

    split: str
    number: int

    @property
    def name(self) -> str:
        """Its file name without an extension."""
        return f"{self.split}-{self.number:05d}"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """An unfinished conversion.

    Attributes:
      out: the dataset folder that it becomes.
      partial: the folder in which it lies until then.
      job: what is being converted, and how.
    """

    out: Path
    partial: Path
    job: Job

    @property
    def is_assembled(self) -> bool:
        """Return whether its manifest is there, so that only its final name is missing."""
        return (self.partial / MANIFEST).is_file()

    def shards(self, split: str) -> list[Shard]:
        """All shards of a split that has been listed."""
        count = -(-listed(self.partial, split)["samples"] // self.job["options"]["samples_per_shard"])
        return [Shard(split, number) for number in range(count)]

    def is_done(self, shard: Shard) -> bool:
        """Return whether a shard is complete."""
        return (self.partial / "records" / shard.split / f"{shard.name}.json").is_file()


def describe(source: Source, options: BuildOptions) -> Job:
    """Describe the conversion of a source."""
    described = SourceDescription(kind=source.kind, name=source.root.resolve().name, files=source.files)
    if source.columns:
        described["columns"] = source.columns
    image = dataclasses.asdict(options.image)
    return {
        "format_version": FORMAT_VERSION,
        "made_with": {"tool": VERSION, "pillow": version("pillow"), "webdataset": version("webdataset")},
        "source": described,
        "options": {"seed": options.seed, "samples_per_shard": options.samples_per_shard, **image},
        "classes": source.classes,
        "class_names": source.class_names,
        "class_order": source.class_order,
        "splits": list(source.splits),
    }


def partial_folder(out: Path) -> Path:
    """The folder in which a conversion lies until it is finished."""
    beside = out.parent / f"{out.name}.partial"
    return out / ".partial" if out.is_dir() and not beside.is_dir() else beside


def claim(conversion: Conversion) -> None:
    """Make OUT.partial the folder of this conversion, or make sure that it already is."""
    partial, path = conversion.partial, conversion.partial / JOB
    if not path.is_file() and not conversion.is_assembled:
        _check_free(partial, conversion.out)
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / ".lock-claim", "", wait=True):
            if not path.is_file():  # The first of several machines writes the description.
                write_synced(path, json.dumps(conversion.job).encode())
    if different := _difference(read_job(partial), conversion.job, conversion.job):
        raise UserError(
            f"{partial}: holds an unfinished conversion that is another one: {different}. Finish that one, "
            "move the folder away, or choose another"
        )


def _check_free(partial: Path, out: Path) -> None:
    """Raise a UserError if OUT or OUT.partial is there and holds somebody's files."""
    if out.exists() and (not out.is_dir() or contents_of(out).visible):
        raise UserError(f"{out}: exists already and is not a dataset. Choose a folder that is empty or not there")
    names = contents_of(partial).visible if partial.is_dir() else []
    # Another machine may have written its description since this one has looked for it.
    if JOB not in names and any(not name.endswith(".partial") for name in names):
        raise UserError(f"{partial}: exists and was not left by this tool. Move it away, or choose another folder")


def read_job(partial: Path) -> Job:
    """Read what an unfinished conversion converts; its manifest says so as well."""
    path = partial / (MANIFEST if (partial / MANIFEST).is_file() else JOB)
    try:
        job = json.loads(path.read_text())
        job["splits"] = list(job["splits"])
        return job
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: damaged, or not of this tool, so {partial} cannot be finished. Move that folder away"
        ) from error


def finished(out: Path) -> Manifest:
    """The manifest of a conversion that an earlier command has finished."""
    with contextlib.suppress(OSError):  # A process that was killed when it had moved all files up has left it, empty.
        (out / ".partial").rmdir()
    return read_manifest(out)


def check_same(conversion: Conversion, source: Source) -> Manifest:
    """The manifest in OUT, if it is of this conversion; a new statement about the order of the classes goes into it.

    Raises:
      UserError: the dataset in OUT was made from another source or with other options; the difference is named.
    """
    out, manifest = conversion.out, finished(conversion.out)
    order, stated = class_order(manifest), source.class_order
    is_restated = (order, stated) in (("unstated", "text"), ("text", "unstated"))  # The order is the same in both.
    there = {**manifest, "splits": list(manifest["splits"]), "class_order": stated if is_restated else order}
    different = _difference(there, conversion.job, conversion.job)
    if not different and not source.copies:
        for split, entry in manifest["splits"].items():
            if digest_of(source.splits[split]()) != entry.get("listing_sha256"):
                different = f"the source's {split} images are others by now"
    if different:
        raise UserError(f"{out}: exists already, made differently: {different}. Move it away, or choose another folder")
    if is_restated and stated == "text":
        write_synced(out / MANIFEST, manifest_bytes({**manifest, "class_order": "text"}))
    return read_manifest(out)


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Name the first of some keys in which two descriptions differ; return "" where they agree."""
    for key in keys:
        one, other = there.get(key), wanted.get(key)
        if one != other and isinstance(one, dict) and isinstance(other, dict):
            return _difference(one, other, [*one, *other])
        if one != other:
            return f"{key} was {clipped(one)}, now it is {clipped(other)}"
    return ""


@contextlib.contextmanager
def reporting_disk_errors(place: Path, more: str = "") -> Iterator[None]:
    """Turn errors of disks that are full, read-only or failing into one line, wherever they happen.

    Args:
      place: named where the error names no file itself, as errors of writing do.
      more: added to the line.
    """
    try:
        yield
    except OSError as error:
        where = "" if error.filename else f"{place}: "
        raise UserError(f"{where}{system_error_text(error)}{more}") from error
