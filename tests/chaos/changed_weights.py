"""What can be wrong with checkpoints, descriptions of models and files of weights."""

import collections
import copy
import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trainer.models.checkpoint_format import digest_of


def words(function: Callable) -> str:
    """The first sentence about a function, without its full stop."""
    return function.__doc__.rstrip(".")


def _place_in(content: object, chance: random.Random) -> tuple[object, object]:
    """Some dictionary or list in a file, and a key or an index of it."""
    inner = content
    while True:
        key = chance.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
        value = inner[key]
        if not isinstance(value, (dict, list)) or not value or chance.random() < 0.3:
            return inner, key
        inner = value


def absent(content: object, chance: random.Random) -> None:
    """A field that is absent."""
    inner, key = _place_in(content, chance)
    del inner[key]


def of_another_type(content: object, chance: random.Random) -> None:
    """A field of another type."""
    inner, key = _place_in(content, chance)
    others = [True, "text", -1, 2.5, [], {}, [[1]], {"a": 1}, None, "", 0]
    tensors = [] if _is_json(content) else [torch.zeros(2, 2), {1: 2}, (1, 2), torch.ones(3).int()]
    inner[key] = chance.choice([each for each in [*others, *tensors] if type(each) is not type(inner[key])])


def of_another_shape(content: object, chance: random.Random) -> None:
    """A tensor or a list of another shape."""

    def fits(value: object) -> bool:
        return torch.is_tensor(value) or (isinstance(value, list) and len(value) > 0)

    inner, key = _some(content, chance, fits)
    value = inner[key]
    if isinstance(value, list):
        inner[key] = chance.choice([value[:-1], [*value, value[0]], [value]])
    else:
        flat = value.reshape(-1)
        inner[key] = chance.choice([flat[:-1].clone(), value[None].clone(), torch.cat([flat, flat]), value[..., None]])


def not_finite(content: object, chance: random.Random) -> None:
    """A number, or one value of a tensor, that is not finite."""

    def fits(value: object) -> bool:
        return value.is_floating_point() if torch.is_tensor(value) else isinstance(value, (int, float))

    inner, key = _some(content, chance, fits)
    bad = chance.choice([float("nan"), float("inf"), float("-inf")])
    if torch.is_tensor(inner[key]) and inner[key].numel():
        flat = inner[key].flatten().clone()
        flat[chance.randrange(len(flat))] = bad
        inner[key] = flat.reshape(inner[key].shape)
    else:
        inner[key] = bad


def huge(content: object, chance: random.Random) -> None:
    """A huge number, text or list."""

    def fits(value: object) -> bool:
        return not torch.is_tensor(value) and value is not None

    inner, key = _some(content, chance, fits)
    numbers = [10**7, 10**30, -(10**9), 1e308, 10**400]
    inner[key] = chance.choice([*numbers, "x" * 10**6, [0] * 10**5, *numbers] if fits(inner[key]) else numbers)


def _some(content: object, chance: random.Random, fits: Callable[[object], bool]) -> tuple[object, object]:
    """A place in a file whose value fits, if one is found by trying."""
    for _ in range(200):
        inner, key = _place_in(content, chance)
        if fits(inner[key]):
            break
    return inner, key


def _is_json(content: object) -> bool:
    return "architecture" in content


Change = Callable[[object, random.Random], None]
CHANGES: tuple[Change, ...] = (absent, of_another_type, of_another_shape, not_finite, huge)


class _Asks:
    """Is pickled as a call."""

    def __init__(self, function: Callable, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def _doubled(times: int) -> list:
    values = [1.0]
    for _ in range(times):
        values = [values, values]
    return values


def _endless() -> list:
    values = []
    values.append(values)
    return values


# Values that no file should hold, in place of a tensor or beside the weights.
HARMFUL: dict[str, Callable[[], object]] = {
    "one value that is 10**10": lambda: torch.zeros(1).expand(10**10),
    "lists that double 60 times": lambda: _doubled(60),
    "a list that holds itself": _endless,
    "a call that asks for 10**11 bytes": lambda: _Asks(bytearray, 10**11),
    "a number of 5,000 bits": lambda: 1 << 5_000,
    "a sparse tensor": lambda: torch.ones(3).to_sparse(),
    "a tensor without values": lambda: torch.empty(10**12, device="meta"),
    "a call that prints": lambda: _Asks(print, "ran"),
}


def harmful(content: dict, chance: random.Random) -> str:
    """Put one of HARMFUL into a file; returns which."""
    what = chance.choice([*HARMFUL])
    if chance.random() < 0.5:
        content["more"] = HARMFUL[what]()
    else:
        inner, key = _some(content, chance, torch.is_tensor)
        inner[key] = HARMFUL[what]()
    return what


def cut_off(file: Path, chance: random.Random) -> None:
    """A truncated file."""
    os.truncate(file, chance.randrange(file.stat().st_size))


def byte_changed(file: Path, chance: random.Random) -> None:
    """A file with changed bytes, near its ends or anywhere."""
    content = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 4])):
        place = chance.choice([chance.randrange(len(content)), chance.randrange(500), -chance.randrange(1, 500)])
        content[place] ^= chance.randrange(1, 256)
    file.write_bytes(content)


def packed(file: Path, _chance: random.Random) -> None:
    """An archive with compressed records that are far larger than before."""
    _rewrite(file, lambda name, old: old + bytes(1 << 22) if "/data/" in name else old, zipfile.ZIP_DEFLATED)


def claiming(file: Path, _chance: random.Random) -> None:
    """A tensor that claims more values than its record holds."""
    _rewrite(file, lambda name, old: _claim(10**9) if name.endswith("data.pkl") else old)


def deep(file: Path, _chance: random.Random) -> None:
    """Lists nested 5,000 deep."""
    nested = b"\x80\x02" + b"]" * 5_000 + b"a" * 4_999 + b"."
    _rewrite(file, lambda name, old: nested if name.endswith("data.pkl") else old)


def _rewrite(file: Path, changed: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again with other records."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, changed(name, content))


class _Claim(pickle.Pickler):
    """Pickles a range as a storage of as many values."""

    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", len(value)) if isinstance(value, range) else None


def _claim(count: int) -> bytes:
    pickled = io.BytesIO()
    rebuilt = (range(count), 0, (count,), (1,), False, collections.OrderedDict())
    _Claim(pickled, protocol=2).dump({"fc.bias": _Asks(torch._utils._rebuild_tensor_v2, *rebuilt)})
    return pickled.getvalue()


def another_file(file: Path, chance: random.Random) -> None:
    """Another file in its place: empty, text, a tar, a folder."""
    file.unlink()
    what = chance.choice(["empty", "text", "tar", "folder"])
    if what == "folder":
        file.mkdir()
    elif what == "tar":
        with tarfile.open(file, "w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
    else:
        file.write_bytes(b"" if what == "empty" else b"no weights\n" * 100)


# The last three are about archives of torch.save.
SPOILS = (cut_off, byte_changed, another_file, packed, claiming, deep)


def change_file(name: str, file: Path, attempt: int, chance: random.Random) -> str:
    """Change a file, or a folder's description or weights.

    Args:
      name: what of a folder is changed: config.json, or anything else for its weights.
      turn: 0, 1, 2, ...: another kind of change each time.
    Returns:
      what was done.
    """
    if name == "config.json":
        change = CHANGES[attempt % len(CHANGES)]
        said = json.loads((file / "config.json").read_text())
        change(said, chance)
        (file / "config.json").write_text(json.dumps(said))
        return words(change)
    file = file / "model.safetensors" if file.is_dir() else file
    is_archive = file.suffix != ".safetensors"
    spoils = SPOILS if is_archive else SPOILS[:3]
    which = attempt % (len(CHANGES) + len(spoils) + is_archive)
    if which >= len(CHANGES) + is_archive:
        spoil = spoils[which - len(CHANGES) - is_archive]
        spoil(file, chance)
        return words(spoil)
    content = load_file(file) if not is_archive else torch.load(file, weights_only=True)
    digest = content.pop("digest", None)
    content = copy.deepcopy(content)
    if which == len(CHANGES):
        kind = f"Holds {harmful(content, chance)}"
    else:
        CHANGES[which](content, chance)
        kind = words(CHANGES[which])
    _save(content, file, chance, has_digest=digest is not None and which < len(CHANGES) and which != 0)
    return kind


def _save(content: dict, file: Path, chance: random.Random, *, has_digest: bool) -> None:
    if file.suffix == ".safetensors":
        tensors = {name: value.contiguous() for name, value in content.items() if torch.is_tensor(value)}
        save_file(tensors, file)
        return
    if has_digest and chance.random() < 0.5:
        content["digest"] = digest_of(content)
    torch.save(content, file)
