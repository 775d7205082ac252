"""Parquet files and Kaggle's lists that are not as Hugging Face or Kaggle write them, given to `build`."""

import io
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from chaos.attempts import Attempt, isolated
from chaos.conversions import jpeg, shard
from pipelines.shards.manifest import read_manifest
from tools.lib.shards.sources.kaggle import KAGGLE_DATA, KAGGLE_SOLUTION

PROMISE = (
    "Parquet files have unusual types, labels, codecs and layouts, or damaged bytes; Kaggle's download has unusual or "
    "damaged lists. `build` uses or names every row, errors are one line, and OUT is complete or absent."
)
_NUM = 6
_IMAGES = [jpeg(i) for i in range(_NUM)]
_STRUCTS = [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(_IMAGES)]


# --- parquet files: each function returns a file's bytes, and how many rows it has, None where that is not known ---


def written(images=_IMAGES, labels=(0, 1, 2, 0, 1, 2), names: object = None, **options) -> bytes:
    """A parquet file of two columns; `names` is what the schema's metadata calls the classes."""
    made = pa.table([images, list(labels) if isinstance(labels, tuple) else labels], names=["image", "label"])
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(features)})
    return _stored(made, **options)


def _stored(table: pa.Table, **options) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


_LABELS = [
    *([0, 1, None, 0, 1, 2], [None] * 6, [0.0, 1.0, 2.0, 0.0, 1.0, 2.0], [float("nan")] * 6, [True, False] * 3),
    *([0, 1, 2, 0, 1, -1], [0, 1, 2, 0, 1, 1 << 62], [0, 1, 2, 0, 1, 999], [0, 1, 2, 0, 1, 1_000_000], [5] * 6),
    *([[0]] * 6, [{"a": 1}] * 6, [b"a"] * 6, ["a", "b", "c", "a", "b", ""], ["a\0b", "a", "a\0c", "a", "b", "b"]),
    *(["../../x", "/etc", "a\nb", "a b", "a.b", "a_b"], ["\u00e9", "e\u0301", "\u202e", "x" * 5000, "~", "-rf"]),
    *([pa.scalar(1, pa.uint64())] * 6, pa.array([0, 1, 2, 0, 1, 2], pa.int8()), pa.array([2**64 - 1] * 6, pa.uint64())),
    *(pa.array(["a", "b", "c"] * 2).dictionary_encode(), pa.array([0, 1, 2] * 2).dictionary_encode()),
    *(pa.array(["a", "b"] * 3, pa.large_string()), pa.array(["a", "b"] * 3, pa.string_view()), pa.nulls(6)),
    *(
        pa.array([0, 1] * 3, pa.timestamp("s")),
        pa.array([0, 1] * 3, pa.date32()),
        pa.array([1, 2] * 3, pa.decimal128(5)),
    ),
]
_OTHER_IMAGES = [
    *(_STRUCTS, pa.array(_IMAGES, pa.large_binary()), pa.array(_IMAGES, pa.binary_view()), [None, *_IMAGES[1:]]),
    *([b"", *_IMAGES[1:]], ["text"] * 6, [1] * 6, [[image] for image in _IMAGES], [{"path": "a.jpg"}] * 6),
    *([{"bytes": None, "path": "a.jpg"}, *_STRUCTS[1:]], [None, *_STRUCTS[1:]], pa.nulls(6), [b"no image"] * 6),
    *(pa.array(_IMAGES).dictionary_encode(), [{"bytes": None, "path": None}, *_STRUCTS[1:]], [b"\0" * 90] * 6),
    pa.array([b"12345678"] * 6, pa.binary(8)),
]
_NAMES = [["a", "b", "c"], ["a", "b"], ["a", "a", "a"], [], {}, "abc", 3, [1, 2, 3], [None, None, None]]
_NAMES += [["../a", "/b", "c\0"], ["a", "b", "x" * 3000], [["a"], ["b"], ["c"]], ["a/b", "a", "b/c"]]
_CODECS = ["none", "snappy", "gzip", "brotli", "lz4", "zstd"]


def labels(chance: random.Random) -> bytes:
    """labels of every kind"""
    return written(labels=chance.choice(_LABELS))


def images(chance: random.Random) -> bytes:
    """images of every kind"""
    return written(chance.choice(_OTHER_IMAGES))


def class_names(chance: random.Random) -> bytes:
    """class names of every kind"""
    return written(names=chance.choice(_NAMES))


def storage(chance: random.Random) -> bytes:
    """codecs, pages, row groups and encodings"""
    options = {"compression": chance.choice(_CODECS), "data_page_version": chance.choice(["1.0", "2.0"])}
    options |= {"row_group_size": chance.choice([1, 2, 6]), "use_dictionary": chance.random() < 0.5}
    options |= {"write_page_checksum": chance.random() < 0.5, "version": chance.choice(["1.0", "2.4", "2.6"])}
    return written(chance.choice([_IMAGES, _STRUCTS]), **options)


def shape(chance: random.Random) -> bytes:
    """no rows, no row groups, other columns, the same column twice"""
    made = pa.table([_IMAGES, [0, 1, 2] * 2], names=["image", "label"])
    empty = io.BytesIO()
    parquet.ParquetWriter(empty, made.schema).close()
    other = made.rename_columns(chance.choice([["img", "label"], ["image", "target"], ["a", "b"], ["image", "image"]]))
    return chance.choice(
        [
            *(_stored(made.slice(0, 0)), empty.getvalue(), _stored(other), _stored(made.select(["image"]))),
            *(_stored(made.append_column("label", made["label"])), _stored(made.append_column("n", pa.nulls(6)))),
            _stored(pa.table([pa.StructArray.from_arrays([made["image"].chunk(0)], ["image"])], names=["row"])),
            *(b"", b"PAR1", b"PAR1PAR1", b"PARE" + written()[4:-4] + b"PARE", b"<html>404</html>", bytes(5000)),
        ]
    )


def bytes_changed(chance: random.Random) -> bytes:
    """bytes changed, zeroed, removed or truncated"""
    whole = bytearray(written(compression=chance.choice(_CODECS), row_group_size=chance.choice([2, 6])))
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    place = len(whole) - 1 - chance.randrange(footer) if chance.random() < 0.6 else chance.randrange(len(whole))
    kind = chance.choice(["flip", "zero", "cut", "lose"])
    if kind == "flip":
        whole[place] ^= chance.randrange(1, 256)
    elif kind == "zero":
        whole[place : place + 16] = bytes(min(16, len(whole) - place))
    elif kind == "cut":
        del whole[place:]
    else:
        del whole[place : place + chance.choice([1, 8, 100])]
    return bytes(whole)


# --- Kaggle's download ---

_WNIDS = ["n01440764", "n01443537"]
_HEADER = "ImageId,PredictionString\n"


def _line(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d},{_WNIDS[number % 2]} 1 2 3 4\n"


def solution(chance: random.Random) -> bytes:
    """Kaggle's list of the validation classes"""
    lines = [_HEADER, *map(_line, range(2))]
    odd = [
        *([], lines[1:], lines[:-1], [*lines, lines[-1]], [*lines, _line(0).replace(_WNIDS[0], _WNIDS[1])], lines * 2),
        *(
            [*lines, "\0\n"],
            [*lines, '"'],
            [lines[0], '"' * 9, *lines[1:]],
            [*lines, "x" * 200_000],
            ["\ufeff", *lines],
        ),
        *([*lines, "\n\n"], [line.replace(",", ";") for line in lines], [line.replace("n0", "m0") for line in lines]),
        *([_HEADER.lower(), *lines[1:]], [*lines, "../../x,n01440764 1\n"], [*lines, ",\n"], [*lines, "a\n"]),
        *([line.replace("\n", "\r") for line in lines], [line.replace("\n", "\r\n") for line in lines]),
        [line.replace(" 1 2 3 4", "") for line in lines],
    ]
    content = "".join(chance.choice(odd)).encode(chance.choice(["utf-8", "utf-8", "utf-16"]))
    if chance.random() < 0.3:
        content = bytearray(content or b"x")
        content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    return bytes(content)


def mapping(chance: random.Random) -> bytes:
    """Kaggle's class names"""
    return chance.choice(
        [
            *(b"", b"\xff\xfe", b"\0" * 50, b"n01440764\n", b"n01440764 \n", b" n01440764 tench\n", b"x" * 100_000),
            *(b"n01440764 tench\nn01440764 other\n", b"n01440764\ttench\n", "n01440764 \u202e\x1b[2J\n".encode()),
        ]
    )


def _write_kaggle(root: Path, name: str, content: bytes) -> None:
    for number in range(_NUM):
        path = root / KAGGLE_DATA / "train" / _WNIDS[number % 2] / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    (root / KAGGLE_DATA / "val").mkdir()
    for number in range(2):
        (root / KAGGLE_DATA / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(jpeg(90 + number))
    (root / KAGGLE_SOLUTION).write_text(_HEADER + _line(0) + _line(1))
    (root / name).write_bytes(content)


# --- attempts ---

FAULTS: tuple[tuple[Callable[[random.Random], bytes], str], ...] = (
    *((kind, "train-0.parquet") for kind in (labels, images, class_names, storage, shape, bytes_changed)),
    *((solution, KAGGLE_SOLUTION), (mapping, "LOC_synset_mapping.txt")),
    *((kind, "train-1.parquet") for kind in (labels, bytes_changed)),
    *((kind, "validation-0.parquet") for kind in (labels, bytes_changed)),
)


def _write(root: Path, name: str, content: bytes) -> None:
    """A source in which one file is odd."""
    if not name.endswith(".parquet"):
        return _write_kaggle(root, name, content)
    root.mkdir()
    (root / "train-0.parquet").write_bytes(written())
    (root / name).write_bytes(content)


def _num_rows(root: Path) -> int | None:
    """How many images a source has; None where that cannot be seen."""
    if (root / "ILSVRC").is_dir():
        return _NUM + 2
    try:
        return sum(parquet.ParquetFile(path).metadata.num_rows for path in root.glob("*.parquet"))
    except (pa.ArrowException, OSError, ValueError):
        return None


def _fell(source: Path, out: Path) -> str:
    command = ("build", source, out, "--workers", 1)
    ended = isolated(shard(*command), mib=1024)
    if complaint := ended.complaint():
        return complaint
    if ended.code:
        again = isolated(shard(*command), mib=1024)
        if again.last_line != ended.last_line:
            return f"says something else the second time: {again.last_line[:200]}"
        return "left OUT behind an error" if out.exists() else ""
    splits = read_manifest(out)["splits"]
    if (source / KAGGLE_SOLUTION).exists() and splits["val"]["class_counts"] != [1, 1]:
        return "gives a validation image a class that a line contradicts"
    used = sum(entry["samples"] for entry in splits.values())
    if _num_rows(source) not in (used, None):
        return f"uses {used} of {_num_rows(source)} images and says nothing"
    return isolated(shard("verify", out, "--decode", "--workers", 1), mib=1024).complaint()


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Convert one odd source after the other."""
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        kind, name = FAULTS[number % len(FAULTS)]
        source, out = folder / f"{number}", folder / f"{number}-out"
        _write(source, name, kind(chance))
        fell = _fell(source, out)
        for path in (source, out, out.with_name(f"{out.name}.partial")):
            shutil.rmtree(path, ignore_errors=True)
        yield Attempt(kind.__doc__, f"seed {seed}, attempt {number}, {name}: {fell}" if fell else "")
