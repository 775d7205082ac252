"""An existing WebDataset, indexed where it lies: its tars are read and never written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError
from pipelines.files import sha256_of, write_synced
from pipelines.index import FORMAT_VERSION, MANIFEST, manifest_bytes, read_manifest
from tools.sharding.entries import SPLITS
from tools.sharding.images import CheckedImage, ImageOptions, RejectedImageError, check_image
from tools.sharding.job import VERSION, assemble
from tools.sharding.shards import ShardRecord, dali_index, read_record, source_hash, write_record
from tools.sharding.tars import tar_members
from tools.sharding.workers import run_jobs

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


def index_webdataset(
    root: Path,
    *,
    audit: bool = True,
    skip_bad: bool = False,
    workers: int = 1,
    on_shard: Callable[[int, int], None] = lambda i, n: None,
) -> dict:
    """Write index, .idx files and manifest beside the tars of ROOT/{train,val}/*.tar.

    Images keep their bytes, so one that no pipeline can use is left out of the index, never repaired.

    Returns:
      The manifest.
    Raises:
      UserError: there are no tars, ROOT is indexed already, or samples cannot be used (all of them are named).
    """
    if (root / MANIFEST).exists():
        raise UserError(f"{root / MANIFEST}: exists already. Remove it to index the folder again")
    found = {split: sorted((root / split).glob("*.tar")) for split in SPLITS}
    found = {split: paths for split, paths in found.items() if paths}
    if "train" not in found:
        raise UserError(f"{root}: no train/*.tar below it. Expected WebDataset tars (jpg, cls) in train/ and val/")
    for split in found:
        names = sorted(path.name for path in (root / split).iterdir() if not path.name.startswith("."))
        if others := [name for name in names if not name.endswith((".tar", ".idx", ".npy"))]:
            raise UserError(
                f"{root / split / others[0]}: not an uncompressed tar ({len(others)} such). Unpack or remove it: "
                "nothing is left out unnoticed"
            )
    records = root / ".index.partial"
    shutil.rmtree(records, ignore_errors=True)
    for split in found:
        (records / split).mkdir(parents=True)
    try:
        jobs = [
            (path, records / split / f"{path.stem}.json", ImageOptions(audit=audit))
            for split, paths in found.items()
            for path in paths
        ]
        for done, _ in enumerate(run_jobs(_read_shard, jobs, workers)):
            on_shard(done + 1, len(jobs))
        description = _describe(root, [path for _, path, _ in jobs], audit, skip_bad)
        shards = {split: [path.stem for path in paths] for split, paths in found.items()}
        manifest = assemble(root, records, description, shards)
    finally:
        shutil.rmtree(records)
    write_synced(root / MANIFEST, manifest_bytes(manifest))
    return read_manifest(root)


def _describe(root: Path, records: list[Path], audit: bool, skip_bad: bool) -> dict:
    """What the manifest says of the dataset as a whole.

    Raises:
      UserError: samples cannot be used and `skip_bad` is off, or the class numbers make no sense.
    """
    rejected, samples, top = [], 0, -1
    for record in map(read_record, records):
        rejected += record.notes["rejected"]
        samples += len(record.rows)
        top = max([top, *(row["label"] for row in record.rows)])
    if rejected and not skip_bad:
        named = "; ".join(f"{item['source']}: {item['sample']} ({item['reason']})" for item in rejected)
        raise UserError(f"{len(rejected)} samples cannot be used: {named}. Leave them out with --on-bad skip")
    if top >= max(1000, 100 * samples):
        raise UserError(f"{root}: class numbers up to {top} for {samples} samples. Look at the cls files")
    return {
        "format_version": FORMAT_VERSION,
        "made_with": {"tool": VERSION},
        "source": {"kind": "webdataset", "name": root.resolve().name, "files": {}},
        "options": {"audit": audit},
        "classes": [str(label) for label in range(top + 1)],
        "class_names": [],
    }


def _read_shard(path: Path, record: Path, options: ImageOptions) -> None:
    """Record what a tar holds; misfits are rejected, since they cannot be repaired without rewriting it."""
    found = ShardRecord()
    hashes = []
    members = tar_members(path)
    with open(path, "rb") as file:
        for key, parts in members.items():
            try:
                label, offset, image = _read_sample(file, parts, options)
            except RejectedImageError as error:
                found.reject(key, f"{path.parent.name}/{path.name}", error)
                continue
            found.add(key, label, offset, image)
            hashes.append(source_hash(image.jpeg))
    idx, idx_path = dali_index(members), path.with_suffix(".idx")
    if idx_path.exists() and idx_path.read_bytes().split() != idx.split():
        raise UserError(f"{idx_path}: describes another tar. Remove it to have it written")
    write_synced(idx_path, idx)
    found.describe(path.name, path.stat().st_size, sha256_of(path), idx)
    write_record(record, found, hashes)


def _read_sample(
    file: BinaryIO, parts: dict[str, tuple[int, int]], options: ImageOptions
) -> tuple[int, int, CheckedImage]:
    """The class number, the image's offset and the image of one sample.

    Raises:
      RejectedImageError: it has no image or no class number, or the image cannot be used as it is.
    """
    extension = next((extension for extension in IMAGE_EXTENSIONS if extension in parts), None)
    if extension is None or "cls" not in parts:
        raise RejectedImageError(f"has {', '.join(parts)}; expected jpg and cls")
    offset, _ = parts[extension]
    content, label = (_slice(file, *parts[name]) for name in (extension, "cls"))
    try:
        number = int(label)
    except ValueError as error:
        raise RejectedImageError(f"its cls is {label[:20]!r}, not a class number") from error
    if number < 0:
        raise RejectedImageError(f"its cls is {number}, which is negative")
    image = check_image(content, options)
    if image.repaired:
        raise RejectedImageError(f"{image.repaired}; convert the images with 'build' to repair it")
    return number, offset, image


def _slice(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    file.seek(offset)
    return file.read(nbytes)
