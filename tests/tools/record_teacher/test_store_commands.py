"""Stores are looked at, checked, merged and written in a smaller codec; no file that was recorded ever changes."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.plan.plan import BEFORE
from pipelines.shards.quarantine import QUARANTINE
from support.recordings import files, pieces, record, save_teacher
from support.small_store import HEADER, PIECES, PLAN, write_small_store
from tools.lib.record_teacher.merge import merge
from tools.lib.record_teacher.transcode import losses, transcode
from tools.record_teacher import main
from trainer.targets.codec import open_codec
from trainer.targets.header import claim
from trainer.targets.pieces import Piece, write_piece
from trainer.targets.store import TeacherStore

ALL = np.arange(1280)
INT8 = ("--codec", "int8")
LINE = {"split": "train", "shard": "train-00000.tar", "key": "a", "offset": 512, "error": "PIL cannot decode it"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> list[str]:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(scope="module")
def exact(digits, teacher, tmp_path_factory) -> Path:
    """A recording of fp32, 160 steps in three pieces."""
    return record(tmp_path_factory.mktemp("stores") / "exact", digits, teacher, "--codec", "fp32")


@pytest.fixture
def parts(exact, tmp_path) -> list[Path]:
    """The recording in two stores: the first piece, and the two others."""
    for name, kept in (("first", (0,)), ("second", (1, 2))):
        shutil.copytree(exact, tmp_path / name)
        for number, piece in enumerate(pieces(exact)):
            if number not in kept:
                (tmp_path / name / piece).unlink()
    return [tmp_path / "first", tmp_path / "second"]


def change_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.unlink()  # The file may have a second name.
    path.write_bytes(content)


def error_of(arguments: list, capsys, *, printed: bool = False) -> str:
    """The line with which a command ends, behind what it has `printed` if that is wanted."""
    with pytest.raises(SystemExit) as end:
        main([str(each) for each in arguments])
    assert end.value.code == 1
    said = capsys.readouterr()
    return said.out + said.err if printed else said.err


# --- info and verify ---


def test_info_lists_what_a_store_is_of_and_how_much_it_has(exact, parts, capsys):
    main(["info", str(exact)])
    said = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line.partition("  ")[2].strip() for line in said.splitlines()}
    header = TeacherStore(exact).header
    assert len(said.splitlines()) == len(rows) == 12 and rows["all else"] == str(exact / "store.json")
    assert rows["identity"] == header.identity and rows["its weights"] == f"sha256 {header.teacher.weights}"
    assert rows["teacher"] == "tiny_cnn, at the plan's image size, in fp32"
    assert rows["codec"] == "fp32, 40 bytes a position" and rows["damaged images"] == "0"
    assert rows["dataset"] == f"{header.plan['dataset']}, 10 classes"
    assert rows["plan"] == "seed 0, global_batch 8, image_size 32, fill [128, 128, 128]"
    assert rows["made with"].startswith("pipeline torchvision, decode ") and ", torch " in rows["made with"]
    assert rows["steps, by the names of files"] == "160 recorded: 4 epochs of 40 steps each"
    assert rows["size"].endswith(" kB in 3 pieces") and rows["unfinished"] == "0 bytes in 0 files"
    (parts[1] / QUARANTINE).write_text(json.dumps(LINE) + "\n")
    main(["info", str(parts[1])])
    said = " ".join(capsys.readouterr().out.split())
    assert "96 recorded: 2.4 epochs of 40 steps each; of the first 160 the first missing one is 0" in said
    assert "damaged images 1" in said


def test_info_counts_what_killed_recorders_have_left(exact, parts, capsys):
    for token in ("0123abcd", "4567cdef"):
        (parts[0] / f"{pieces(exact)[1]}.{token}.partial").write_bytes(bytes(750_000))
    main(["info", str(parts[0])])
    said = " ".join(capsys.readouterr().out.split())
    assert "unfinished 1.5 MB in 2 files; remove *.partial when no recorder runs" in said


def test_info_does_not_mind_a_file_that_a_recorder_renames_meanwhile(parts, capsys):
    (parts[0] / "00000064-00000128.0-8.safetensors.0123abcd.partial").symlink_to("gone")  # It is listed, and not found.
    main(["info", str(parts[0])])
    said = " ".join(capsys.readouterr().out.split())
    assert "unfinished 0 bytes in 0 files;" in said and " kB in 1 piece " in said


def test_a_forged_name_of_a_distant_step_costs_no_time(parts, capsys):
    """Going through the steps in front of it one by one would take a day."""
    (parts[0] / "9999999998-9999999999.0-8.safetensors").touch()
    main(["info", str(parts[0])])
    said = capsys.readouterr().out
    assert "65 recorded" in said and "of the first 9,999,999,999 the first missing one is 64" in said
    (parts[1] / "00000000-9999999999.0-8.safetensors").touch()  # Its rows would take 3 TB of memory.
    assert "has 0 bytes instead of" in error_of(["transcode", parts[1], parts[1].with_name("x"), *INT8], capsys)
    (parts[0] / "9999999998-9999999999.0-8.safetensors").unlink()
    assert "has 0 bytes instead of" in merge(parts[0], parts[1:])[1][0] and pieces(parts[0])[1:] == pieces(parts[1])[1:]


def test_verify_finds_nothing_in_an_intact_store_and_names_each_fault_of_another(exact, tmp_path, capsys):
    main(["verify", str(exact)])
    steps = "160 recorded: 4 epochs of 40 steps each"
    assert capsys.readouterr().out == f"{exact}: no damage found; steps: {steps}\n"
    store = shutil.copytree(exact, tmp_path / "store")
    change_byte(store / pieces(store)[1], -1)
    (store / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["verify", str(store)])
    said = capsys.readouterr()
    assert end.value.code == 1 and len(said.out.splitlines()) == 2
    assert f"{pieces(store)[1]}: is damaged at step 127" in said.out and "notes.txt" in said.out
    assert "faults named above: 2. Each says what to do" in said.err


def test_verify_says_which_step_is_missing(parts, capsys):
    main(["verify", str(parts[1])])
    said = capsys.readouterr().out
    assert "no damage found; steps: 96 recorded: 2.4 epochs" in said and "of the first 160 the first missing" in said
    gap = f"warning: {parts[1]}: lacks steps 0 to 63, and has later ones. To fill the gap, record them with tools/"
    assert said.startswith(gap)
    main(["verify", str(parts[0])])
    said = capsys.readouterr().out
    assert said == f"{parts[0]}: no damage found; steps: 64 recorded: 1.6 epochs of 40 steps each\n"


def test_what_verify_names_can_be_moved_away_and_is_recorded_again(exact, digits, teacher, tmp_path):
    store = shutil.copytree(exact, tmp_path / "store")
    change_byte(store / pieces(store)[1], -1)
    (store / pieces(store)[1]).rename(tmp_path / "damaged")
    record(store, digits, teacher, "--codec", "fp32")
    assert files(store) == files(exact)


@pytest.mark.parametrize("arguments", [["info"], ["verify"], ["merge", "STORE"], ["transcode"]], ids=str)
def test_a_folder_that_is_no_store_is_named(tmp_path, capsys, arguments):
    none = tmp_path / "none"
    rest = [tmp_path / "out", "--codec", "int8"] if arguments[0] == "transcode" else []
    words = [arguments[0], *[tmp_path / word for word in arguments[1:]], none, *rest]
    if arguments[0] == "verify":
        with pytest.raises(SystemExit):
            main([str(each) for each in words])
        assert f"{none}: is no teacher store" in capsys.readouterr().out
    else:
        assert f"error: {none}: is no teacher store" in error_of(words, capsys)
    assert not list(tmp_path.iterdir())


# --- merge ---


def test_merged_parts_are_the_store_of_one_recording(exact, parts, tmp_path, capsys):
    before = [files(part) for part in parts]
    main(["merge", str(tmp_path / "merged"), *map(str, parts)])
    assert files(tmp_path / "merged") == files(exact) and [files(part) for part in parts] == before
    assert "pieces added: 3" in capsys.readouterr().out
    main(["merge", str(parts[0]), str(parts[1])])
    assert files(parts[0]) == files(exact) and "pieces added: 2" in capsys.readouterr().out
    main(["merge", str(parts[0]), str(parts[1])])
    assert "pieces added: 0" in capsys.readouterr().out


def test_a_merged_piece_is_the_same_file_or_a_copy_where_there_are_no_links(exact, parts, tmp_path, monkeypatch):
    merge(tmp_path / "linked", parts)
    first = pieces(exact)[0]
    assert os.path.samefile(tmp_path / "linked" / first, parts[0] / first)

    link = os.link

    def no_links(source, target):
        if str(source).endswith(".partial"):  # A new file gets its name by a link within a folder.
            return link(source, target)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_links)
    added, faults = merge(tmp_path / "copied", parts)
    assert (added, faults) == (3, []) and files(tmp_path / "copied") == files(exact)
    assert not os.path.samefile(tmp_path / "copied" / first, parts[0] / first)


def test_a_piece_that_is_a_symbolic_link_is_merged_as_the_file_that_it_leads_to(exact, parts, tmp_path):
    first = parts[0] / pieces(exact)[0]
    (tmp_path / "disk").mkdir()
    first.rename(tmp_path / "disk" / first.name)
    first.symlink_to(f"../disk/{first.name}")  # In another folder this name leads nowhere.
    merged = tmp_path / "more" / "merged"
    assert merge(merged, parts) == (3, []) and not (merged / first.name).is_symlink()
    assert files(merged) == files(exact)


def test_a_damaged_piece_is_named_and_not_merged(exact, parts, tmp_path, capsys):
    change_byte(parts[1] / pieces(exact)[2], -1)
    with pytest.raises(SystemExit) as end:
        main(["merge", str(tmp_path / "merged"), *map(str, parts)])
    said = capsys.readouterr()
    assert end.value.code == 1 and f"{pieces(exact)[2]}: is damaged at step 159" in said.out
    assert "damaged pieces: 1. Each line above" in said.err and pieces(tmp_path / "merged") == pieces(exact)[:2]


def test_a_damaged_piece_of_the_store_itself_is_named_and_replaced_once_it_is_moved_away(exact, tmp_path, capsys):
    store = shutil.copytree(exact, tmp_path / "store")
    piece = store / pieces(exact)[1]
    change_byte(piece, -1)
    before = files(store)
    said = error_of(["merge", store, exact], capsys, printed=True)
    assert (
        f"{piece}: is damaged, and {exact / piece.name} is intact. Move the damaged file away and merge again" in said
    )
    assert "damaged pieces: 1. Each line above says what to do" in said and files(store) == before
    piece.rename(tmp_path / "damaged")
    assert merge(store, [exact]) == (1, []) and files(store) == files(exact)
    other = shutil.copytree(exact, tmp_path / "other")
    for each in (store, other):
        change_byte(each / piece.name, -1)
    added, faults = merge(store, [other])  # None of the two can replace the other.
    assert added == 0 and len(faults) == 1 and "is damaged at step 127. Move it away, and record" in faults[0]


def test_the_name_of_a_linked_piece_is_put_on_the_disk(parts, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("tools.lib.record_teacher.merge.sync_folder", synced.append)
    assert merge(tmp_path / "merged", parts) == (3, []) and synced == [tmp_path / "merged"] * 3


def test_damaged_images_are_named_once_in_the_merged_store(parts, tmp_path):
    other = {**LINE, "key": "b", "offset": 1024}
    for part, lines in zip(parts, ([LINE], [other, LINE]), strict=True):
        (part / QUARANTINE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        merge(tmp_path / "merged", parts)
    assert (tmp_path / "merged" / QUARANTINE).read_text() == f"{json.dumps(LINE)}\n{json.dumps(other)}\n"


def test_a_list_of_damaged_images_that_is_none_is_not_merged(parts, tmp_path, capsys):
    with open(parts[1] / QUARANTINE, "wb") as file:
        file.truncate(1 << 40)
    said = error_of(["merge", tmp_path / "merged", *parts], capsys)
    assert f"error: {parts[1] / QUARANTINE}: has more than 67108864 bytes, so it is no list" in said


def test_a_source_that_was_recorded_with_something_else_is_named(tmp_path, capsys):
    made = [dataclasses.replace(HEADER, made_with={"pipeline": "dali", "threads": number}) for number in (2, 4)]
    store, source = (write_small_store(tmp_path / str(each.made_with["threads"]), each) for each in made)
    assert merge(store, [source]) == (0, [])
    assert f"note: {source} was recorded with threads 4 instead of 2, so its outputs may" in capsys.readouterr().err
    assert merge(store, [write_small_store(tmp_path / "same", made[0])]) == (0, []) and not capsys.readouterr().err


def test_stores_of_two_pipelines_are_not_merged(tmp_path, capsys):
    made = [dataclasses.replace(HEADER, made_with={"pipeline": name}) for name in ("dali", "torchvision")]
    store, source = (write_small_store(tmp_path / each.made_with["pipeline"], each, PIECES[:1]) for each in made)
    said = error_of(["merge", store, source], capsys)
    assert f"{source}: was recorded with pipeline torchvision, and data.pipeline is dali. Use the same, or" in said
    assert "pipeline torchvision, and" in error_of(["merge", tmp_path / "new", store, source], capsys)
    assert not (tmp_path / "new").exists()


def test_a_store_of_a_larger_codec_is_to_be_transcoded_where_that_adds_the_same(exact, parts, tmp_path, capsys):
    transcode(parts[0], tmp_path / "int8", "int8")
    said = error_of(["merge", tmp_path / "int8", parts[1]], capsys)
    advice = f"transcode {parts[1]} {tmp_path / 'int8'} --codec int8"
    assert f"{parts[1]}: is stored as fp32, and {tmp_path / 'int8'} as int8. To add its steps, use" in said
    assert f"'tools/record_teacher.py {advice}'" in said
    main(advice.split())
    assert f"note: adds to {tmp_path / 'int8'}, which has 64 steps" in capsys.readouterr().err
    transcode(exact, tmp_path / "whole", "int8")
    assert files(tmp_path / "int8") == files(tmp_path / "whole")
    transcode(exact, tmp_path / "fp16", "fp16")  # From fp16 the rows would be others.
    assert "was recorded with codec fp16, and the wanted" in error_of(
        ["merge", tmp_path / "int8", tmp_path / "fp16"], capsys
    )
    assert "was recorded with codec int8, and the wanted" in error_of(
        ["merge", tmp_path / "fp16", tmp_path / "int8"], capsys
    )


def test_a_store_of_something_else_is_not_merged_and_nothing_is_added(exact, digits, teacher, parts, tmp_path, capsys):
    other = record(tmp_path / "other", digits, teacher, "--codec", "fp32", "--run.seed", 1, "--epochs", 1)
    before = files(parts[0])
    said = error_of(["merge", parts[0], parts[1], other], capsys)
    assert f"error: {other}: was recorded with seed 1, and run.seed is 0. Use the same" in said
    assert files(parts[0]) == before
    assert f"error: {other}: was recorded with seed 1" in error_of(["merge", tmp_path / "new", exact, other], capsys)
    assert not (tmp_path / "new").exists()
    assert "is the store itself. Name other stores" in error_of(["merge", parts[0], parts[0]], capsys)


def test_weights_of_another_file_are_the_same_teacher(exact, digits, tmp_path):
    """A header names the file, and the identity of a store does not depend on it."""
    file = save_teacher(tmp_path / "plain.pth")
    content = torch.load(file[-1], weights_only=True)
    torch.save({"state_dict": content}, file[-1])
    other = record(tmp_path / "other", digits, file, "--codec", "fp32")
    headers = [TeacherStore(each).header for each in (other, exact)]
    assert headers[0].identity == headers[1].identity and headers[0].teacher.checkpoint != headers[1].teacher.checkpoint
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(exact / "store.json", store)
    assert merge(store, [other]) == (3, []) and files(store) == files(exact)
    assert os.path.samefile(store / pieces(exact)[0], other / pieces(exact)[0])


def test_pieces_of_a_store_that_is_older_than_a_setting_are_copied_under_the_identity_of_the_other(tmp_path):
    """Each piece names the identity of its store, which the settings in its header decide."""
    younger = dataclasses.replace(HEADER, plan={**BEFORE, **PLAN})
    assert younger.identity != HEADER.identity
    whole = write_small_store(tmp_path / "whole", younger)
    source, store = write_small_store(tmp_path / "source"), write_small_store(tmp_path / "store", younger, ())
    assert merge(store, [source]) == (len(PIECES), []) and files(store) == files(whole)


# --- transcode ---


def test_a_transcoded_store_is_the_one_that_the_smaller_codec_would_have_recorded(
    exact, digits, teacher, tmp_path, capsys
):
    before = files(exact)
    main(["transcode", str(exact), str(tmp_path / "int8"), "--codec", "int8"])
    said = capsys.readouterr().out
    assert "pieces written as int8: 3" in said and "lost, over 24 positions: KL " in said
    assert files(exact) == before
    recorded, found = TeacherStore(record(tmp_path / "recorded", digits, teacher)), TeacherStore(tmp_path / "int8")
    assert torch.equal(found.read(ALL), recorded.read(ALL)) and found.header.identity == recorded.header.identity
    again = said.replace("pieces written as int8: 3", "pieces written as int8: 0")
    (tmp_path / "int8" / pieces(exact)[1]).unlink()
    for expected in (again.replace("int8: 0", "int8: 1"), again):  # What is there is measured once more.
        main(["transcode", str(exact), str(tmp_path / "int8"), "--codec", "int8"])
        assert capsys.readouterr().out == expected


def test_a_store_that_comes_from_a_lossy_codec_is_neither_continued_nor_merged_as_a_direct_one(
    exact, digits, teacher, tmp_path, capsys
):
    transcode(exact, tmp_path / "fp16", "fp16")
    transcode(tmp_path / "fp16", tmp_path / "int8", "int8")
    transcode(exact, tmp_path / "direct", "int8")
    headers = [TeacherStore(tmp_path / name).header for name in ("int8", "direct")]
    assert headers[0].transcoded_from == ["fp16"] and headers[1].transcoded_from == []
    assert headers[0].identity != headers[1].identity
    before, says = (
        files(tmp_path / "int8"),
        "was recorded with codec int8 transcoded from fp16, and the wanted codec is int8.",
    )
    with pytest.raises(SystemExit):
        record(tmp_path / "int8", digits, teacher, *INT8)
    assert says in capsys.readouterr().err
    assert says in error_of(["merge", tmp_path / "direct", tmp_path / "int8"], capsys)
    assert files(tmp_path / "int8") == before
    main(["info", str(tmp_path / "int8")])
    assert "int8 transcoded from fp16" in capsys.readouterr().out
    assert transcode(tmp_path / "fp16", tmp_path / "int8", "int8")[0] == 0  # The same command continues it.


def test_a_transcoding_that_was_interrupted_is_completed(exact, tmp_path):
    transcode(exact, tmp_path / "once", "int8")
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    (tmp_path / "twice" / pieces(exact)[1]).unlink()
    assert transcode(exact, tmp_path / "twice", "int8")[0] == 1
    assert files(tmp_path / "twice") == files(tmp_path / "once")


@pytest.mark.parametrize(("codec", "size"), [("fp32", "40 bytes"), ("fp16", "20 bytes"), ("int8", "10 bytes")])
def test_a_codec_that_is_not_smaller_is_refused(exact, tmp_path, capsys, codec, size):
    transcode(exact, tmp_path / "int8", "int8")
    said = error_of(["transcode", tmp_path / "int8", tmp_path / "out", "--codec", codec], capsys)
    assert f"--codec {codec} takes {size} a position" in said and "has 10 (int8)" in said
    assert not (tmp_path / "out").exists()


def test_a_damaged_piece_ends_a_transcoding_and_is_named(exact, tmp_path, capsys):
    store = shutil.copytree(exact, tmp_path / "store")
    change_byte(store / pieces(store)[1], -1)
    said = error_of(["transcode", store, tmp_path / "out", "--codec", "int8"], capsys)
    assert f"{pieces(store)[1]}: is damaged at step 127" in said
    assert pieces(tmp_path / "out") == pieces(exact)[:1]


def test_a_damaged_piece_is_passed_over_for_one_that_holds_its_rows_intact(tmp_path):
    """Recorders that overlap leave both; a run reads such a store, too."""
    header = claim(tmp_path / "whole", dataclasses.replace(HEADER, codec="fp32"))
    rows = np.random.default_rng(0).normal(size=(4, 12, 5)).astype(np.float32).view(np.uint8)
    overlapping = Piece(0, 3, 0, 12), Piece(1, 4, 0, 12)
    for piece in overlapping:
        write_piece(tmp_path / "whole", header, piece, rows[piece.first_step : piece.stop_step])
    store = shutil.copytree(tmp_path / "whole", tmp_path / "store")
    change_byte(store / overlapping[0].name, -1)  # in step 2, which the other piece has
    for name in ("whole", "store"):
        assert transcode(tmp_path / name, tmp_path / f"{name}-fp16", "fp16")[0] == 2
    assert files(tmp_path / "store-fp16") == files(tmp_path / "whole-fp16")
    change_byte(store / overlapping[1].name, -1 - 12 * 20)  # the same rows in the other piece
    with pytest.raises(UserError, match="is damaged at step 2"):
        transcode(store, tmp_path / "none", "fp16")


def test_logits_that_no_recorder_writes_end_a_transcoding(exact, tmp_path, capsys):
    store = tmp_path / "store"
    header = claim(store, TeacherStore(exact).header)
    rows = np.zeros((2, 8, 10), np.float32)
    rows[1, 3, 7] = np.nan
    write_piece(store, header, Piece(4, 6, 0, 8), rows.view(np.uint8))
    said = error_of(["transcode", store, tmp_path / "out", *INT8], capsys)
    assert f"{store / '00000004-00000006.0-8.safetensors'}: has logits at step 5 that are not finite." in said
    assert pieces(tmp_path / "out") == []


def test_logits_that_the_smaller_codec_does_not_hold_end_a_transcoding(exact, tmp_path, capsys):
    header = claim(tmp_path / "store", TeacherStore(exact).header)
    rows = np.zeros((1, 8, 10), np.float32)
    rows[0, 2, 1] = 65_505
    write_piece(tmp_path / "store", header, Piece(4, 5, 0, 8), rows.view(np.uint8))
    said = error_of(["transcode", tmp_path / "store", tmp_path / "fp16", "--codec", "fp16"], capsys)
    assert "has logits at step 4 that are not finite or beyond 65,504. Use another codec than fp16, or" in said
    assert pieces(tmp_path / "fp16") == []
    assert transcode(tmp_path / "store", tmp_path / "int8", "int8")[0] == 1


def test_a_transcoding_leaves_the_number_of_threads_unchanged(exact, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        transcode(exact, tmp_path / "out", "int8")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_damaged_images_go_with_a_transcoded_store(parts, tmp_path):
    (parts[0] / QUARANTINE).write_text(json.dumps(LINE) + "\n")
    transcode(parts[0], tmp_path / "out", "int8")
    assert TeacherStore(tmp_path / "out").num_quarantined() == 1


def test_the_loss_is_measured_as_it_is_defined():
    before = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    after = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    found = losses(before, after, seed=0)
    p, q = before.softmax(1), after.softmax(1)
    kl = (p[1] * (p[1] / q[1]).log()).sum()
    student = (before + torch.randn(2, 3, generator=torch.Generator().manual_seed(0))).softmax(1)
    gradients = [(p[1] - each).norm() for each in (1 / 3, student[1])]
    assert found.shape == (2, 4) and found[0].tolist() == [0, 0, 0, 1]
    expected = torch.stack([kl, *((p - q)[1].norm() / each for each in gradients), torch.tensor(0.0)])
    assert torch.allclose(found[1], expected) and found[1, 2] > 0


def test_what_is_lost_is_a_mean_over_the_first_step_of_each_piece(exact, tmp_path):
    said = transcode(exact, tmp_path / "fp16", "fp16")[1]
    store = TeacherStore(exact)
    before = store.codec.decode(store.read(np.concatenate([np.arange(8) + 512 * piece for piece in range(3)])))
    codec = open_codec("fp16", 10)
    each = [losses(rows, codec.decode(codec.encode(rows)), seed=64 * i) for i, rows in enumerate(before.split(8))]
    kl, uniform, noised, same = torch.cat(each).double().mean(0).tolist()
    assert said == (
        f"lost, over 24 positions: KL {kl:.2g} nats; gradient moved by {uniform:.2%} (uniform student) and "
        f"{noised:.2%} (the teacher with noise); best class the same in {same:.2%}"
    )
