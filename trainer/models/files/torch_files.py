"""Files of torch.save, loaded within the memory that their size allows and with nothing in them run.

torch.load believes a file: that a record unpacks to terabytes, that a tensor has more values than are stored. Here the
archive's directory and the pickle are looked at first, and a file that could not keep its word is refused by what it
claims. What was loaded is walked once, because lists that contain each other are small in a file and endless to a
reader.
"""

import contextlib
import errno
import io
import math
import os
import pickle
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from pipelines.common.errors import UserError, clipped, reason_of
from trainer.cluster.memory import is_out_of_memory

# A file of torch.save before version 1.6 begins with this number. Source: torch.serialization.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DEEPEST = 100  # Containers may be nested this deep; checkpoints have about ten levels.
# A whole number may have this many bits: NumPy's generators have 128, and Python shows up to 14,000 as text.
_MOST_BITS = 4096
# A walk may meet shared values this often, on average: several parts of a file may be one and the same.
_OFTEN = 16


class ClaimError(ValueError):
    """A file that claims what it cannot hold."""


def load_plain(path: Path, types: tuple = ()):
    """Load plain data and tensors, in memory of their own, on the CPU.

    Args:
      types: further types that may be named in the file, as for torch.serialization.safe_globals.
    Raises:
      ClaimError: loading it would take more than the file can hold.
      OSError: it is no regular file, or cannot be read.
      UserError: the machine's memory is too short for the file, which stays unchanged.
      Exception: torch, pickle, zipfile and the system each raise their own for other files.
    """
    with memory_for(path):
        most = check_claims(path)
        allowed = torch.serialization.safe_globals([*types]) if types else contextlib.nullcontext()
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about older formats; where one is not taken, the error says so
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_content(content, most, os.path.getsize(path))
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


def require_regular(path: Path) -> None:
    """Raise an OSError for a pipe, socket or device, before it is opened: a pipe would be waited for, for ever.

    A folder is left to whoever opens it, as is a file that is not there.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file")


def check_claims(path: Path) -> int:
    """Raise a ClaimError if a file claims more than its size; nothing of a claimed size is allocated.

    Returns:
      the bytes of its pickle, which bound how many values there are.
    """
    require_regular(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not is_archive:
            return _check_legacy(file, size)
        try:
            return _check_archive(file, size)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Seeking to an offset before the file, which a changed file may name.
                raise
            raise ClaimError("its directory names places outside of it") from error


def _check_archive(file: BinaryIO, size: int) -> int:
    """As `check_claims`, of a zip archive: data.pkl, and a record for each storage."""
    with zipfile.ZipFile(file) as archive:
        records = _records(archive.infolist(), size)
        folder = next(iter(records)).partition("/")[0]
        if f"{folder}/data.pkl" not in records:
            raise ClaimError("no data.pkl in it")
        entry = archive.getinfo(f"{folder}/data.pkl")
        del entry.CRC  # torch looks at none, and writes a wrong one after set_crc32_options(False)
        pickled = archive.read(entry)
    claims = _Claims(io.BytesIO(pickled), size)
    claims.load()
    for key, claimed in claims.storages.items():
        found = records.get(f"{folder}/data/{key}", 0)
        if claimed > found:
            raise ClaimError(f"its record '{clipped(key, 20)}' should hold {claimed:,} bytes and holds {found:,}")
    return len(pickled)


def _records(entries: list[zipfile.ZipInfo], size: int) -> dict[str, int]:
    """The bytes of each record of an archive, none of which is compressed, in the order of its directory."""
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ClaimError("a TorchScript program")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise ClaimError(f"its record '{clipped(entry.filename, 40)}' is compressed, which torch.save never does")
    # torch's reader and Python's find one directory in the file, and one record under a name, only if these hold
    names = {entry.filename.casefold() for entry in entries}
    if not entries or len(names) < len(entries) or min(entry.header_offset for entry in entries):
        raise ClaimError("its directory is ambiguous")
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise ClaimError(f"its records should hold {total:,} bytes, and the file has {size:,}")
    return {entry.filename: entry.file_size for entry in entries}


def _check_legacy(file: BinaryIO, size: int) -> int:
    """As `check_claims`, of the format before torch 1.6: pickles, then the values of all storages."""
    if tarfile.is_tarfile(file):  # torch would unpack this other format.
        raise ClaimError("a tar file of torch 0.1.1, which is not loaded")
    file.seek(0)
    if file.read(1) != pickle.PROTO:
        raise ClaimError("not a file of torch.save")
    file.seek(0)
    if _Claims(file, size).load() != _LEGACY_MAGIC:
        raise ClaimError("not a file of torch.save")
    for _ in ("protocol version", "about the system"):
        _Claims(file, size).load()
    claims = _Claims(file, size)
    claims.load()
    if (total := sum(claims.storages.values())) > size:
        raise ClaimError(f"its tensors should hold {total:,} bytes, and the file has {size:,}")
    return file.tell()


class _Nothing:
    """Stands for whatever a pickle names: it can be called, filled and set, and nothing happens."""

    def __new__(cls, *_args, **_named):
        return super().__new__(cls)

    def __init__(self, *_args, **_named):
        pass

    def _ignore(self, *_args):
        pass

    __setitem__ = __setstate__ = append = extend = add = update = _ignore


class _Sized(_Nothing):
    """Stands for a type that allocates the number of bytes that it is given."""

    def __init__(self, *args, **_named):
        if any(isinstance(each, int) for each in args):
            raise ClaimError("asks for memory instead of holding values")


class _Storage:
    """Stands for values in a file: how many bytes they are claimed to be, and those of one value."""

    def __init__(self, nbytes: int, itemsize: int):
        self.nbytes, self.itemsize = nbytes, itemsize


class _Bounded:
    """A file of which never more is asked for than it has: Python takes memory for what is asked for."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise ClaimError(f"a value of it should hold {count:,} bytes, and the file has {self._size:,}")
        return self._file.read(count)


def _reject_bytearray(_: Any) -> None:
    raise ClaimError("asks for memory instead of holding values")  # Python allocates it before it reads.


class _Claims(pickle._Unpickler):
    """Goes through a pickle, in which every name stands for nothing, and notes what its tensors claim.

    It is based on the unpickler in Python, since the one in C allocates what a file claims to remember.

    Attributes:
      storages: claimed bytes by key.
    """

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _reject_bytearray}

    def __init__(self, file: BinaryIO, size: int):
        super().__init__(_Bounded(file, size), encoding="latin1")
        self._size = size
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name.endswith("Storage"):
            return torch.serialization.StorageType(name).dtype.itemsize if name != "UntypedStorage" else 1
        if module == "torch.storage" and name == "UntypedStorage":
            return 1
        if isinstance(found := getattr(torch, name, None) if module == "torch" else None, torch.dtype):
            return found
        if (module, name) == ("torch", "Size"):
            return tuple
        if name == "bytearray":
            return _Sized
        if module == "torch" and name.endswith("Tensor"):
            return type("_Tensor", (_Sized,), {"__setstate__": lambda _, state: self._tensor(*state[:4])})
        if module in ("torch._utils", "torch._tensor") and name.startswith("_rebuild"):
            return self._rebuilder(name)
        return _Nothing

    def persistent_load(self, pid: Any) -> object:
        """A storage as torch.save refers to it: ("storage", type, key, device, number of values, ...)."""
        kind, *details = pid
        if kind != "storage":
            return _Nothing()
        itemsize, key, _, count = details[:4]
        nbytes = itemsize * count
        if not 0 <= nbytes <= self._size:
            raise ClaimError(f"a tensor of it should hold {clipped(nbytes, 30)} bytes, and the file has {self._size:,}")
        self.storages[key] = max(nbytes, self.storages.get(key, 0))
        return _Storage(nbytes, itemsize)

    def _rebuilder(self, name: str) -> object:
        makers = {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": lambda *args: self._tensor(*args[:4], itemsize=args[6].itemsize),
            "_rebuild_from_type_v2": lambda make, _type, args, _state: make(*args),
        }
        if name not in makers and name not in (
            *("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_device_tensor_from_cpu_tensor"),
        ):
            raise ClaimError(f"holds a tensor that is not dense ({clipped(name, 50)})")
        return makers.get(name, _Nothing)

    def _tensor(
        self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_more, itemsize: int = 0
    ) -> _Nothing:
        """Check that a tensor lies in its storage and is no larger than the file."""
        itemsize = itemsize or storage.itemsize
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if count and not 0 <= offset <= last < storage.nbytes // itemsize:
            raise ClaimError("a tensor of it begins or ends outside of its values")
        if min((*size, 0)) < 0 or count * itemsize > self._size:
            raise ClaimError(
                f"a tensor of it has the shape {clipped(list(size), 60)}, and the file {self._size:,} bytes"
            )
        return _Nothing()


def check_content(content: object, pickled: int, size: int) -> None:
    """Raise a ClaimError about content that no walk would finish, or that is not plain.

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
            _check_dense(value, name)
            nbytes -= value.nbytes
        elif isinstance(value, (str, bytes, bytearray)):
            nbytes -= len(value)
        elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ClaimError(f"'{clipped(name)}' is a number of {value.bit_length():,} bits")
        if values < 0 or nbytes < 0 or depth > _DEEPEST:
            raise ClaimError(f"'{clipped(name)}' holds itself, or the same values over and over")


def _check_dense(value: torch.Tensor, name: str) -> None:
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ClaimError(f"'{clipped(name)}' is a tensor that is not dense")
