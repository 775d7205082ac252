"""Small sources of every kind for tests, and conversions of them."""

import csv
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from conftest import REPOSITORY
from pipelines.shards.index import read_index
from pipelines.shards.reader import ShardReader
from tools.lib.common.photos import photographs
from tools.lib.shards.build import BuildOptions, build
from tools.lib.shards.images import ImageOptions
from tools.lib.shards.sources import open_source
from tools.lib.shards.sources.source import EXPECTED, HIDDEN, MISPLACED, SourceOptions, Unused

TOOL = [sys.executable, str(REPOSITORY / "tools" / "shard_imagenet.py")]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(src: Path, out: Path, *, samples_per_shard=100, seed=0, audit=True, resize_short=0, **arguments) -> dict:
    image = ImageOptions(audit=audit, resize_short=resize_short)
    return build(src, out, BuildOptions(seed, samples_per_shard, image), **arguments)


def jpeg_of(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def samples_of(root: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """key -> JPEG and label."""
    index = read_index(root, split)
    jpegs = ShardReader(index).read(np.arange(len(index)))
    rows = zip(index.samples, jpegs, strict=True)
    return {row["key"].decode(): (jpeg.tobytes(), int(row["label"])) for row, jpeg in rows}


def make_mixed_folder(src: Path) -> Path:
    """Two classes with a PNG, a grayscale JPEG, an upper-case suffix and a name with a dot."""
    images = [image for _, image, _ in photographs()]
    for i, name in enumerate(("a.JPEG", "b.jpg", "c.jpeg", "d.png", "e.v2.jpg", "f g.jpg")):
        path = src / "train" / ("cat", "dog")[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        images[i].save(path, None if path.suffix == ".png" else "JPEG")
    (src / "train" / "cat" / ".DS_Store").write_text("not an image")
    return src


WNIDS = ["n01440764", "n01443537", "n01484850"]
# the devkit's own numbers are not in the order of the WordNet ids
DEVKIT_NUMBERS = {1: "n01484850", 2: "n01440764", 3: "n01443537"}
GROUND_TRUTH = [3, 1, 2, 1]


def imagenet_images() -> tuple[dict[str, dict[str, bytes]], dict[str, bytes]]:
    """Small stand-ins under ImageNet's names: training by class, validation by file."""
    photos = [image for _, image, _ in photographs()]
    train = {
        wnid: {f"{wnid}_{k}.JPEG": jpeg_of(photos[3 * c + k].resize((60 + k, 40 + c))) for k in range(3)}
        for c, wnid in enumerate(WNIDS)
    }
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg_of(photos[i].resize((50, 70 + i))) for i in range(4)}
    return train, val


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_ilsvrc(root: Path) -> None:
    from scipy.io import savemat

    train, val = imagenet_images()
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, content in reversed(train[wnid].items()):
                    add(inner, name, content)
            add(outer, f"{wnid}.tar", buffer.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, content in reversed(val.items()):
            add(tar, name, content)
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros(4, dtype=[(name, object) for name in (*fields, "num_train_images")])
    for row, (number, wnid) in enumerate(DEVKIT_NUMBERS.items()):
        synsets[row] = (number, wnid, f"words of {wnid}", "gloss", 0, np.zeros(0), 0, 3)
    synsets[3] = (4, "n00001740", "entity", "inner node", 2, np.array([1, 2]), 5, 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in GROUND_TRUTH).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)


def write_as_folder(root: Path) -> None:
    train, val = imagenet_images()
    labelled = zip(val.items(), GROUND_TRUTH, strict=True)
    files = {f"train/{wnid}/{name}": content for wnid in train for name, content in train[wnid].items()}
    files |= {f"val/{DEVKIT_NUMBERS[number]}/{name}": content for (name, content), number in labelled}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_kaggle(root: Path) -> None:
    train, val = imagenet_images()
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    files = {f"train/{wnid}/{name}": content for wnid in train for name, content in train[wnid].items()}
    files |= {f"val/{name}": content for name, content in val.items()}
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageId", "PredictionString"])
        for name, number in reversed(list(zip(val, GROUND_TRUTH, strict=True))):
            writer.writerow([Path(name).stem, f"{DEVKIT_NUMBERS[number]} 1 2 3 4 {DEVKIT_NUMBERS[number]} 5 6 7 8 "])
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} words of {wnid}\n" for wnid in WNIDS))


def write_images(folder: Path, files: dict[str, tuple[bytes, str]], class_id: str = "cat") -> None:
    for name, (content, _) in files.items():
        path = folder / "train" / class_id / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


CLASSES = ("ant", "bee", "cat")


def plain_jpeg(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (colour % 256, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def put_images(folder: Path, *names: str) -> None:
    """Write an image under each name; a name that ends in / is an empty folder."""
    for number, name in enumerate(names):
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain_jpeg(number))


def make_folder(root: Path, classes=CLASSES, splits=("train", "val")) -> Path:
    put_images(root, *(f"{split}/{name}/{i}.jpg" for split in splits for name in classes for i in range(2)))
    return root


def samples_and_unused(root: Path, **options) -> tuple[list, dict[str, list[Unused]]]:
    """Samples of all splits, and what is not used by its kind."""
    source = open_source(root, SourceOptions(**options), root / "none")
    found = [each for split in source.splits.values() for each in split()]
    unused = {kind: [each for each in found if isinstance(each, Unused) and each.kind == kind] for kind in KINDS}
    return [each for each in found if not isinstance(each, Unused)], unused


KINDS = (HIDDEN, EXPECTED, MISPLACED)
