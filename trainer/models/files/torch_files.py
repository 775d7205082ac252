"""Files of tensors, loaded within the memory that their size allows and with nothing in them run.

torch.load believes a file: that a record unpacks to terabytes, that a record holds the values of its tensors. Here the
archive's directory and the pickle are looked at first, and a file that could not keep its word is refused by what it
claims. What was loaded is walked once, because lists that contain each other are small in a file and endless to a
reader.
"""

import collections
import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipelines.common.errors import UserError, clipped, reason_of
from pipelines.common.files import open_regular
from trainer.cluster.memory import is_out_of_memory

_DEEPEST = 100  # Containers may be nested this deep; checkpoints have about ten levels.
# A walk may meet shared values this often, on average: several parts of a file may be one and the same.
_OFTEN = 16
# What torch.save names where it saves a dense tensor.
_DENSE = ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "from_type_v2")
_STANDARD: Any = pickle._Unpickler.dispatch  # Python's function for each opcode of a pickle.


class ClaimError(ValueError):
    """A file that claims what it cannot hold."""


class PlainData:
    """Stands for whatever a pickle names: it can be called, filled and set, and nothing is built or run."""

    def __new__(cls, *_args):  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_args):
        pass

    def _ignore(self, *_args):
        pass

    __setitem__ = __setstate__ = append = extend = add = update = _ignore


class _PlainMapping:
    """Stands for a dictionary of another type: what is made of it is an OrderedDict, which gets the items."""

    def __new__(cls, *_args):
        return collections.OrderedDict()


def load_plain(path: Path) -> Any:
    """Load plain data and tensors, in memory of their own, on the CPU. Other things become PlainData.

    Args:
      path: a file of torch.save; a file of safetensors has their suffix.
    Raises:
      ClaimError: loading it would take more than the file can hold, or it is not of torch.save.
      OSError: it is no regular file, or cannot be read.
      UserError: the machine's memory is too short for the file, which stays unchanged.
      Exception: torch, pickle, zipfile and the system each raise their own for other files.
    """
    os.close(open_regular(path))  # Those who open it below would wait for a pipe for ever.
    with memory_for(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ClaimError(
                    "truncated, or not as torch.save writes since 1.6; save an older file again: "
                    "torch.save(torch.load(FILE), NEW)"
                )
            with zipfile.ZipFile(file) as archive:
                records = _records(archive, size)
                entry = archive.getinfo(archive.namelist()[0].partition("/")[0] + "/data.pkl")
                del entry.CRC  # torch looks at none, and writes a wrong one after set_crc32_options(False)
                pickled = archive.read(entry)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # It also bounds what may be in a pickle.
        claims = _Claims(pickled, records)
        claims.load()
        types: list[Any] = [(_PlainMapping if name in claims.mappings else PlainData, name) for name in unknown]
        with torch.serialization.safe_globals(types):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_content(content, len(pickled), size)
        return content


@contextlib.contextmanager
def memory_for(path: Path) -> Iterator[None]:
    """Inside, memory that is too short for a file is a UserError: it says nothing about the file."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{path}: memory is too short to read it ({reason_of(error)}). Free some memory "
            "and run the same command again; the file stays unchanged"
        ) from error


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """The bytes of each record of an archive by its name in the folder of torch.save; none is compressed."""
    entries = archive.infolist()
    is_stored = all(
        entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size and not entry.flag_bits & 1
        for entry in entries
    )
    # torch's reader and Python's find one directory in the file, and one record under a name, only if these hold.
    is_clear = entries and len({entry.filename.casefold() for entry in entries}) == len(entries)
    if not (is_stored and is_clear) or min(entry.header_offset for entry in entries):
        raise ClaimError("its records are compressed or ambiguous, which torch.save never makes them")
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise ClaimError(f"its records should hold {total:,} bytes, and the file has {size:,}")
    return {entry.filename.partition("/")[2]: entry.file_size for entry in entries}


def _encoded(text: str, encoding: str) -> bytes:
    """What torch.save names for bytes; other encodings than its own may double them again and again."""
    if encoding != "latin1":
        raise ClaimError("asks for memory instead of holding values")
    return text.encode(encoding)


class _Claims(pickle._Unpickler):
    """Goes through a pickle, in which every name stands for nothing, and compares what its tensors claim with records.

    It is based on the unpickler in Python, since the one in C allocates what a file claims to remember.

    Attributes:
      mappings: names of types that get items as a dictionary does.
    """

    def __init__(self, pickled: bytes, records: dict[str, int]):
        super().__init__(io.BytesIO(pickled), encoding="latin1")
        self._records = records
        self._values_left = _OFTEN * len(pickled)  # The arguments of all calls may hold this many values.
        self.mappings: set[str] = set()

    def find_class(self, module: str, name: str) -> object:
        if name == "bytearray":
            raise ClaimError("asks for memory instead of holding values")
        if name.startswith("_rebuild_") and name.removeprefix("_rebuild_") not in _DENSE:
            raise ClaimError(f"holds a tensor that is not dense ({clipped(name, 50)})")
        if name == "UntypedStorage":
            return 1
        if module == "torch" and name.endswith("Storage"):
            return torch.serialization.StorageType(name).dtype.itemsize
        if (module, name) == ("_codecs", "encode"):
            return _encoded
        return type("_Named", (PlainData,), {"__setitem__": lambda *_: self.mappings.add(f"{module}.{name}")})

    def persistent_load(self, pid: Any) -> object:
        """A storage as torch.save refers to it: ("storage", bytes of a value, key, device, number of values)."""
        kind, itemsize, key, _, count = pid
        # A product with text is as long as the count says, and tuples within tuples are endless in writing.
        if kind != "storage" or not isinstance(key, str) or not type(itemsize) is type(count) is int:
            raise ClaimError("refers to a record as torch.save never does")
        found = self._records.get(f"data/{key}", 0)
        if not 0 <= itemsize * count <= found:
            raise ClaimError(
                f"its record '{clipped(key, 20)}' should hold {clipped(count)} values, and has {found:,} bytes"
            )
        return PlainData()

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        _STANDARD[pickle.SETITEM[0]](self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        _STANDARD[pickle.SETITEMS[0]](self)

    def _reduce(self) -> None:
        self._count_arguments()
        _STANDARD[pickle.REDUCE[0]](self)

    def _new_object(self) -> None:
        self._count_arguments()
        _STANDARD[pickle.NEWOBJ[0]](self)

    def _count_arguments(self) -> None:
        """Raise a ClaimError if the calls so far have too many arguments: a call may hash or print all of them."""
        waiting = self.stack[-1:]
        while waiting:
            value = waiting.pop()
            if isinstance(value, (list, tuple, set, frozenset, dict)):
                self._values_left -= len(value)
                if self._values_left < 0:
                    raise ClaimError("calls something with the same values over and over")
                waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value

    stack: list
    dispatch: Any = {
        **_STANDARD,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new_object,
    }


def _check_keys(keys: list) -> None:
    """Raise a ClaimError about keys of a dictionary that are not plain: the hash of tuples within tuples is endless."""
    for key in keys:
        if not isinstance(key, (str, int, float, type(None))):
            raise ClaimError(f"a key in it is a {type(key).__name__}: neither text nor a number")


def _check_content(content: object, pickled: int, size: int) -> None:
    """Raise a ClaimError about content that no walk would finish, or that has tensors that are not dense.

    Args:
      pickled: bytes of the pickle that it comes from; size: of the file.
    """
    values, nbytes = _OFTEN * pickled, _OFTEN * size
    waiting = [(content, "", 0)]
    while waiting:
        value, name, depth = waiting.pop()
        if isinstance(value, dict):
            waiting += ((each, key if isinstance(key, str) else name, depth + 1) for key, each in value.items())
            values -= len(value)
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += ((each, name, depth + 1) for each in value)
            values -= len(value)
        elif torch.is_tensor(value):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ClaimError(f"'{clipped(name)}' is a tensor that is not dense")
            nbytes -= value.nbytes
        elif isinstance(value, (str, bytes)):
            nbytes -= len(value)
        if values < 0 or nbytes < 0 or depth > _DEEPEST:
            raise ClaimError(f"'{clipped(name)}' holds itself, or the same values over and over")
