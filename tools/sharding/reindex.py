"""An existing WebDataset, indexed where it lies: its tars are read and never written."""

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError
from pipelines.files import sha256_of, write_synced
from pipelines.index import FORMAT_VERSION, MANIFEST, read_manifest
from tools.sharding.images import CheckedImage, ImageOptions, RejectedImageError, check_image
from tools.sharding.job import assemble
from tools.sharding.shards import ShardRecord, dali_index, read_record, source_hash, tar_members, write_record

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
_SPLITS = {"train": ("train",), "val": ("val", "validation")}


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
    found = {split: _shards(root, folders) for split, folders in _SPLITS.items()}
    found = {split: shards for split, shards in found.items() if shards}
    if "train" not in found:
        raise UserError(f"{root}: no train/*.tar below it. Expected WebDataset tars (jpg, cls) in train/ and val/")
    records = root / ".index.partial"
    jobs = [
        (path, records / split / f"{path.stem}.json", ImageOptions(audit=audit))
        for split, paths in found.items()
        for path in paths
    ]
    for split in found:
        (records / split).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(_read_shard, *zip(*jobs, strict=True))):
            on_shard(done + 1, len(jobs))
    rejected = [item for _, path, _ in jobs for item in read_record(path).notes["rejected"]]
    if rejected and not skip_bad:
        named = "; ".join(f"{item['source']}: {item['sample']} ({item['reason']})" for item in rejected)
        raise UserError(f"{len(rejected)} samples cannot be used: {named}. Leave them out with --on-bad skip")
    top = max((row["label"] for _, path, _ in jobs for row in read_record(path).rows), default=-1)
    description = {
        "format_version": FORMAT_VERSION,
        "source": {"kind": "webdataset", "name": root.resolve().name, "files": {}},
        "options": {"audit": audit},
        "classes": [str(label) for label in range(top + 1)],
        "class_names": [],
    }
    assemble(root, records, description, {split: [path.stem for path in paths] for split, paths in found.items()})
    shutil.rmtree(records)
    return read_manifest(root)


def _shards(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return next((shards for folder in folders if (shards := sorted((root / folder).glob("*.tar")))), [])


def _read_shard(path: Path, record: Path, options: ImageOptions) -> None:
    """Record what a tar holds; misfits are rejected, since they cannot be repaired without rewriting it."""
    found = ShardRecord({}, [], {"repaired": [], "rejected": [], "tiny": [], "resized": 0})
    hashes = []
    members = tar_members(path)
    with open(path, "rb") as file:
        for key, parts in members.items():
            try:
                label, offset, image = _read_sample(file, parts, options)
            except RejectedImageError as error:
                found.reject(key, path.name, error)
                continue
            found.add(key, label, offset, image)
            hashes.append(source_hash(image.jpeg))
    write_synced(path.with_suffix(".idx"), dali_index(members))
    sha256 = sha256_of(path)
    found.entry = {"name": path.name, "bytes": path.stat().st_size, "samples": len(found.rows), "sha256": sha256}
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
