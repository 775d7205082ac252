"""Turns an image folder into WebDataset shards with the index that training reads.

    python tools/shard_imagenet.py build SRC OUT

SRC/{train,val}/CLASS/*.{jpg,jpeg,JPEG,png} becomes OUT/{train,val}/*.tar and OUT/manifest.json; pipelines/index.py
describes the files. Classes are numbered in alphabetical order, training samples are shuffled by a seed. OUT appears
when it is complete: until then everything is written to OUT.partial.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import webdataset
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import rng
from pipelines.errors import UserError, exit_on_user_error
from pipelines.index import FORMAT_VERSION, INDEX, MANIFEST, sample_dtype, split_digest

SPLITS = ("train", "val")
EXTENSIONS = {".jpg", ".jpeg", ".png"}
_MARKER = ".shard_imagenet"  # lies in OUT.partial: what a killed conversion left, which may be replaced


@dataclasses.dataclass(frozen=True)
class Source:
    """One image to convert: its key in the shard, its class id, its file."""

    key: str
    label: int
    path: Path


@dataclasses.dataclass(frozen=True)
class Shard:
    """One written shard: its entry in the manifest, the rows of its samples, and the images it could not take."""

    entry: dict
    rows: list[tuple]  # offset, nbytes, label, height, width, key
    problems: list[str]


def build(src: Path, out: Path, *, seed: int, samples_per_shard: int, workers: int) -> dict:
    """Convert an image folder. Returns the manifest.

    Raises:
      UserError: there is nothing to convert, OUT is in use, or images cannot be read (all of them are named). OUT does
        not exist then.
    """
    if out.exists():
        raise UserError(f"{out}: exists already. Remove it, or choose another folder")
    classes = _classes(src)
    sources = {split: _sources(src / split, classes) for split in SPLITS if (src / split).is_dir()}
    partial = _new_partial(out)
    try:
        splits = {}
        for split, found in sources.items():
            if split == "train":
                order = rng.permute(seed, rng.Stream.SHARDS, 0, len(found), np.arange(len(found)))
                found = [found[i] for i in order]
            splits[split] = _write_split(partial / split, split, found, samples_per_shard, workers, len(classes))
    except BaseException:
        shutil.rmtree(partial)
        raise
    manifest = {
        "format_version": FORMAT_VERSION,
        "tool": "tools/shard_imagenet.py build",
        "source": {"kind": "folder", "name": src.resolve().name},
        "options": {"seed": seed, "samples_per_shard": samples_per_shard},
        "classes": classes,
        "splits": splits,
    }
    _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    (partial / _MARKER).unlink()
    partial.rename(out)
    return manifest


def _new_partial(out: Path) -> Path:
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        if not (partial / _MARKER).is_file():
            raise UserError(f"{partial}: exists and was not left by this tool. Remove it, or choose another folder")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / _MARKER).touch()
    return partial


def _classes(src: Path) -> list[str]:
    train = src / "train"
    if not train.is_dir():
        raise UserError(f"{train}: not found. Expected {src}/train/CLASS/*.jpg and, for validation, {src}/val/CLASS/*")
    classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
    if not classes:
        raise UserError(f"{train}: has no class folders. Expected {train}/CLASS/*.jpg")
    return classes


def _sources(folder: Path, classes: list[str]) -> list[Source]:
    """The images of one split, class by class, each class in alphabetical order."""
    unknown = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - set(classes))
    if unknown:
        raise UserError(f"{folder / unknown[0]}: a class without a training folder ({len(unknown)} such). Remove it")
    found: dict[str, Source] = {}
    for label, name in enumerate(classes):
        files = sorted(_images(folder / name))
        if not files:
            raise UserError(f"{folder / name}: no images (.jpg, .jpeg, .JPEG, .png). Add some, or remove the class")
        for path in files:
            # WebDataset splits a name into key and extension at its first dot
            key = f"{name}/{path.stem}".replace(".", "_")
            if key in found:
                raise UserError(f"{path} and {found[key].path.name} would both be sample {key}. Rename one")
            found[key] = Source(key, label, path)
    return list(found.values())


def _images(folder: Path) -> Iterable[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())


def _write_split(
    folder: Path, split: str, sources: list[Source], samples_per_shard: int, workers: int, num_classes: int
) -> dict:
    """Write the shards and the index of one split. Returns its entry in the manifest."""
    folder.mkdir()
    parts = [sources[i : i + samples_per_shard] for i in range(0, len(sources), samples_per_shard)]
    shards: list[Shard | None] = [None] * len(parts)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress, ProcessPoolExecutor(min(workers, len(parts))) as pool:
        bar = progress.add_task(f"{split}: images", total=len(sources))
        jobs = {
            pool.submit(write_shard, folder / f"{split}-{number:05d}.tar", part): number
            for number, part in enumerate(parts)
        }
        for job in as_completed(jobs):
            shards[jobs[job]] = job.result()
            progress.advance(bar, len(parts[jobs[job]]))
    problems = [problem for shard in shards for problem in shard.problems]
    if problems:
        raise UserError(f"{len(problems)} images cannot be read; repair or remove them: {'; '.join(problems)}")
    return _write_index(folder, shards, num_classes)


def _write_index(folder: Path, shards: list[Shard], num_classes: int) -> dict:
    rows = [(number, *row) for number, shard in enumerate(shards) for row in shard.rows]
    samples = np.array(rows, dtype=sample_dtype(max(len(row[-1]) for row in rows)))
    buffer = io.BytesIO()
    np.save(buffer, samples, allow_pickle=False)
    _write_synced(folder / INDEX, buffer.getvalue())
    index_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    return {
        "samples": len(samples),
        "class_counts": np.bincount(samples["label"], minlength=num_classes).tolist(),
        "index_sha256": index_sha256,
        "digest": split_digest(index_sha256, [shard.entry["sha256"] for shard in shards]),
        "shards": [shard.entry for shard in shards],
    }


def write_shard(path: Path, sources: list[Source]) -> Shard:
    """Write one tar and its DALI index, the same bytes on every machine. Images it cannot read become problems."""
    sizes, problems = {}, []
    with open(path, "wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for source in sources:
                try:
                    jpeg, height, width = to_jpeg(source.path.read_bytes())
                except (OSError, SyntaxError, ValueError) as error:
                    problems.append(f"{source.path} ({error})")
                    continue
                sizes[source.key] = (source.label, height, width)
                tar.write({"__key__": source.key, "cls": str(source.label).encode(), "jpg": jpeg})
        file.flush()
        os.fsync(file.fileno())
    members = _members(path)
    lines = [f"v1.2 {len(members)}"]
    lines += [
        " ".join(f"{ext} {start} {num} {key}.{ext}" for ext, (start, num) in m.items()) for key, m in members.items()
    ]
    _write_synced(path.with_suffix(".idx"), "\n".join(lines).encode() + b"\n")
    with open(path, "rb") as file:
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            sha256.update(block)
    entry = {"name": path.name, "bytes": path.stat().st_size, "samples": len(sizes), "sha256": sha256.hexdigest()}
    return Shard(entry, [(*members[key]["jpg"], *sizes[key], key.encode()) for key in sizes], problems)


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> extension -> (offset, bytes) of the data, as found in the finished tar."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.rpartition(".")
            members.setdefault(key, {})[extension] = (member.offset_data, member.size)
    return members


def to_jpeg(content: bytes) -> tuple[bytes, int, int]:
    """An image file's content as JPEG, with height and width in pixels. The image is decoded once, in full.

    RGB and grayscale JPEGs keep their bytes; everything else becomes an RGB JPEG of quality 95 without chroma
    subsampling.

    Raises:
      OSError, SyntaxError, ValueError: it is not an image that PIL can decode.
    """
    image = Image.open(io.BytesIO(content))
    image.load()
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling="4:4:4")
        content = buffer.getvalue()
    return content, image.height, image.width


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="convert an image folder")
    command.add_argument("src", type=Path, help="folder with train/CLASS/* and, if there is one, val/CLASS/*")
    command.add_argument("out", type=Path, help="dataset folder to make; must not exist")
    command.add_argument("--seed", type=int, default=0, help="of the order of the training samples (default 0)")
    command.add_argument("--samples-per-shard", type=_positive, default=5000, help="(default 5000: ImageNet, 550 MB)")
    command.add_argument("--workers", type=_positive, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        manifest = build(
            options.src,
            options.out,
            seed=options.seed,
            samples_per_shard=options.samples_per_shard,
            workers=options.workers,
        )
    counts = ", ".join(f"{entry['samples']:,} {split}" for split, entry in manifest["splits"].items())
    print(f"{options.out}: {counts} samples of {len(manifest['classes'])} classes")


if __name__ == "__main__":
    main()
