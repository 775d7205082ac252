"""Where images come from: image folders, ImageNet as it is distributed, Kaggle's copy, Hugging Face parquet files.

A source lists its samples once, in an order that depends on nothing but the data, and reads any of them by the location
that the listing holds. Listing never holds more than one class (or one file) in memory.
"""

import csv
import dataclasses
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError
from pipelines.files import replacing
from tools.sharding.tars import tar_files

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sample of a listing.

    Attributes:
      key: its name in the dataset, CLASS/STEM, without dots (WebDataset ends a key at the first).
      label: class number.
      location: where `Source.read` finds it.
      source: how people are told which one it is.
    """

    key: str
    label: int
    location: str
    source: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A recognised source.

    Attributes:
      kind: one of KINDS.
      root: what the user named.
      classes: ids of the classes in the order of their numbers.
      class_names: for people, as many; empty where the source has none.
      splits: for each split a function that lists its samples.
      read: location -> the file's bytes.
      files: what identifies the source besides its kind: relative path and bytes of each container file.
      copies: whether listing copies the images first, so that it is not repeated to see whether the source has changed.
    """

    kind: str
    root: Path
    classes: list[str]
    class_names: list[str]
    splits: dict[str, Callable[[], Iterator[Entry]]]
    read: Callable[[str], bytes]
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    copies: bool = False


def open_source(root: Path, kind: str, scratch: Path) -> Source:
    """Recognise a source ('auto'), or take it for what it is said to be.

    Args:
      scratch: folder for copies, where a kind needs them to read single images.
    Raises:
      UserError: it is none of the kinds, or lacks a part; the message says what was expected.
    """
    if not root.exists():
        raise UserError(f"{root}: not found. {_EXPECTED}")
    if kind == "auto":
        kind = next((name for name, (looks_like, _) in KINDS.items() if looks_like(root)), "")
        if not kind:
            raise UserError(f"{root}: not recognised as a source. {_EXPECTED}")
    return KINDS[kind][1](root, scratch)


def sample_key(class_id: str, stem: str) -> str:
    """The key of a sample, without the dots and spaces that tar, WebDataset and DALI's .idx files cannot have."""
    return re.sub(r"[.\s]", "_", f"{class_id}/{stem}")


# --- image folders ---


def _folder(root: Path, scratch: Path) -> Source:
    train = root / "train"
    if not train.is_dir():
        raise UserError(
            f"{train}: not found. Expected {root}/train/CLASS/*.jpg and, for validation, {root}/val/CLASS/*"
        )
    classes = _class_folders(train)
    if not classes:
        raise UserError(f"{train}: has no class folders. Expected {train}/CLASS/*.jpg")
    for entry in os.scandir(root):
        if entry.is_dir() and entry.name != "val" and entry.name.lower() in ("val", "valid", "validation"):
            raise UserError(f"{entry.path}: the validation images belong in {root / 'val'}. Rename it")
    splits = {
        split: lambda split=split: _list_folder(root, split, classes) for split in SPLITS if (root / split).is_dir()
    }
    return Source("folder", root, classes, [], splits, lambda location: (root / location).read_bytes())


def _class_folders(folder: Path) -> list[str]:
    """The classes in alphabetical order.

    Raises:
      UserError: two of them would have samples of the same names.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    by_key: dict[str, str] = {}
    for name in names:
        if (key := sample_key(name, "")) in by_key:
            raise UserError(f"{folder / name} and {by_key[key]} would both be class {key}. Rename one")
        by_key[key] = name
    return names


def _list_folder(root: Path, split: str, classes: list[str]) -> Iterator[Entry]:
    folder = root / split
    loose = [entry.name for entry in os.scandir(folder) if _is_image(entry.name)]
    if loose:
        raise UserError(
            f"{folder}: {len(loose)} images lie directly in it ({min(loose)}). Sort them into class folders, or "
            f"convert ImageNet from its own files ({VAL_TAR} and {DEVKIT})"
        )
    unknown = sorted(set(_class_folders(folder)) - set(classes))
    if unknown:
        raise UserError(f"{folder / unknown[0]}: a class without a training folder ({len(unknown)} such). Remove it")
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        yield from _list_class(root, folder / name, name, label)


def _list_class(root: Path, folder: Path, class_id: str, label: int) -> Iterator[Entry]:
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    files = sorted(entry.name for entry in entries if not entry.is_dir())
    nested = sorted(entry.name for entry in entries if entry.is_dir())
    if nested:
        raise UserError(f"{folder / nested[0]}: a folder inside a class. Move its images up, or remove it")
    if not any(map(_is_image, files)):
        raise UserError(f"{folder}: no images ({', '.join(EXTENSIONS)}). Add some, or remove the class")
    by_key: dict[str, str] = {}
    for file in files:
        # what does not look like an image is looked at as well, and refused with its name
        key = sample_key(class_id, Path(file).stem if _is_image(file) else file)
        if key in by_key:
            raise UserError(f"{folder / file} and {by_key[key]} would both be sample {key}. Rename one")
        by_key[key] = file
        location = str((folder / file).relative_to(root))
        if not location.isprintable():
            raise UserError(f"{location!r}: a name that is not printable UTF-8. Rename it")
        yield Entry(key, label, location, location)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


# --- ImageNet as distributed: tars in a tar, and a devkit ---

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def _ilsvrc(root: Path, scratch: Path) -> Source:
    for name in (TRAIN_TAR, DEVKIT):
        if not (root / name).is_file():
            raise UserError(f"{root / name}: not found. Expected {TRAIN_TAR}, {DEVKIT} and, for validation, {VAL_TAR}")
    synsets, ground_truth = _read_devkit(root / DEVKIT)
    # Classes are numbered by WordNet id, as everybody does; the devkit's own numbers are others.
    classes = sorted(wnid for wnid, _ in synsets.values())
    names = {wnid: words for wnid, words in synsets.values()}
    splits = {"train": lambda: _list_train_tar(root / TRAIN_TAR, classes)}
    if (root / VAL_TAR).is_file():
        labels = {i + 1: classes.index(synsets[number][0]) for i, number in enumerate(ground_truth)}
        splits["val"] = lambda: _list_val_tar(root / VAL_TAR, classes, labels)
    files = {name: (root / name).stat().st_size for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if (root / name).is_file()}
    return Source("ilsvrc", root, classes, [names[wnid] for wnid in classes], splits, _slice_reader(root), files)


def _read_devkit(path: Path) -> tuple[dict[int, tuple[str, str]], list[int]]:
    """The devkit's numbers -> (wnid, words) of the classes, and the number of each validation image in order."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path}: reading meta.mat needs scipy: pip install scipy") from error
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = {Path(member.name).name: member for member in tar if member.isfile()}
            meta = io.BytesIO(tar.extractfile(members["meta.mat"]).read())
            truth = tar.extractfile(members["ILSVRC2012_validation_ground_truth.txt"]).read().decode()
        rows = loadmat(meta, squeeze_me=True)["synsets"]
        synsets = {
            int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"]))
            for row in rows
            if int(row["num_children"]) == 0  # the others are inner nodes of the hierarchy
        }
        return synsets, [int(line) for line in truth.split()]
    except (KeyError, ValueError, OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path}: not the ILSVRC2012 devkit, or damaged ({error}). Download it again") from error


def _list_train_tar(path: Path, classes: list[str]) -> Iterator[Entry]:
    """The images in the class tars in the tar, located by their bytes in the outer file: nothing is unpacked."""
    numbers = {wnid: label for label, wnid in enumerate(classes)}
    with open(path, "rb") as file:
        class_tars = {Path(m.name).stem: m for m in tar_files(path, file) if m.name.endswith(".tar")}
        if different := sorted(set(class_tars) ^ set(numbers)):
            where = "the devkit" if different[0] in class_tars else "the tar"
            raise UserError(f"{path}: class {different[0]} is not in {where} ({len(different)} such). Restore both")
        for wnid in sorted(class_tars):
            start = class_tars[wnid].offset_data
            inner = _Part(file, start, class_tars[wnid].size)
            name = path / class_tars[wnid].name
            members = sorted((m.name, m.offset_data, m.size) for m in tar_files(name, inner) if _is_image(m.name))
            for name, offset, size in members:
                location = f"{path.name}\n{start + offset}\n{size}"
                yield Entry(sample_key(wnid, Path(name).stem), numbers[wnid], location, f"{path.name}: {name}")


class _Part(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size < 0 else min(size, left))
        self._position += len(content)
        return content

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _list_val_tar(path: Path, classes: list[str], labels: dict[int, int]) -> Iterator[Entry]:
    with open(path, "rb") as file:
        members = sorted((Path(m.name).name, m.offset_data, m.size) for m in tar_files(path, file) if _is_image(m.name))
    if len(members) != len(labels):
        raise UserError(f"{path}: {len(members)} images, the devkit labels {len(labels)}. Download it again")
    for name, offset, size in members:
        number = re.search(r"(\d+)\.\w+$", name)
        label = labels.get(int(number[1])) if number else None
        if label is None:
            raise UserError(f"{path}: {name} has no line in the devkit's ground truth. Download both again")
        location = f"{path.name}\n{offset}\n{size}"
        yield Entry(sample_key(classes[label], Path(name).stem), label, location, f"{path.name}: {name}")


def _slice_reader(root: Path) -> Callable[[str], bytes]:
    """Reads 'file\\noffset\\nbytes' locations; files stay open."""
    opened: dict[str, int] = {}

    def read(location: str) -> bytes:
        name, offset, size = location.split("\n")
        if name not in opened:
            opened[name] = os.open(root / name, os.O_RDONLY)
        content = os.pread(opened[name], int(size), int(offset))
        if len(content) != int(size):
            raise OSError(f"{root / name} ends at byte {int(offset) + len(content)}")
        return content

    return read


# --- Kaggle's copy of ImageNet ---

_KAGGLE_DATA = Path("ILSVRC/Data/CLS-LOC")


def _kaggle(root: Path, scratch: Path) -> Source:
    train, solution = root / _KAGGLE_DATA / "train", root / "LOC_val_solution.csv"
    if not train.is_dir():
        raise UserError(f"{train}: not found. Expected the layout of Kaggle's imagenet-object-localization-challenge")
    classes = _class_folders(train)
    numbers = {wnid: label for label, wnid in enumerate(classes)}
    splits = {"train": lambda: _list_kaggle_train(root, train, classes)}
    if (root / _KAGGLE_DATA / "val").is_dir():
        if not solution.is_file():
            raise UserError(f"{solution}: not found; it holds the validation labels. Put it there, or remove val/")
        splits["val"] = lambda: _list_kaggle_val(root, solution, numbers)
    mapping = root / "LOC_synset_mapping.txt"
    lines = mapping.read_text().splitlines() if mapping.is_file() else []
    words = dict(line.split(" ", 1) for line in lines if " " in line)
    names = [words.get(wnid, wnid) for wnid in classes] if words else []
    return Source("kaggle", root, classes, names, splits, lambda location: (root / location).read_bytes())


def _list_kaggle_train(root: Path, train: Path, classes: list[str]) -> Iterator[Entry]:
    for label, wnid in enumerate(classes):
        yield from _list_class(root, train / wnid, wnid, label)


def _list_kaggle_val(root: Path, solution: Path, numbers: dict[str, int]) -> Iterator[Entry]:
    with open(solution, newline="") as file:
        rows = sorted((row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file))
    images = {Path(entry.name).stem for entry in os.scandir(root / _KAGGLE_DATA / "val")}
    if different := sorted(images ^ {image for image, _ in rows}):
        where = "the folder" if different[0] not in images else "the file"
        raise UserError(f"{solution}: {different[0]} is not in {where} ({len(different)} such). Restore both")
    for image, wnid in rows:
        if wnid not in numbers:
            raise UserError(f"{solution}: {image} is of class {wnid}, which has no training folder")
        location = str(_KAGGLE_DATA / "val" / f"{image}.JPEG")
        yield Entry(sample_key(wnid, image), numbers[wnid], location, location)


# --- Hugging Face parquet files ---

_PARQUET_SPLITS = {"train": ("train",), "val": ("validation", "val")}


def _parquet(root: Path, scratch: Path) -> Source:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{root}: reading parquet needs pyarrow: pip install pyarrow") from error
    found = {
        split: sorted(path for path in root.rglob("*.parquet") if path.name.startswith(prefixes))
        for split, prefixes in _PARQUET_SPLITS.items()
    }
    if not found["train"]:
        raise UserError(f"{root}: no train-*.parquet below it. Expected train-*.parquet and validation-*.parquet")
    schema = parquet.read_schema(found["train"][0])
    if not {"image", "label"} <= set(schema.names):
        raise UserError(
            f"{found['train'][0]}: columns {', '.join(schema.names)}. Expected image (with bytes) and label"
        )
    names = _parquet_class_names(schema)
    if not names:
        top = max(max(parquet.read_table(path, columns=["label"])["label"].to_pylist()) for path in found["train"])
        names = [str(label) for label in range(top + 1)]
    splits = {
        split: lambda split=split, paths=paths: _list_parquet(root, paths, scratch, split, names)
        for split, paths in found.items()
        if paths
    }
    files = {str(path.relative_to(root)): path.stat().st_size for paths in found.values() for path in paths}
    return Source("parquet", root, names, [], splits, _slice_reader(scratch), files, copies=True)


def _parquet_class_names(schema) -> list[str]:
    """The class names that Hugging Face's datasets library stores in the schema; [] where there are none."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _list_parquet(root: Path, paths: list[Path], scratch: Path, split: str, names: list[str]) -> Iterator[Entry]:
    """Copy the images of each file one after the other into a scratch file, where any of them can be read alone.

    Parquet compresses rows in groups: reading single images in a shuffled order would read each group over and over.
    """
    import pyarrow.parquet as parquet

    (scratch / split).mkdir(parents=True, exist_ok=True)
    row = 0
    for number, path in enumerate(paths):
        copy = f"{split}/{number:05d}.bin"
        with replacing(scratch / copy) as file:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64, columns=["image", "label"]):
                for item in batch.to_pylist():
                    content, label = (item["image"] or {}).get("bytes") or b"", item["label"]
                    if label is None or not 0 <= label < len(names):
                        raise UserError(f"{path}: row {row} has label {label}; there are {len(names)} classes")
                    location, source = f"{copy}\n{file.tell()}\n{len(content)}", f"{path.relative_to(root)}: row {row}"
                    yield Entry(sample_key(names[label], f"{row:09d}"), label, location, source)
                    file.write(content)
                    row += 1


def _has_parquet(root: Path) -> bool:
    return any(next(folder.glob("*.parquet"), None) is not None for folder in (root, root / "data"))


# kind -> (does a folder look like it, open it); the first that fits is taken
KINDS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Path], Source]]] = {
    "ilsvrc": (lambda root: (root / TRAIN_TAR).is_file(), _ilsvrc),
    "kaggle": (lambda root: (root / _KAGGLE_DATA).is_dir(), _kaggle),
    "folder": (lambda root: (root / "train").is_dir() and not _has_parquet(root / "train"), _folder),
    "parquet": (lambda root: _has_parquet(root) or _has_parquet(root / "train"), _parquet),
}
_EXPECTED = (
    f"Expected a folder with train/CLASS/*.jpg; or {TRAIN_TAR}, {VAL_TAR} and {DEVKIT}; or Kaggle's "
    f"{_KAGGLE_DATA}; or Hugging Face's train-*.parquet"
)
