"""ImageNet as it is distributed: class tars in a tar, a tar of validation images, and a devkit with their labels."""

import functools
import io
import re
import tarfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from pipelines.common.errors import UserError, clipped, named
from pipelines.common.files import is_hidden
from tools.lib.shards.sources.contents import EXTENSIONS, beside_source
from tools.lib.shards.sources.source import (
    HIDDEN,
    MISPLACED,
    Entry,
    Source,
    SourceOptions,
    Unused,
    read_slice,
    sample_key,
    slice_location,
)
from tools.lib.shards.sources.tars import tar_files

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_MAX_DEVKIT_FILE = 64 << 20  # The largest file that is read has 0.5 MB.
# These files usually lie beside them. They are for other tasks or the test, or a cache of torchvision.
_OTHERS = ("ILSVRC2012_img_test*.tar", "ILSVRC2012_*_t3.tar*", "ILSVRC2012_bbox_*", "meta.bin", "MD5SUMS", "*.md5")


def open_ilsvrc(root: Path, options: SourceOptions, scratch: Path) -> Source:
    """The tars as image-net.org distributes them, read where they lie."""
    for name in (TRAIN_TAR, DEVKIT):
        if not (root / name).is_file():
            raise UserError(f"{root / name}: not found. Expected {TRAIN_TAR}, {DEVKIT} and, for validation, {VAL_TAR}")
    synsets, ground_truth = _read_devkit(root / DEVKIT)
    # Classes are numbered by WordNet id, as every model of ImageNet expects; the devkit's own numbers are others.
    classes = sorted(wnid for wnid, _ in synsets.values())
    names = {wnid: words for wnid, words in synsets.values()}
    splits = {"train": lambda: _list_train(root, options, classes)}
    if (root / VAL_TAR).is_file():
        numbers = {wnid: label for label, wnid in enumerate(classes)}
        if strangers := sorted({*ground_truth} - {*synsets}):
            raise UserError(f"{root / DEVKIT}: labels of no class: {named(strangers)}. Download it again")
        labels = {i + 1: numbers[synsets[number][0]] for i, number in enumerate(ground_truth)}
        splits["val"] = lambda: _list_val_tar(root / VAL_TAR, classes, labels)
    read = functools.partial(read_slice, root)
    files = {name: (root / name).stat().st_size for name in (TRAIN_TAR, VAL_TAR, DEVKIT) if (root / name).is_file()}
    return Source("ilsvrc", root, classes, [names[wnid] for wnid in classes], splits, read, files)


def _read_devkit(path: Path) -> tuple[dict[int, tuple[str, str]], list[int]]:
    """The devkit's numbers -> (wnid, words) of the classes, and the number of each validation image in order."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path}: reading meta.mat needs scipy: pip install scipy") from error
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = {Path(member.name).name: member for member in tar if member.isfile()}
            meta = io.BytesIO(_content(tar, members["meta.mat"]))
            truth = _content(tar, members["ILSVRC2012_validation_ground_truth.txt"]).decode()
        rows = loadmat(meta, squeeze_me=True)["synsets"]
        synsets = {
            int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"]))
            for row in rows
            if int(row["num_children"]) == 0  # The others are inner nodes of the hierarchy.
        }
        return synsets, [int(line) for line in truth.split()]
    except Exception as error:  # tarfile, zlib and scipy raise errors of nearly any type about damaged files.
        raise UserError(
            f"{path}: not the ILSVRC2012 devkit, or damaged ({clipped(repr(error), 100)}). Download it again"
        ) from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _MAX_DEVKIT_FILE:  # Compressed zeros would fill the memory.
        raise ValueError(f"{member.name} has {member.size:,} bytes")
    with tar.extractfile(member) or io.BytesIO() as file:  # It is None for folders alone.
        return file.read()


def _list_train(root: Path, options: SourceOptions, classes: list[str]) -> Iterator[Entry | Unused]:
    """The images in the class tars in the tar, located by their bytes in the outer file: nothing is unpacked."""
    yield from beside_source(root, options, (TRAIN_TAR, VAL_TAR, DEVKIT), _OTHERS)
    path, numbers = root / TRAIN_TAR, {wnid: label for label, wnid in enumerate(classes)}
    with open(path, "rb") as file:
        class_tars = yield from _by_stem(path, tar_files(path, file), ".tar")
        if different := sorted(set(class_tars) ^ set(numbers)):
            where = "the devkit" if different[0] in class_tars else "the tar"
            raise UserError(f"{path}: class {different[0]} is not in {where} ({len(different)} such). Restore both")
        for wnid, tar in sorted(class_tars.items()):
            inner = path / tar.name
            members = yield from _by_stem(inner, tar_files(inner, file, tar.offset_data, tar.size), EXTENSIONS)
            for member in sorted(members.values(), key=lambda member: (member.name, member.offset_data)):
                location = slice_location(path.name, tar.offset_data + member.offset_data, member.size)
                source = f"{path.name}: {member.name}"
                yield Entry(sample_key(wnid, Path(member.name).stem), numbers[wnid], location, source)


def _by_stem(
    path: Path, members: Iterable[tarfile.TarInfo], suffixes: str | tuple[str, ...]
) -> Generator[Unused, None, dict[str, tarfile.TarInfo]]:
    """Returns the files of a tar that have one of the suffixes, by their stems, and yields all others."""
    found: dict[str, tarfile.TarInfo] = {}
    for member in members:
        name = f"{path.name}: {member.name}"
        if is_hidden(member.name):
            yield Unused(HIDDEN, name)
        elif not member.name.lower().endswith(suffixes):
            yield Unused(MISPLACED, name, "neither an image nor a tar of a class: download the tar again")
        elif (first := found.setdefault(sample_key("", Path(member.name).stem)[1:], member)) is not member:
            yield Unused(MISPLACED, name, f"has the name of {first.name}: download the tar again")
    return found


def _list_val_tar(path: Path, classes: list[str], labels: dict[int, int]) -> Iterator[Entry | Unused]:
    with open(path, "rb") as file:
        found = yield from _by_stem(path, tar_files(path, file), EXTENSIONS)
    members = sorted((Path(member.name).name, member.offset_data, member.size) for member in found.values())
    if len(members) != len(labels):
        raise UserError(f"{path}: {len(members)} images, the devkit labels {len(labels)}. Download it again")
    for name, offset, size in members:
        number = re.search(r"(\d+)\.\w+$", name)
        label = labels.get(int(number[1])) if number else None
        if label is None:
            raise UserError(f"{path}: {name} has no line in the devkit's ground truth. Download both again")
        location = slice_location(path.name, offset, size)
        yield Entry(sample_key(classes[label], Path(name).stem), label, location, f"{path.name}: {name}")
