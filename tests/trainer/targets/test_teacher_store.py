"""The teacher store: what is written for positions is what is read for them, in any order and division."""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pipelines.common.errors import UserError
from pipelines.plan.pairs import Division
from support.small_store import ALL_STEPS, HEADER, PIECES, rows_of, write_small_store
from trainer.targets.header import FORMAT_VERSION
from trainer.targets.pieces import Piece, find_pieces, write_piece
from trainer.targets.store import Coverage, TeacherStore, verify

EVERYTHING = rows_of(ALL_STEPS).reshape(96, -1)


@pytest.fixture
def store(tmp_path):
    return write_small_store(tmp_path)


def test_any_positions_in_any_order(store):
    opened, generator = TeacherStore(store), np.random.default_rng(0)
    assert len(np.unique(EVERYTHING, axis=0)) == 96
    for count in (1, 2, 5, 40, 96):
        positions = generator.permutation(96)[:count]
        assert np.array_equal(opened.read(positions).numpy(), EVERYTHING[positions])
    assert np.array_equal(opened.read(np.array([7, 7, 90, 7])).numpy(), EVERYTHING[[7, 7, 90, 7]])


@pytest.mark.parametrize("ranks, micro_batch", [(1, None), (1, 4), (2, 3), (3, 4), (5, 2), (6, None)])
def test_every_division_of_a_batch_reads_its_rows(store, ranks, micro_batch):
    opened, division = TeacherStore(store), Division(12, 4, ranks, micro_batch)
    read = []
    for rank in range(ranks):
        for rows in division.rows(rank):
            assert np.array_equal(opened.read(60 + rows).numpy(), EVERYTHING[60 + rows])
            read += rows.tolist()
    assert sorted(read) == list(range(12))


def test_groups_of_an_odd_size_and_of_one_row(tmp_path):
    for group in (1, 3, 12):
        header = dataclasses.replace(HEADER, plan={**HEADER.plan, "augment.mix_group": group})
        store = write_small_store(tmp_path / str(group), header, (ALL_STEPS,))
        positions = np.random.default_rng(group).permutation(96)
        assert np.array_equal(TeacherStore(store).read(positions).numpy(), EVERYTHING[positions])
        assert not list(verify(store))


def test_threads_read_at_once(store):
    opened = TeacherStore(store)
    wanted = [np.random.default_rng(seed).permutation(96)[:20] for seed in range(200)]
    with ThreadPoolExecutor(8) as threads:
        for positions, rows in zip(wanted, threads.map(opened.read, wanted), strict=True):
            assert np.array_equal(rows.numpy(), EVERYTHING[positions])


def open_files(store) -> list[str]:
    """The names of the store's files that this process has open."""
    paths = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    return [os.path.basename(path) for path in paths if os.path.dirname(path) == str(store)]


def test_a_few_files_stay_open_until_nobody_needs_them(tmp_path):
    pieces = tuple(Piece(step, step + 1, row, row + 4) for step in range(8) for row in (0, 4, 8)) + tuple(
        Piece(step, step + 1, 0, 12) for step in range(8, 20)
    )
    store = write_small_store(tmp_path, pieces=pieces)
    opened, positions = TeacherStore(store), [np.arange(12 * step, 12 * step + 12) for step in range(20)]
    opened.read(positions[0])
    assert sorted(open_files(store)) == sorted(piece.name for piece in pieces[:3])
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            for wanted, rows in zip(positions, threads.map(opened.read, positions), strict=True):
                assert np.array_equal(rows.numpy(), rows_of(Piece(wanted[0] // 12, wanted[0] // 12 + 1, 0, 12))[0])
    assert len(set(open_files(store))) == len(open_files(store)) == 32 < len(pieces)
    del opened
    assert open_files(store) == []


def test_a_file_is_opened_and_its_head_checked_once(store, monkeypatch):
    opened, real, names = TeacherStore(store), os.open, []

    def noted(path, *others):
        names.append(os.path.basename(path))
        return real(path, *others)

    monkeypatch.setattr(os, "open", noted)
    for position in (0, 5, 47, 60, 1, 56, 61):
        assert np.array_equal(opened.read(np.array([position])).numpy(), EVERYTHING[[position]])
    assert names == [PIECES[0].name, PIECES[1].name, PIECES[2].name]


def test_a_piece_is_a_file_of_safetensors(store):
    piece = PIECES[1]
    loaded = load_file(store / piece.name)
    assert np.array_equal(loaded["targets"], rows_of(piece)) and loaded["crc32"].dtype == np.uint32
    assert loaded["crc32"].shape == (2, 2)
    with safe_open(store / piece.name, "numpy") as file:
        metadata = file.metadata()
    assert metadata["store"] == HEADER.identity == json.loads((store / "store.json").read_bytes())["identity"]
    assert metadata["codec"] == "int8" and metadata["first_step"] == "4" and metadata["stop_row"] == "8"


def test_files_are_those_of_format_version_2(store):
    """Stores outlive versions of this program: another content needs another FORMAT_VERSION."""
    found = {
        name: hashlib.sha256((store / name).read_bytes()).hexdigest()[:16] for name in ("store.json", PIECES[1].name)
    }
    assert FORMAT_VERSION == 2 and found == {"store.json": "3780dc454d603ee2", PIECES[1].name: "3ed957692b6ba43c"}


def test_the_same_rows_make_the_same_files(tmp_path):
    """So recorders can be compared byte for byte, whatever process wrote a piece."""
    one, other = write_small_store(tmp_path / "one"), write_small_store(tmp_path / "other")
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert files == {path.name: path.read_bytes() for path in other.iterdir()} and len(files) == 5


def test_what_is_missing(store):
    coverage = Coverage(store, HEADER)
    assert coverage.first_missing(0, 8) is None and coverage.first_missing(0, 9) == 8
    assert coverage.first_missing(3, 3) is None and coverage.first_missing(20, 30) == 20
    assert coverage.missing_pieces(0, 8, steps=4) == coverage.holes == []
    found = coverage.missing_pieces(0, 21, steps=4)
    assert found == [Piece(8, 12, 0, 12), Piece(12, 16, 0, 12), Piece(16, 20, 0, 12), Piece(20, 21, 0, 12)]
    assert coverage.holding(4, 9) == [PIECES[2]] and coverage.holding(5, 9) == [*PIECES[2:]]
    assert coverage.holding(8, 0) == coverage.holding(10**9, 0) == []
    with pytest.raises(
        UserError, match="step 8 is not recorded for row 0. To complete the store, record its missing steps with"
    ):
        TeacherStore(store).read(np.array([95, 96]))


def test_a_step_is_missing_if_any_of_its_rows_is(store):
    (store / PIECES[2].name).unlink()  # rows [8, 12) of steps 4 and 5; step 5 is in another piece, too
    coverage = Coverage(store, HEADER)
    assert coverage.first_missing(0, 8) == 4 and coverage.holes == [(4, 5)]
    assert coverage.missing_pieces(0, 8, steps=64) == [Piece(4, 5, 0, 12)]
    opened = TeacherStore(store)
    assert np.array_equal(opened.read(np.arange(48, 56)).numpy(), EVERYTHING[48:56])
    with pytest.raises(UserError, match="step 4 is not recorded for row 8"):
        opened.read(np.arange(48, 60))


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_that_of_every_step_and_row_by_itself(tmp_path, seed):
    generator = np.random.default_rng(seed)
    recorded = np.zeros((40, 12), dtype=bool)
    for _ in range(25):
        first_step, first_row = int(generator.integers(36)), 4 * int(generator.integers(3))
        piece = Piece(first_step, first_step + int(generator.integers(1, 5)), first_row, 4 * (first_row // 4 + 1))
        (tmp_path / piece.name).touch()
        recorded[piece.first_step : piece.stop_step, piece.first_row : piece.stop_row] = True
    coverage = Coverage(tmp_path, HEADER)
    assert all(bool(coverage.holding(step, row)) == recorded[step, row] for step, row in np.ndindex(40, 12))
    missing = [step for step in range(40) if not recorded[step].all()]
    blocks = coverage.missing_pieces(0, 40, steps=8)
    assert [step for each in blocks for step in range(each.first_step, each.stop_step)] == missing
    assert all(each.first_step // 8 == (each.stop_step - 1) // 8 for each in blocks)
    assert coverage.first_missing(0, 40) == missing[0]


def test_a_piece_that_is_there_is_kept(store):
    piece = PIECES[0]
    before = (store / piece.name).stat()
    assert not write_piece(store, HEADER, piece, np.zeros_like(rows_of(piece)))
    assert (store / piece.name).stat() == before and np.array_equal(
        TeacherStore(store).read(np.arange(48)).numpy(), EVERYTHING[:48]
    )
    assert len(find_pieces(store, HEADER)) == 4 and len(list(store.iterdir())) == 5


def test_rows_that_are_not_a_piece_are_no_piece(tmp_path):
    for piece in (Piece(0, 2, 0, 6), Piece(2, 2, 0, 4), Piece(0, 2, 0, 16)):
        with pytest.raises(ValueError, match="rows are uint8"):
            write_piece(tmp_path, HEADER, piece, rows_of(piece))
    with pytest.raises(ValueError, match="rows are float32"):
        write_piece(tmp_path, HEADER, Piece(0, 2, 0, 4), np.zeros((2, 4, 5), np.float32))
    assert not list(tmp_path.iterdir())


def test_a_damaged_image_counts_once(store):
    assert TeacherStore(store).num_quarantined() == 0
    line = {"split": "train", "shard": "train-00000.tar", "key": "a", "offset": 512, "error": "ends early"}
    lines = [line, {**line, "error": "as another recorder found it"}, {**line, "key": "b", "offset": 2048}]
    (store / "quarantine.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"split": "tr')
    assert TeacherStore(store).num_quarantined() == 2 and not list(verify(store))
