"""Damaged, foreign and forged files of a teacher store: each is named, and none is used."""

import dataclasses
import os
import resource
import shutil

import numpy as np
import pytest

from pipelines.common.errors import UserError
from support.small_store import ALL_STEPS, HEADER, PIECES, rows_of, write_small_store
from trainer.targets.pieces import Piece, find_pieces, head_of, write_piece
from trainer.targets.store import Coverage, TeacherStore, verify

EVERYTHING = rows_of(ALL_STEPS).reshape(96, -1)
AGAIN = "Move it away, and record steps 0 to 3 again with tools/record_teacher.py"  # the first piece


@pytest.fixture
def store(tmp_path):
    return write_small_store(tmp_path / "store")


def assert_never_wrong(store, positions: np.ndarray) -> int:
    """Read the group of each position by itself: it is refused in one line, or right. Returns how many are refused."""
    opened, refused = TeacherStore(store), 0
    for position in positions[::4]:
        try:
            assert np.array_equal(opened.read(np.array([position])).numpy(), EVERYTHING[[position]])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(store) in str(error)
    return refused


def test_a_store_without_faults_has_none(store):
    assert list(verify(store)) == [] and assert_never_wrong(store, np.arange(96)) == 0


def test_every_changed_byte_of_a_piece_is_found_before_it_is_used(store):
    piece = PIECES[2]
    path, positions = store / piece.name, np.array([56, 57, 58, 59, 68, 69, 70, 71])
    content = path.read_bytes()
    num_head = len(head_of(HEADER, piece))
    (store / PIECES[3].name).unlink()  # It has step 5, too.
    for offset in range(len(content)):
        for flip in (1 << offset % 8, 0xFF):
            path.write_bytes(content[:offset] + bytes([content[offset] ^ flip]) + content[offset + 1 :])
            faults = list(verify(store))
            assert len(faults) == 1 and faults[0].startswith(f"{path}: ") and "record steps 4 to 5 again" in faults[0]
            # A changed head spoils both groups; a changed checksum or row only its own.
            assert assert_never_wrong(store, positions) == (2 if offset < num_head else 1)
            assert ("head is damaged" in faults[0]) == (offset < num_head)
    path.write_bytes(content)
    assert list(verify(store)) == []


def test_a_damaged_group_leaves_the_others_of_its_file(store):
    path = store / PIECES[0].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last group of step 3
    path.write_bytes(content)
    assert list(verify(store)) == [f"{path}: is damaged at step 3. {AGAIN}"]
    opened = TeacherStore(store)
    assert np.array_equal(opened.read(np.arange(44)).numpy(), EVERYTHING[:44])
    with pytest.raises(UserError, match=rf"{path}: is damaged at step 3\. {AGAIN}"):
        opened.read(np.array([0, 45]))


def test_short_long_and_empty_pieces(store):
    path = store / PIECES[0].name
    content = path.read_bytes()
    for wrong in (b"", content[:7], content[:100], content[:-1], content + b"\0", bytes(len(content))):
        path.write_bytes(wrong)
        faults = list(verify(store))
        assert len(faults) == 1 and faults[0].startswith(f"{path}: ") and faults[0].endswith(AGAIN)
        assert assert_never_wrong(store, np.arange(48)) == 12
    path.write_bytes(content[:-1])
    assert list(verify(store)) == [f"{path}: has {len(content) - 1} bytes instead of {len(content)}. {AGAIN}"]


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "fp32", "num_classes": 2},
        {"precision": "bf16"},
        {"plan": {**HEADER.plan, "seed": 7}},
        {"teacher": dataclasses.replace(HEADER.teacher, weights="cd" * 32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_pieces_of_another_store_are_named(store, tmp_path, change):
    other = write_small_store(tmp_path / "other", dataclasses.replace(HEADER, **change))
    path = store / PIECES[0].name
    shutil.copy(other / path.name, path)
    faults = list(verify(store))
    assert len(faults) == 1 and faults[0].startswith(f"{path}: ")
    assert "belongs to another store" in faults[0] or "bytes instead of" in faults[0]
    assert assert_never_wrong(store, np.arange(48)) == 12


def test_renamed_pieces_are_not_what_their_name_says(store):
    old, new = store / PIECES[0].name, store / Piece(8, 12, 0, 12).name
    old.rename(new)
    assert Coverage(store, HEADER).first_missing(0, 12) == 0
    again = AGAIN.replace("0 to 3", "8 to 11")
    assert list(verify(store)) == [f"{new}: belongs to another store, or its head is damaged. {again}"]
    with pytest.raises(UserError, match="belongs to another store, or its head is damaged"):
        TeacherStore(store).read(np.array([100]))


def test_stray_files_are_named_and_never_read(store):
    stray = [
        "00000008-00000012.0-12.safetensor",
        "8-12.0-12.safetensors",
        "00000008-00000012.0-6.safetensors",
        "00000008-00000012.0-16.safetensors",
        "00000012-00000008.0-12.safetensors",
        "00000008-00000008.0-12.safetensors",
        "000000008-00000012.0-12.safetensors",
        "00000008-00000012.0-012.safetensors",
        "00000008-9999999999999999999999.0-12.safetensors",
        "0000000\u0668-00000012.0-12.safetensors",
        "notes.txt",
    ]
    for name in stray:
        (store / name).write_bytes(b"x")
    (store / ".nfs0001").touch()
    (store / f"{PIECES[0].name}.0123abcd.partial").touch()  # a killed recorder's, or a present one's
    assert find_pieces(store, HEADER) == sorted(PIECES)
    faults = list(verify(store))
    assert len(faults) == len(stray)
    for name in stray:
        assert f"{store / name}: its name is none that a piece of this store can have. Move it away" in faults


def test_what_is_no_file_is_one_line(store):
    """A reader of a pipe would wait for ever."""
    os.mkfifo(store / Piece(8, 9, 0, 12).name)
    (store / Piece(9, 10, 0, 12).name).mkdir()
    (store / Piece(10, 11, 0, 12).name).symlink_to(store / "nowhere")
    (store / Piece(11, 12, 0, 12).name).symlink_to("/dev/zero")
    assert [fault.split(": ")[0] for fault in verify(store)] == [
        str(store / Piece(step, step + 1, 0, 12).name) for step in range(8, 12)
    ]
    for step in range(8, 12):
        with pytest.raises(UserError, match=f"{step:08d}-.*: (cannot be read|has .* bytes instead)"):
            TeacherStore(store).read(np.array([12 * step]))


def test_a_file_that_claims_to_be_huge_takes_no_memory(store):
    piece = Piece(8, 9_999_999_999, 0, 12)
    head = head_of(HEADER, piece)
    with open(store / piece.name, "wb") as file:
        file.write(head)
        file.truncate(len(head) + 10)
    assert "bytes instead of" in next(verify(store))
    with open(store / piece.name, "r+b") as file:
        file.truncate(len(head) + piece.num_steps * (4 * 3 + 12 * 5))  # the right size, all of it a hole
    with pytest.raises(UserError, match="is damaged at step 5000000000"):
        TeacherStore(store).read(np.array([12 * 5_000_000_000]))
    assert "is damaged at step 8" in next(verify(store))


def test_a_damaged_header_is_the_only_fault(store):
    (store / "store.json").write_bytes((store / "store.json").read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    faults = list(verify(store))
    assert len(faults) == 1 and "store.json: damaged, or not written by this program" in faults[0]
    with pytest.raises(UserError, match="store.json: damaged"):
        TeacherStore(store)


def test_a_list_of_damaged_images_that_is_none_takes_no_memory(store):
    with open(store / "quarantine.jsonl", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="quarantine.jsonl: has more than 67108864 bytes, so it is no list"):
        _ = TeacherStore(store).num_quarantined()


def test_a_full_disk_is_one_line_and_leaves_no_piece(store):
    """A limit on the size of files stands for the full disk: write() fails in the same place."""
    piece = Piece(8, 16, 0, 12)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(
            UserError, match=rf"^{store / piece.name}: cannot be written \(File too large\). No file may"
        ):
            write_piece(store, HEADER, piece, rows_of(piece))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert write_piece(store, HEADER, piece, rows_of(piece)) and not list(verify(store))
    assert np.array_equal(TeacherStore(store).read(np.arange(96, 192)).numpy(), rows_of(piece).reshape(96, -1))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(store, monkeypatch):
    path, read = store / PIECES[0].name, os.preadv

    def shrinking(file, buffers, offset):
        if offset > 100:
            os.truncate(path, 100)
        return read(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(UserError, match="has become shorter while it was read"):
        TeacherStore(store).read(np.array([0]))


def test_rows_that_another_piece_holds_intact_are_read_from_it(store):
    """Step 5 is in two pieces of each of its rows."""
    step_5 = np.arange(60, 72)
    for name in (PIECES[1].name, PIECES[2].name, PIECES[3].name):
        path = store / name
        content = path.read_bytes()
        for damaged in (content[:-1] + bytes([content[-1] ^ 1]), bytes([content[0] ^ 1]) + content[1:], b""):
            path.write_bytes(damaged)
            assert np.array_equal(TeacherStore(store).read(step_5).numpy(), EVERYTHING[60:72])
            assert [fault.split(": ")[0] for fault in verify(store)] == [str(path)]
        path.write_bytes(content)
    for piece in (PIECES[1], PIECES[3]):
        (store / piece.name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{PIECES[1].name}: has 0 bytes instead of"):  # the first of them
        TeacherStore(store).read(step_5)
