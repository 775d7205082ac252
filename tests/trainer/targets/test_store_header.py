"""store.json: one header for all recorders, and a refusal that names what differs."""

import copy
import dataclasses
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.common.errors import UserError
from pipelines.plan.plan import BEFORE
from support.small_store import HEADER, PLAN, TEACHER
from trainer.targets.header import StoreHeader, check_plan, check_same, claim, read_header

ADVICE = "Use the same, or record another store with tools/record_teacher.py"


def test_a_header_is_read_as_it_was_written(tmp_path):
    header = dataclasses.replace(HEADER, plan={**PLAN, "augment.ratio": (0.75, 4 / 3)}, made_with={"n": (1, 2)})
    assert claim(tmp_path / "runs" / "store", header) == header == read_header(tmp_path / "runs" / "store")
    assert [path.name for path in (tmp_path / "runs" / "store").iterdir()] == ["store.json"]


def test_the_identity_is_that_of_everything_but_what_made_it():
    assert dataclasses.replace(HEADER, made_with={}).identity == HEADER.identity
    others = [
        dataclasses.replace(HEADER, plan={**PLAN, "seed": 1}),
        dataclasses.replace(HEADER, num_classes=6),
        dataclasses.replace(HEADER, teacher=dataclasses.replace(TEACHER, weights="cd" * 32)),
        dataclasses.replace(HEADER, codec="fp16"),
        dataclasses.replace(HEADER, precision="fp16"),
        dataclasses.replace(HEADER, transcoded_from=["fp16"]),
    ]
    assert len({header.identity for header in [HEADER, *others]}) == 7


def test_recorders_that_claim_at_once_get_one_header(tmp_path):
    """They differ in what made them; each must write the pieces of the store that is there."""
    for attempt in range(20):
        store, together = tmp_path / str(attempt), threading.Barrier(8)

        def claimed(number, store=store, together=together):
            header = dataclasses.replace(HEADER, made_with={"machine": number})
            together.wait()
            return claim(store, header)

        with ThreadPoolExecutor(8) as threads:
            headers = list(threads.map(claimed, range(8)))
        assert all(header == headers[0] == read_header(store) for header in headers)
        assert [path.name for path in store.iterdir()] == ["store.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"plan": {**PLAN, "seed": 1}}, "seed 0, and run.seed is 1"),
        ({"plan": {**PLAN, "image_size": [[0, 32], [5, 40]]}}, r"image_size 32, and .* is \[\[0, 32\], \[5, 40\]\]"),
        ({"plan": {**PLAN, "fill": [128] * 3}}, r"fill \[124, 116, 104\], and .* is \[128, 128, 128\]"),
        ({"plan": {**PLAN, "augment.erase_prob": 0.5}}, "augment.erase_prob 0.0, and augment.erase_prob is 0.5"),
        ({"plan": {**PLAN, "invented": 2}}, "invented None, and invented is 2"),
        ({"num_classes": 6}, "num_classes 5, and the number of the dataset's classes is 6"),
        (
            {"teacher": dataclasses.replace(TEACHER, name="resnet18")},
            "name test_resnet, and the wanted .*name is resnet18",
        ),
        (
            {"teacher": dataclasses.replace(TEACHER, kwargs={})},
            r"kwargs {'drop_rate': 0.0}, and the wanted .*kwargs is {}",
        ),
        (
            {"teacher": dataclasses.replace(TEACHER, image_size=64)},
            "image_size 0, and the wanted .*image_size is 64",
        ),
        (
            {"teacher": dataclasses.replace(TEACHER, weights="cd" * 32)},
            "weights (ab){28,32}.*, and the wanted teacher.weights is cd",
        ),
        ({"teacher": dataclasses.replace(TEACHER, order="ef")}, "order None, and the wanted teacher.order is ef"),
        ({"codec": "fp16"}, "codec int8, and the wanted codec is fp16"),
        ({"transcoded_from": ["fp16"]}, "codec int8, and the wanted codec is int8 transcoded from fp16"),
        ({"precision": "bf16"}, "precision fp32, and the wanted precision is bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_header_is_refused_by_the_first_field_that_differs(tmp_path, change, message):
    claim(tmp_path, HEADER)
    before = (tmp_path / "store.json").read_bytes()
    with pytest.raises(UserError, match=rf"^{tmp_path}: was recorded with (teacher\.)?{message}.*\. {ADVICE}$"):
        claim(tmp_path, dataclasses.replace(HEADER, **change))
    assert (tmp_path / "store.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, message",
    [("pipeline", "data.pipeline is dali"), ("pipelines", "this program's version of the pixels is dali")],
)
def test_a_store_has_the_pixels_of_one_pipeline(tmp_path, name, message):
    """A run that replays it compares the header with its own pipeline, so the header must be true of all pieces."""
    claim(tmp_path, dataclasses.replace(HEADER, made_with={name: "cpu", "threads": 2}))
    with pytest.raises(UserError, match=rf"^{tmp_path}: was recorded with {name} cpu, and {message}\. {ADVICE}$"):
        claim(tmp_path, dataclasses.replace(HEADER, made_with={name: "dali"}))
    for made_with in ({name: "cpu", "threads": 3, "device": "H200"}, {}):
        assert claim(tmp_path, dataclasses.replace(HEADER, made_with=made_with)).made_with["threads"] == 2


def test_what_a_store_was_made_with_is_compared_by_name():
    header = dataclasses.replace(HEADER, made_with={"pipeline": "cpu", "threads": 2, "timm": "0.9"})
    assert header.made_otherwise({"pipeline": "cpu", "threads": 2, "torch": "2"}) == ""
    found = header.made_otherwise({"pipeline": "cpu", "threads": "as of the pipeline", "timm": "1.0"})
    assert found == (
        "was recorded with threads 2 instead of as of the pipeline; timm 0.9 instead of 1.0, so its outputs may differ "
        "in the last bits"
    )
    assert header.made_otherwise({"pipeline": "dali", "timm": "1.0"}).endswith("1.0, so its pixels differ a little")


def test_a_run_compares_the_plan_and_the_classes_alone(tmp_path):
    other = dataclasses.replace(HEADER, codec="fp16", precision="bf16", teacher=dataclasses.replace(TEACHER, name="x"))
    check_plan(tmp_path, other, PLAN, 5)
    with pytest.raises(UserError, match="seed 0, and run.seed is 1"):
        check_plan(tmp_path, HEADER, {**PLAN, "seed": 1}, 5)
    with pytest.raises(UserError, match="num_classes 5, and the number of the dataset's classes is 6"):
        check_plan(tmp_path, HEADER, PLAN, 6)


def test_the_number_of_repeated_epochs_is_no_matter_of_a_store(tmp_path):
    repeated = dataclasses.replace(HEADER, plan={**PLAN, "augment.cycle_epochs": 50})
    assert repeated == HEADER and repeated.identity == HEADER.identity
    check_plan(tmp_path, HEADER, {**PLAN, "augment.cycle_epochs": 50}, 5)


def test_a_store_lacks_settings_that_are_younger_than_it(tmp_path):
    assert "augment.erase_prob" in BEFORE
    check_plan(tmp_path, HEADER, {**PLAN, **BEFORE}, 5)


def test_the_same_weights_may_lie_in_another_file(tmp_path):
    moved = dataclasses.replace(HEADER, teacher=dataclasses.replace(TEACHER, checkpoint="22" * 32))
    check_same(tmp_path, HEADER, moved)
    assert moved.identity == HEADER.identity and moved.content() != HEADER.content()


def test_every_changed_byte_is_found(tmp_path):
    claim(tmp_path, HEADER)
    path = tmp_path / "store.json"
    content = path.read_bytes()
    for offset in range(len(content)):
        for flip in (1 << offset % 8, 0xFF):
            path.write_bytes(content[:offset] + bytes([content[offset] ^ flip]) + content[offset + 1 :])
            with pytest.raises(UserError, match=f"^{path}: (damaged|has format version)"):
                read_header(tmp_path)
    for changed in (content[:-1], content + b"\n", content.replace(b'"int8"', b' "int8"'), b""):
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged, or not written by this program. Restore it from a copy"):
            read_header(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"{}",
        b" " * (1 << 21),
        b'{"format_version": true}',
        b"\xff\xfe",
        json.dumps(
            {
                "format_version": 2,
                "plan": 3,
                "num_classes": 5,
                "teacher": {},
                "codec": [],
                "precision": "",
                "made_with": 0,
            }
        ).encode(),
    ],
    ids=lambda content: content[:8].decode(errors="replace"),
)
def test_what_is_no_header_is_one_line(tmp_path, content):
    (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(UserError, match="store.json: damaged, or not written by this program"):
        read_header(tmp_path)


@pytest.mark.parametrize("depth", [100, 300, 500, 900])
def test_a_forged_header_of_any_depth_is_one_line(tmp_path, depth):
    """Reading JSON, copying and writing it each have a limit of their own."""
    content = HEADER.content().replace(b'"seed": 0', b'"seed": ' + b"[" * depth + b"]" * depth)
    (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(UserError, match="store.json: damaged, or not written by this program"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"made_with": [1]},
        {"precision": 16},
        {"num_classes": 5.0},
        {"teacher": dataclasses.replace(TEACHER, name=3)},
        {"teacher": dataclasses.replace(TEACHER, kwargs=[])},
        {"teacher": dataclasses.replace(TEACHER, image_size="64")},
        {"teacher": dataclasses.replace(TEACHER, order=["a"])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_forged_header_with_values_of_other_types_is_one_line(tmp_path, change):
    """Its hashes are right; who reads it may rely on the types of its fields."""
    header = copy.copy(HEADER)
    vars(header).update(change)
    vars(header).pop("identity", None)
    (tmp_path / "store.json").write_bytes(header.content())
    with pytest.raises(UserError, match="store.json: damaged, or not written by this program"):
        read_header(tmp_path)


def test_sizes_that_no_store_has_are_refused():
    """A file may claim any number; memory is taken for a group of rows."""
    for num_classes in (0, -1, 10**18, True, "5", 1.5):
        with pytest.raises(UserError, match="num_classes is .*; a store needs a number from 1 to 1048576"):
            dataclasses.replace(HEADER, num_classes=num_classes)
    for plan in ({}, {**PLAN, "global_batch": 10**12}, {**PLAN, "augment.mix_group": None}):
        with pytest.raises(UserError, match="(global_batch|mix_group) is .*; a store needs a number"):
            dataclasses.replace(HEADER, plan=plan)
    with pytest.raises(UserError, match="augment.mix_group is 5; it must divide global_batch, 12"):
        dataclasses.replace(HEADER, plan={**PLAN, "augment.mix_group": 5})
    large = {**PLAN, "global_batch": 1 << 20, "augment.mix_group": 1 << 20}
    with pytest.raises(UserError, match="its 1099511627776 bytes of outputs must be at most"):
        StoreHeader(large, 1 << 20, TEACHER, "int8", "fp32", {})
    with pytest.raises(UserError, match="codec is 'zip'; it must be one of int8, fp32, fp16, compact, topK"):
        dataclasses.replace(HEADER, codec="zip")


def test_what_is_no_store_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="is no teacher store, because it has no store.json. Name a store"):
            read_header(folder)
    (tmp_path / "store.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="a git-lfs pointer, not the file itself. Run 'git lfs pull'"):
        read_header(tmp_path)
    (tmp_path / "store.json").unlink()
    os.mkfifo(tmp_path / "store.json")  # A reader would wait for a writer.
    with pytest.raises(UserError, match=r"store.json: cannot be read"):
        read_header(tmp_path)


def test_another_format_version_is_named(tmp_path):
    claim(tmp_path, HEADER)
    path = tmp_path / "store.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 2', b'"format_version": 1'))
    with pytest.raises(UserError, match="has format version 1, and this program reads 2. Use the version"):
        read_header(tmp_path)
