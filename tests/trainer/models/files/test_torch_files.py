"""What a file of tensors claims: refused before it takes memory, while every honest file loads as it was saved."""

import codecs
import collections
import os
import pickle
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from chaos.attempts import isolated
from chaos.changed_weights import HARMFUL, _rewrite, claiming, deep, packed
from chaos.runs import equal
from conftest import REPOSITORY
from pipelines.common.errors import UserError
from support.checkpoints import least_content
from support.forked_python import executable
from trainer.models.files.torch_files import ClaimError, load_plain
from trainer.models.files.weights import read_file, read_weights
from trainer.state import checkpoint

TIED = torch.arange(12.0).reshape(3, 4)
HONEST = {
    "tied": [TIED, TIED.t(), TIED[1:, ::2]],
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "part of a larger one": torch.arange(100)[10:20],
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "scalar and empty": [torch.tensor(3), torch.zeros(0, 4)],
    "expanded within reason": torch.arange(4).expand(1, -1),
    "types": [torch.ones(3, dtype=each) for each in (torch.bfloat16, torch.bool, torch.int8, torch.complex64)],
    "plain": [None, True, 1 << 60, 1 << 127, 1 << 2000, 0.5, "text", (1, 2), {1, 2}, torch.Size([1, 2]), torch.float16],
    "dictionaries": [collections.OrderedDict(a=1), collections.Counter("aab"), {1: {"b": [[]]}}],
    "one list in many places": [[1, 2]] * 50,
}


@pytest.mark.parametrize("what", HONEST)
def test_whatever_torch_saves_of_dense_tensors_and_plain_data_is_loaded(what, tmp_path):
    torch.save({"a": HONEST[what]}, tmp_path / "w.pth")
    assert equal(load_plain(tmp_path / "w.pth")["a"], HONEST[what])


def test_tensors_in_common_memory_have_it_in_common_afterwards_and_keep_their_order_in_it(tmp_path):
    last = HONEST["channels last"]
    torch.save({"a": TIED, "b": TIED, "c": last}, tmp_path / "w.pth")
    found = load_plain(tmp_path / "w.pth")
    assert found["a"].data_ptr() == found["b"].data_ptr() and found["c"].stride() == last.stride()


REASONS = {
    "one value that is 10**10": "'more' holds itself, or the same values over and over",
    "lists that double 60 times": "'more' holds itself, or the same values over and over",
    "a list that holds itself": "'more' holds itself, or the same values over and over",
    "a call that asks for 10**11 bytes": "asks for memory instead of holding values",
    "a sparse tensor": "holds a tensor that is not dense",
    "a tensor without values": "holds a tensor that is not dense",
}


@pytest.mark.parametrize("what", REASONS)
def test_what_is_small_in_a_file_and_endless_outside_is_refused(what, tmp_path):
    torch.save({"w": torch.ones(3), "more": HARMFUL[what]()}, tmp_path / "w.pth")
    with pytest.raises(ClaimError, match=REASONS[what]):
        load_plain(tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"w.pth: damaged, or no file of weights .*{REASONS[what]}.*Copy it again, or"):
        read_file(tmp_path / "w.pth")


def lengthened(file: Path) -> None:
    """An archive behind something else, so that offsets in it may mean two things."""
    file.write_bytes(b"PK\x03\x04" + bytes(96) + file.read_bytes())


def with_two_of_a_name(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(name)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name.upper().replace("W/", "w/"), content)


def with_one_record_for_all(file: Path) -> None:
    """The directory names the largest record a hundred times."""
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(100):
            again = zipfile.ZipInfo(f"w/more/{i}")
            again.file_size = again.compress_size = largest.file_size
            again.header_offset, again.CRC = largest.header_offset, largest.CRC
            archive.filelist.append(again)
        archive._didModify = True


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: packed(file, random.Random(0)), "compressed or ambiguous, which torch.save never"),
        (
            lambda file: claiming(file, random.Random(0)),
            "its record '0' should hold 1000000000 values, and has 40,000 bytes",
        ),
        (lambda file: deep(file, random.Random(0)), "holds itself, or the same values over and over"),
        (lengthened, "compressed or ambiguous, which torch.save never"),
        (with_two_of_a_name, "compressed or ambiguous, which torch.save never"),
        (with_one_record_for_all, "its records should hold .* bytes, and the file has"),
    ],
)
def test_an_archive_that_holds_less_than_it_says_is_refused_before_torch_reads_it(spoil, reason, tmp_path, monkeypatch):
    torch.save({"fc.weight": torch.randn(100, 100)}, tmp_path / "w.pth")
    spoil(tmp_path / "w.pth")
    if "holds itself" not in reason:
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read it"))
    with pytest.raises(ClaimError, match=reason):
        load_plain(tmp_path / "w.pth")


def test_a_file_of_torch_before_1_6_is_refused_and_the_advice_helps(tmp_path):
    torch.save({"a": TIED}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"not as torch.save writes since 1.6; save an older file again: torch.save\(torch"
    ):
        read_file(tmp_path / "old.pth")
    torch.save(torch.load(tmp_path / "old.pth"), tmp_path / "new.pth")
    assert torch.equal(read_file(tmp_path / "new.pth")["a"], TIED)


class Encoded:
    """Is pickled as text that is encoded again and again, twice as long each time."""

    def __init__(self, times: int):
        self.times = times

    def __reduce__(self):
        return codecs.encode, (Encoded(self.times - 1), "hex") if self.times else ("a" * 1000, "latin1")


@pytest.mark.parametrize(
    "asked",
    [
        pickle.PROTO + b"\x04" + pickle.FRAME + (10**11).to_bytes(8, "little"),
        pickle.PROTO + b"\x04" + pickle.BINBYTES8 + (10**11).to_bytes(8, "little"),
        pickle.PROTO + b"\x02" + pickle.BINUNICODE + (2 * 10**9).to_bytes(4, "little"),
        pickle.PROTO + b"\x02" + pickle.LONG4 + (2 * 10**9).to_bytes(4, "little"),
        pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + (10**11).to_bytes(8, "little"),
        pickle.dumps(Encoded(25), protocol=2),
    ],
)
def test_a_pickle_that_asks_for_more_bytes_than_the_file_has_is_refused_and_takes_no_memory(asked, tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    _rewrite(tmp_path / "w.pth", lambda name, old: asked + bytes(100) if name.endswith("data.pkl") else old)

    def command() -> None:
        with pytest.raises(UserError, match="w.pth: damaged, or no file of weights"):
            read_file(tmp_path / "w.pth")

    assert isolated(command, mib=40).complaint() == ""


def stored(item: bytes = b"ctorch\nFloatStorage\n", key: bytes = b"X\x01\0\0\x000", count: int = 1) -> bytes:
    """The opcodes of a reference to a storage."""
    text = b"(X\x07\0\0\0storage" + item + key + b"X\x03\0\0\0cpuJ" + count.to_bytes(4, "little")
    return text + pickle.TUPLE + pickle.BINPERSID


# A tuple that holds the last one twice, many times over: the memo gives it again.
DOUBLED = pickle.EMPTY_TUPLE + (pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2) * 40

COUNTER = b"ccollections\nCounter\n"  # It hashes what it is called with.


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (stored(item=b"X\x01\0\0\0A", count=2 * 10**9), "refers to a record as torch.save never does"),
        (stored(key=DOUBLED), "refers to a record as torch.save never does"),
        (stored(item=DOUBLED), "refers to a record as torch.save never does"),
        (b"}" + DOUBLED + b"K\x01s", "a key in it is a tuple: neither text nor a number"),
        (b"}(K\x01K\x01" + DOUBLED + b"K\x01u", "a key in it is a tuple: neither text nor a number"),
        (COUNTER + DOUBLED + b"\x85\x85R", "calls something with the same values over and over"),
        (
            b"ccollections\nOrderedDict\n" + DOUBLED + b"K\x01\x86\x85\x85R",
            "calls something with the same values over and over",
        ),
        (COUNTER + DOUBLED + b"\x85\x81", "calls something with the same values over and over"),
    ],
    ids=[
        "text as a type",
        "key of a record",
        "type",
        "key of a dictionary",
        "second key of a dictionary",
        "element that is counted",
        "key in an argument",
        "argument of a new object",
    ],
)
def test_what_torch_never_saves_in_a_place_takes_neither_time_nor_memory(asked, reason, tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    _rewrite(tmp_path / "w.pth", lambda name, old: b"\x80\x02" + asked + b"." if name.endswith("data.pkl") else old)

    def command() -> None:
        with pytest.raises(UserError, match=f"w.pth: damaged, or no file of weights .*{reason}"):
            read_file(tmp_path / "w.pth")

    assert isolated(command, mib=40).complaint() == ""


def test_a_file_without_a_checksum_is_loaded_as_torch_loads_it(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": TIED}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "w.pth") as archive, pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        archive.read("w/data.pkl")
    assert torch.equal(load_plain(tmp_path / "w.pth")["a"], TIED)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "step-00000010.pt"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    read = checkpoint.newest_complete if name.startswith("step") else lambda folder: read_weights(folder / name)

    def command() -> None:
        with pytest.raises(UserError, match=f"{name}: cannot be read .a pipe, socket or device, not a file.. "):
            read(tmp_path)

    assert isolated(command).complaint() == ""


def test_a_tar_is_never_unpacked(tmp_path):
    with tarfile.open(tmp_path / "w.pth", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ClaimError, match="truncated, or not as torch.save writes"):
        load_plain(tmp_path / "w.pth")


# --- memory ---


def folder_of_two(folder: Path) -> list[Path]:
    """Two intact checkpoints; the newer one is large."""
    folder.mkdir()
    for step, size in ((1, 1), (2, 1 << 24)):
        checkpoint.write(checkpoint.path_of(folder, step), least_content(step, more=torch.zeros(size)))
    return checkpoint.checkpoints(folder)


# A process of its own: this one may have memory to spare, which earlier tests have given back.
SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from pipelines.common.errors import UserError
from tests.chaos.attempts import mapped_bytes
from trainer.state import checkpoint, resume
limit = mapped_bytes() + (40 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    {read}
except UserError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "read", ["checkpoint.newest_complete(Path(sys.argv[1]))", "resume.prepare(Path(sys.argv[1]), 1)"]
)
def test_a_checkpoint_that_memory_is_too_short_for_is_not_damaged(tmp_path, read):
    paths = folder_of_two(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in paths}

    command = [executable(), "-c", SHORT_OF_MEMORY.format(read=read), tmp_path / "checkpoints"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert re.match("UserError .*step-00000002.pt: memory is too short to read it .* the file stays", done.stdout), done
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    assert checkpoint.newest_complete(tmp_path / "checkpoints")[0] == paths[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_named_with_the_file_by_whoever_reads_weights(error, tmp_path, monkeypatch):
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "w.pth")

    def full(*_, **__):
        raise error

    monkeypatch.setattr("torch.load", full)
    with pytest.raises(UserError, match="w.pth: memory is too short to read it .*. Free some memory"):
        read_weights(tmp_path / "w.pth")


def test_a_folder_of_checkpoints_is_read_as_before_whatever_else_lies_there(tmp_path):
    paths = folder_of_two(tmp_path / "checkpoints")
    shutil.copy(paths[0], tmp_path / "checkpoints" / "step-00000003.pt")  # a name that its content contradicts
    path, content, damaged = checkpoint.newest_complete(tmp_path / "checkpoints")
    assert (path, content["step"]) == (paths[1], 2)
    assert damaged == [f"{tmp_path}/checkpoints/step-00000003.pt: damaged ('step' is 1, and its name says 3)"]
