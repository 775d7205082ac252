"""Tars whose headers and bytes are not as a writer leaves them, given to every command that reads tars."""

import dataclasses
import functools
import io
import itertools
import json
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.io import savemat

from chaos.attempts import Attempt, Ended, isolated
from chaos.conversions import jpeg, shard, tree
from pipelines.shards.index import read_index
from tools.lib.predict.image_files import items_of

PROMISE = (
    "Tars have damaged, forged, missing and added headers, are truncated or have holes. `index`, `verify`, `build` "
    "(inside ImageNet's own tar) and the listing of `predict` read them. Every image is used or named, errors are one "
    "line, memory and time stay bounded, and no half-written files are left."
)
BLOCK = 512
CLASS = "n01440764"
_NUM = 6
_HOLE = 600 << 20  # more than any image has, and more than the commands may take


@dataclasses.dataclass(frozen=True)
class Spoiled:
    """A tar after a fault.

    Attributes:
      content: its bytes; those from `hole_at` on stand `hole` bytes of zeros later.
      hidden: images that the changed headers may have made part of something else, or that are now called otherwise.
    """

    content: bytes
    hole_at: int = 0
    hole: int = 0
    hidden: int = 0

    def __len__(self) -> int:
        return len(self.content) + self.hole

    def write(self, path: Path, around: tuple[bytes, bytes] = (b"", b"")) -> None:
        """Write it to a file, with something before and behind it."""
        with open(path, "wb") as file:
            file.write(around[0] + self.content[: self.hole_at])
            file.seek(self.hole, io.SEEK_CUR)
            file.write(self.content[self.hole_at :] + around[1])
            file.truncate(len(self) + sum(map(len, around)))


def tar_of(members: dict[str, bytes]) -> bytes:
    """A sound tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def headers(tar: bytes) -> list[tarfile.TarInfo]:
    """The members of a sound tar."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return file.getmembers()


# --- faults ---


def flip(tar: bytes, chance: random.Random) -> Spoiled:
    """a byte changed"""
    place = chance.randrange(len(tar))
    return Spoiled(tar[:place] + bytes([tar[place] ^ chance.randrange(1, 256)]) + tar[place + 1 :])


def zero(tar: bytes, chance: random.Random) -> Spoiled:
    """blocks zeroed"""
    start = chance.randrange(len(tar) // BLOCK) * BLOCK
    stop = min(len(tar), start + BLOCK * chance.choice([1, 2, 5, 1000]))
    to_the_end = not tar[stop:].strip(b"\0")  # A loss there cannot be seen: docs/field.md.
    return Spoiled(tar[:start] + bytes(stop - start) + tar[stop:], hidden=_NUM * to_the_end)


def cut(tar: bytes, chance: random.Random) -> Spoiled:
    """truncated"""
    end = headers(tar)[-1].offset_data
    return Spoiled(tar[: chance.choice([chance.randrange(end), chance.randrange(end) // BLOCK * BLOCK])])


def drop(tar: bytes, chance: random.Random) -> Spoiled:
    """blocks removed from its middle"""
    member = chance.choice(headers(tar))
    start, stop = sorted((member.offset, member.offset + BLOCK * chance.randrange(1, 4)))
    return Spoiled(tar[:start] + tar[stop:], hidden=2)


def double(tar: bytes, chance: random.Random) -> Spoiled:
    """a part of it repeated"""
    start = chance.choice(headers(tar)).offset
    stop = chance.choice([len(tar), start + BLOCK * chance.randrange(1, 6)])
    return Spoiled(tar[:stop] + tar[start:stop] + tar[stop:])


_SIZES = [
    *(b"77777777777\0", b"00000000000\0", b"00000000001\0", b"            ", b"-0000001000\0", b"0000000zz00\0"),
    *(b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\x80" + b"\x7f" * 11, b"\x80" + bytes(10) + b"\x01", bytes(12)),
    *(b"%011o\0" % size for size in (511, 512, 1024, 5000, 12 << 30 & 0o77777777777)),
]
_TYPES = [bytes([kind]) for kind in b"0123456789LKxgXSDVMNA\0 Z\xff"]
_FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "type": (156, 157), "link": (157, 257)}
_FIELDS |= {"magic": (257, 265), "prefix": (345, 500), "isextended": (482, 483), "realsize": (483, 495)}


def forge(tar: bytes, chance: random.Random) -> Spoiled:
    """a field of a header forged"""
    member = chance.choice(headers(tar))
    field = chance.choice(list(_FIELDS))
    start, stop = _FIELDS[field]
    choices = {"size": _SIZES, "type": _TYPES}.get(field, [chance.randbytes(stop - start), bytes(stop - start)])
    value = chance.choice([*choices, chance.choice(choices)])
    hidden = {"name": 1, "prefix": 1, "type": 3, "magic": 1, "size": _NUM}.get(field, 0)
    return Spoiled(_with(tar, member.offset, start, value[: stop - start]), hidden=hidden)


def resize(tar: bytes, chance: random.Random) -> Spoiled:
    """the size of a member forged"""
    member = chance.choice(headers(tar))
    value = chance.choice(_SIZES)
    found = _with(tar, member.offset, *_FIELDS["size"][:1], value)
    with_size = found[member.offset : member.offset + BLOCK]
    try:
        size = tarfile.TarInfo.frombuf(with_size, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        size = 0
    return Spoiled(found, hidden=_swallowed(tar, member.offset_data, size))


def pax(tar: bytes, chance: random.Random) -> Spoiled:
    """PAX records put before a member"""
    member = chance.choice(headers(tar))
    key = chance.choice(["size", "path", "linkpath", "mtime", "hdrcharset", "GNU.sparse.size", "GNU.sparse.map"])
    key = chance.choice([key, "size", "GNU.sparse.major", "GNU.sparse.numblocks", "GNU.sparse.realsize"])
    numbers = ["-512", "-1", "0", "1", "99999999999999999999", "12884901888", "1e9", "nan", "", "x" * 2000, "0,-5,1"]
    value = chance.choice([*numbers, "../../escape.jpg", "\0", "\u00e9" * 90])
    record = f" {key}={value}\n".encode(errors="surrogateescape")
    length = len(record) + chance.choice([2, 3, 3, 3, 0, 10**9])
    record = f"{length}".encode() + record
    return _inserted(tar, member, chance.choice(b"xxg"), record, chance.choice([None, None, *_SIZES]))


def long_name(tar: bytes, chance: random.Random) -> Spoiled:
    """GNU long names put before a member, some nested"""
    member = chance.choice(headers(tar))
    name = chance.choice([b"a/" * 60 + b"b.jpg\0", b"\0", b"", b"x" * 5000, b"../" * 50 + b"c.jpg\0"])
    spoiled = _inserted(tar, member, chance.choice(b"LLK"), name, chance.choice([None, None, *_SIZES]))
    nested = chance.choice([0, 0, 3, 3000])
    block = _header(chance.choice(b"LK"), 0)
    content = spoiled.content[: member.offset] + block * nested + spoiled.content[member.offset :]
    return dataclasses.replace(spoiled, content=content)


def hole(tar: bytes, chance: random.Random) -> Spoiled:
    """a sparse hole in it, or as a header's content"""
    if chance.random() < 0.3:
        return Spoiled(tar, len(tar) if chance.random() < 0.5 else chance.choice(headers(tar)).offset, _HOLE)
    member = chance.choice(headers(tar))
    found = _with(tar, member.offset, 124, b"%011o\0" % (member.size + _HOLE))
    return Spoiled(
        _with(found, member.offset, 156, chance.choice([b"0", b"0", b"L", b"x", b"g"])),
        member.offset_data,
        _HOLE,
        hidden=2,
    )


FAULTS = (flip, zero, cut, drop, double, forge, resize, pax, long_name, hole)


def _with(tar: bytes, offset: int, start: int, value: bytes) -> bytes:
    """A tar in which bytes of a header are others, and its checksum is right."""
    header = bytearray(tar[offset : offset + BLOCK])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:offset] + bytes(header) + tar[offset + BLOCK :]


def _header(kind: int, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = bytes([kind]), size
    return info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:]


def _inserted(tar: bytes, member: tarfile.TarInfo, kind: int, content: bytes, size: bytes | None) -> Spoiled:
    header = _header(kind, len(content))
    header = header if size is None else _with(header, 0, 124, size)
    padded = content + bytes(-len(content) % BLOCK)
    hidden = _NUM if size or kind == ord("g") else 2
    return Spoiled(tar[: member.offset] + header + padded + tar[member.offset :], hidden=hidden)


def _swallowed(tar: bytes, start: int, size: int) -> int:
    """How many images have a header in the `size` bytes from `start` on."""
    stop = start + size + -size % BLOCK
    return len({stem(member.name) for member in headers(tar) if start <= member.offset < stop})


def stem(name: str) -> str:
    """The key of a sample."""
    return name.partition(".")[0]


# --- commands ---


def _index(folder: Path, spoiled: Spoiled) -> tuple[Ended, str]:
    """index"""
    (folder / "train").mkdir(parents=True)
    spoiled.write(folder / "train" / "a.tar")
    ended = isolated(shard("index", folder, "--workers", 1), mib=512)
    if ended.code:
        left = [name for name in tree_names(folder) if name not in ("train", "train/a.tar")]
        return ended, f"left {left} behind an error" if left else ""
    used = len(read_index(folder, "train"))
    return ended, "" if used >= _NUM - spoiled.hidden else f"uses {used} of {_NUM} images and says nothing"


def tree_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _verify(folder: Path, spoiled: Spoiled) -> tuple[Ended, str]:
    """verify"""
    sound = folder.with_name("sound")
    if not sound.exists():
        (sound / "train").mkdir(parents=True)
        (sound / "train" / "a.tar").write_bytes(SOUND)
        assert isolated(shard("index", sound, "--workers", 1)).code == 0
    path = shutil.copytree(sound, folder) / "train" / "a.tar"
    spoiled.write(path)
    before = None if spoiled.hole else tree(folder)
    ended = isolated(shard("verify", folder, "--workers", 1), mib=512)
    changed = bool(spoiled.hole) or path.read_bytes() != SOUND
    if changed != bool(ended.code):
        return ended, "does not see the change" if changed else "sees a change where none is"
    return ended, "" if before is None or tree(folder) == before else "has changed the dataset"


def _predict(folder: Path, spoiled: Spoiled) -> tuple[Ended, str]:
    """the listing of predict"""
    folder.mkdir()
    spoiled.write(folder / "a.tar")

    def listing() -> None:
        found = list(items_of(folder / "a.tar"))
        print(json.dumps([sum(not item.error for item in found), sum(bool(item.error) for item in found)]))

    ended = isolated(listing, mib=512)
    if ended.code:
        return ended, "raises"
    images, errors = json.loads(ended.last_line)
    complete = errors or images >= _NUM - spoiled.hidden
    return ended, "" if complete else f"lists {images} of {_NUM} images and no error"


def _build(folder: Path, spoiled: Spoiled) -> tuple[Ended, str]:
    """build"""
    source = folder / "source"
    source.mkdir(parents=True)
    info = tarfile.TarInfo(f"{CLASS}.tar")
    info.size = len(spoiled)
    end = bytes(-len(spoiled) % BLOCK + 2 * BLOCK)
    spoiled.write(source / "ILSVRC2012_img_train.tar", (info.tobuf(), end))
    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    ended = isolated(shard("build", source, folder / "out", "--workers", 1), mib=512)
    if ended.code:
        return ended, "left OUT behind an error" if (folder / "out").exists() else ""
    used = len(read_index(folder / "out", "train"))
    return ended, "" if used >= _NUM - spoiled.hidden else f"uses {used} of {_NUM} images and says nothing"


@functools.cache
def devkit() -> bytes:
    """ImageNet's devkit of one class."""
    synsets = np.zeros(2, dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")])
    synsets[:] = [(1, CLASS, "tench", 0), (2, "n00001740", "entity", 1)]
    meta, packed = io.BytesIO(), io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    content = {"data/meta.mat": meta.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, each in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(each)
            tar.addfile(info, io.BytesIO(each))
    return packed.getvalue()


SOUND = tar_of({f"{i:04d}.{part}": jpeg(i) if part == "jpg" else b"0" for i in range(_NUM) for part in ("cls", "jpg")})
IMAGES = tar_of({f"{CLASS}_{i}.JPEG": jpeg(i) for i in range(_NUM)})
COMMANDS = ((_index, SOUND), (_predict, SOUND), (_verify, SOUND), (_build, IMAGES))


def attempts(folder: Path, seed: int) -> Iterator[Attempt]:
    """Spoil one tar after the other."""
    for command, tar in COMMANDS:
        ended, fell = command(folder / "sound-tar", Spoiled(tar))
        assert not (fell or ended.code), ended.text
        shutil.rmtree(folder / "sound-tar")
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        fault = FAULTS[number % len(FAULTS)]
        command, tar = COMMANDS[number // len(FAULTS) % len(COMMANDS)]
        spoiled, place = fault(tar, chance), folder / f"{number}"
        ended, fell = command(place, spoiled)
        fell = ended.complaint() or fell
        shutil.rmtree(place)
        where = f"seed {seed}, attempt {number}, {command.__doc__}: {fell}" if fell else ""
        yield Attempt(fault.__doc__, where)
