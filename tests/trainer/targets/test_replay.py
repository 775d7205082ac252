"""Runs that learn from a recorded teacher, beside runs whose teacher is live."""

import json
import re

import pytest
import torch

from conftest import DROPOUT, REPOSITORY, TINY, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from support.ranks import Ranks, run_ranks
from support.recorded import record
from support.recordings import save_teacher
from support.tiny_runs import assert_same_end, build_here, first_batches, newest
from trainer import builder, run
from trainer.state.checkpoint import checkpoints, checkpoints_folder

STEPS = 20  # four epochs of five updates


@pytest.fixture(scope="module")
def store(digits, tiny_teacher, tmp_path_factory):
    """The whole run's outputs of the teacher as fp32, in groups of 32."""
    folder = tmp_path_factory.mktemp("stores")
    run = build_here(digits, folder / "none", *tiny_teacher, "--augment.mix_group", 32)
    return record(run, folder / "store", STEPS)


@pytest.fixture(scope="module")
def live(digits, tiny_teacher, tmp_path_factory):
    """A run with the live teacher."""
    out = tmp_path_factory.mktemp("live") / "run"
    train_here(digits, out, *tiny_teacher, "--run.log_every", 1, "--run.checkpoint_every", 7)
    return out


def losses(out) -> list[tuple[int, float, float, float]]:
    lines = [line for line in read_json_lines(out / "metrics.jsonl") if line["kind"] == "train"]
    return [(line["step"], line["loss"], line["teacher_top1"], line["agreement"]) for line in lines]


def test_a_replayed_run_is_bit_equal_to_the_live_one_also_after_it_was_stopped(digits, store, live, tmp_path, capsys):
    settings = ["--teacher.store", store, "--run.log_every", 1, "--run.checkpoint_every", 7]
    for stop in (3, 11, 0):
        summary = train_here(digits, tmp_path, *settings, "--run.stop_after_steps", stop)
    assert summary["finished"] and summary["teacher"] == "tiny_cnn, recorded"
    assert_same_end(tmp_path, live)
    assert losses(tmp_path) == losses(live)
    assert f"replayed from {store}" in capsys.readouterr().out
    deviations = {row["key"]: row["here"] for row in summary["deviations"]}
    assert deviations["teacher.store"] == "tiny_cnn, recorded in fp32, stored as fp32"
    # The configuration names the teacher that was recorded, and resumes.
    assert newest(tmp_path)["config"]["teacher"]["name"] == "tiny_cnn"


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_replay_what_they_would_have_heard(digits, store, tiny_teacher, tmp_path, ranks):
    """Three ranks do not divide the groups, so their rows are not consecutive."""
    settings = ["--data.root", digits, "--run.stop_after_steps", 4, "--run.log_every", 1]
    run_ranks(ranks, *settings, *tiny_teacher, "--run.out", tmp_path / "live")
    run_ranks(ranks, *settings, "--teacher.store", store, "--run.out", tmp_path / "replayed")
    assert_same_end(tmp_path / "live", tmp_path / "replayed")
    assert losses(tmp_path / "live") == losses(tmp_path / "replayed")


def test_what_two_recorders_write_is_what_three_ranks_would_have_heard(digits, tiny_teacher, tmp_path):
    """The command itself records, in two blocks of steps, and both are replayed."""
    settings = ["--data.root", digits, "--run.global_batch", 16, "--augment.mix_group", 8, "--run.log_every", 1]
    recorder = [REPOSITORY / "tools" / "record_teacher.py", tmp_path / "store", "--codec", "fp32"]
    with Ranks([*recorder, *TINY, *settings, *tiny_teacher], 2, TORCHELASTIC_RUN_ID="none") as recorders:
        for code, _, said in recorders.end():
            assert code == 0, said
    names = sorted(path.name for path in (tmp_path / "store").glob("*.safetensors"))
    assert names == ["00000000-00000064.0-16.safetensors", "00000064-00000080.0-16.safetensors"]
    run_ranks(3, *settings, *tiny_teacher, "--run.out", tmp_path / "live")
    run_ranks(3, *settings, "--teacher.store", tmp_path / "store", "--run.out", tmp_path / "replayed")
    assert_same_end(tmp_path / "live", tmp_path / "replayed")
    assert len(losses(tmp_path / "live")) == 80 and losses(tmp_path / "live") == losses(tmp_path / "replayed")


def test_a_replayed_run_is_compiled_as_the_live_one_is(digits, store, tiny_teacher, tmp_path):
    settings = ["--run.compile", "true", "--run.stop_after_steps", 3]
    train_here(digits, tmp_path / "live", *settings, *tiny_teacher)
    train_here(digits, tmp_path / "replayed", *settings, "--teacher.store", store)
    assert_same_end(tmp_path / "live", tmp_path / "replayed")


@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.01), ("fp16", 0.002), ("compact", 0.02)])
def test_lossy_codecs_change_the_loss_little(digits, tiny_teacher, live, tmp_path, codec, bound):
    run = build_here(digits, tmp_path / "none", *tiny_teacher, "--augment.mix_group", 32)
    record(run, tmp_path / "store", STEPS, codec)
    train_here(digits, tmp_path / "run", "--teacher.store", tmp_path / "store", "--run.log_every", 1)
    pairs = list(zip(losses(live), losses(tmp_path / "run"), strict=True))
    assert pairs[0][0] != pairs[0][1], "a lossy codec changes the last digits"
    assert max(abs(before[1] - after[1]) for before, after in pairs) < bound


def test_recorded_and_live_teachers_are_averaged_as_live_ones(digits, store, tiny_teacher, tiny_run, tmp_path):
    """Each of two different teachers recorded alone, or both."""
    young = ["--teacher.name", "tiny_cnn", "--teacher.checkpoint", checkpoints(checkpoints_folder(tiny_run))[0]]
    run = build_here(digits, tmp_path / "none", *young, "--augment.mix_group", 32)
    young_store = record(run, tmp_path / "young", STEPS)
    live = {"name": "tiny_cnn", "checkpoint": str(young[3])}
    recorded = {"name": "tiny_cnn", "store": str(young_store)}
    settings = ["--run.stop_after_steps", 3, "--teacher.others"]
    train_here(digits, tmp_path / "live", *settings, json.dumps([live]), *tiny_teacher)
    for i, (first, other) in enumerate(
        [(["--teacher.store", store], live), (tiny_teacher, recorded), (["--teacher.store", store], recorded)]
    ):
        train_here(digits, tmp_path / str(i), *settings, json.dumps([other]), *first)
        assert_same_end(tmp_path / "live", tmp_path / str(i))


def test_another_teacher_is_refused_by_each_name_that_was_given(digits, store, tmp_path):
    other = [{"name": "tresnet_v2_l", "store": str(store)}]  # The default of the first one is no default of the others.
    with pytest.raises(UserError, match="recorded with teacher.others.0..name tiny_cnn, and tresnet_v2_l is given"):
        train_here(digits, tmp_path / "run", "--teacher.store", store, "--teacher.others", json.dumps(other))


def test_a_store_of_something_else_is_refused_before_a_model_is_built(digits, store, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "build_models", lambda *_: pytest.fail("a model is built"))
    for arguments in (["--run.seed", 1], ["--schedule.epochs", 5], ["--teacher.name", "test_vit"]):
        with pytest.raises(UserError, match=r"recorded with|not recorded"):
            train_here(digits, tmp_path / "run", "--teacher.store", store, *arguments)


def test_the_audit_names_the_recording(digits, store, capsys):
    run.main([*TINY, "--data.root", str(digits), "--teacher.store", str(store), "--audit"])
    said = capsys.readouterr().out
    assert "teacher.store: USI a live teacher, here tiny_cnn, recorded in fp32, stored as fp32" in said


def test_a_batch_without_its_targets_is_no_batch_of_the_run(digits, store, tmp_path):
    run = build_here(digits, tmp_path / "none", "--teacher.store", store, "--augment.mix_group", 32)
    with pytest.raises(AssertionError, match="take batches from run.feed"):
        run.step(iter(first_batches(run, 1)), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run.seed", 1], "was recorded with seed 0, and run.seed is 1"),
        (["--augment.randaugment_ops", 1], "with augment.randaugment_ops 2, and augment.randaugment_ops is 1"),
        (["--data.image_size", 40], "was recorded with image_size 32, and data.image_size is 40"),
        (["--run.global_batch", 128], "was recorded with global_batch 64, and run.global_batch is 128"),
        (
            ["--schedule.epochs", 5],
            "step 20 is not recorded, and the run needs the steps up to 25. The store has the first 4 epochs of 5 "
            "steps, and the run has 5: schedule.epochs 5 and cooldown_epochs 0. Lower schedule.epochs, set",
        ),
        (
            ["--schedule.epochs", 9, "--augment.cycle_epochs", 5],
            "and the run has 5: augment.cycle_epochs 5. Lower schedule.epochs, set augment.cycle_epochs to epochs that "
            "are recorded, or record the others with tools/record_teacher.py",
        ),
        (["--teacher.name", "test_vit"], "recorded with teacher.name tiny_cnn, and test_vit is given"),
        (["--teacher.image_size", 48], "recorded with teacher.image_size 0, and 48 is given"),
        (["--teacher.kwargs.drop_rate", 0.5], "was recorded with teacher.kwargs {}, and {'drop_rate': 0.5} is given"),
        (["--teacher.checkpoint", __file__], "was recorded with teacher.checkpoint a file of sha256 "),
        (
            ["--teacher.precision", "bf16"],
            "recorded with teacher.precision fp32, and bf16 is given. Leave teacher.precision out",
        ),
        (["--augment.fill", "[1,2,3]"], "was recorded with fill [128, 128, 128], and augment.fill is [1, 2, 3]"),
        (["--student.name", "test_byobnet"], "fill colour [128, 128, 128], and the student's mean colour is [124, 116"),
        (["--data.shuffle", "window"], "was recorded with window_shards 0, and"),
        (["--teacher.classes", __file__], "recorded outputs are in the dataset's order already"),
    ],
)
def test_a_store_of_something_else_is_refused_and_nothing_is_written(digits, store, tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        train_here(digits, tmp_path / "run", "--teacher.store", store, *arguments)
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_a_folder_that_is_no_store_is_refused(digits, tmp_path):
    with pytest.raises(UserError, match="is no teacher store"):
        train_here(digits, tmp_path / "run", "--teacher.store", tmp_path)


def test_a_damaged_piece_ends_a_run_which_is_saved_and_resumes_once_it_is_repaired(digits, store, live, tmp_path):
    """The damage is in the second micro-batch of an update, whose first one has counted in BatchNorm."""
    damaged = tmp_path / "store"
    damaged.mkdir()
    for path in store.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    piece = sorted(damaged.glob("*.safetensors"))[0]
    intact = piece.read_bytes()
    piece.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))  # in the last of its ten steps
    settings = ["--teacher.store", damaged, "--run.log_every", 4]
    with pytest.raises(UserError, match=f"{piece.name}: is damaged at step 9") as error:
        train_here(digits, tmp_path / "run", *settings)
    again = "Then run the same command again: it resumes after 9 updates, from step-00000009.pt"
    assert str(error.value).endswith(f"record steps 0 to 9 again with tools/record_teacher.py. {again}")
    with pytest.raises(UserError, match=f"record_teacher.py. {again}$"):  # Nothing new has to be saved.
        train_here(digits, tmp_path / "run", *settings)
    piece.write_bytes(intact)
    assert train_here(digits, tmp_path / "run", *settings)["finished"]
    assert_same_end(tmp_path / "run", live)
    assert [line[0] for line in losses(tmp_path / "run")] == [4, 5, 8, 9, 10, 12, 15, 16, 20]


def test_another_store_at_the_same_path_is_reported_when_a_run_resumes(digits, store, tiny_teacher, tmp_path, capsys):
    place = tmp_path / "store"
    place.symlink_to(store)
    train_here(digits, tmp_path / "run", "--teacher.store", place, "--run.stop_after_steps", 1)
    run = build_here(digits, tmp_path / "none", *tiny_teacher, "--augment.mix_group", 32)
    place.unlink()
    record(run, place, STEPS, "fp16")
    capsys.readouterr()
    train_here(digits, tmp_path / "run", "--teacher.store", place, "--run.stop_after_steps", 2)
    changed = "changed since the checkpoint: teacher.store was recorded with codec fp32, now it is recorded with fp16"
    assert (said := capsys.readouterr().out).count("changed since the checkpoint") == 1 and changed in said


def test_the_warning_about_a_recorded_teacher_says_what_helps(digits, tmp_path, capsys):
    """The tests' teacher has learned nothing, and 200 images of ten classes are enough to say so."""
    untrained = save_teacher(tmp_path / "teacher.pth")
    run = build_here(digits, tmp_path / "none", *untrained, "--augment.mix_group", 32)
    record(run, tmp_path / "store", 10)
    settings = ["--teacher.store", tmp_path / "store", "--schedule.epochs", 2, "--run.log_every", 1]
    train_here(digits, tmp_path / "run", *settings)
    assert "record another store with the right ones (tools/record_teacher.py)" in capsys.readouterr().out


def test_the_free_settings_may_differ(digits, store, tmp_path):
    free = [
        "--student.name",
        "test_resnet",
        "--optim.lr",
        0.01,
        "--distill.temperature",
        2,
        "--distill.label_weight",
        0,
    ]
    free += ["--run.micro_batch", 16, "--schedule.epochs", 2, "--ema.decay", 0.5]
    summary = train_here(digits, tmp_path, "--teacher.store", store, *free)
    assert summary["finished"] and summary["step"] == 10


@pytest.mark.parametrize(
    "settings",
    [["--data.image_size", "[[0,32],[2,40]]"], ["--augment.cycle_epochs", 2, *DROPOUT]],
    ids=["sizes", "cycle"],
)
def test_progressive_sizes_and_repeated_views_are_replayed(digits, tiny_teacher, tmp_path, settings):
    run = build_here(digits, tmp_path / "none", *tiny_teacher, "--augment.mix_group", 32, *settings)
    record(run, tmp_path / "store", STEPS if "--augment.cycle_epochs" not in settings else STEPS // 2)
    train_here(digits, tmp_path / "live", *settings, *tiny_teacher)
    train_here(digits, tmp_path / "replayed", *settings, "--teacher.store", tmp_path / "store")
    assert_same_end(tmp_path / "live", tmp_path / "replayed")


def test_repeated_views_are_replayed_from_a_store_of_all_epochs(digits, store, tmp_path):
    """A store does not depend on how many of its epochs are repeated."""
    summary = train_here(
        digits, tmp_path, "--teacher.store", store, "--augment.cycle_epochs", 3, "--schedule.epochs", 5
    )
    assert summary["finished"] and summary["step"] == 25


def test_classes_of_another_order_are_in_the_datasets_order_before_they_are_stored(digits, tiny_teacher, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(map(str, reversed(range(10)))) + "\n")
    reversed_order = [*tiny_teacher, "--teacher.classes", tmp_path / "classes.txt"]
    run = build_here(digits, tmp_path / "none", *reversed_order, "--augment.mix_group", 32)
    record(run, tmp_path / "store", 10)
    settings = ["--run.stop_after_steps", 3, "--schedule.epochs", 2]
    train_here(digits, tmp_path / "live", *reversed_order, *settings)
    train_here(digits, tmp_path / "replayed", "--teacher.store", tmp_path / "store", *settings)
    assert_same_end(tmp_path / "live", tmp_path / "replayed")


def test_a_note_says_how_many_images_were_damaged_and_what_it_was_recorded_with(digits, tiny_teacher, tmp_path, capsys):
    run = build_here(digits, tmp_path / "none", *tiny_teacher, "--augment.mix_group", 32)
    store = record(run, tmp_path / "store", STEPS, made_with={"pipelines": "0", "pipeline": "torchvision"})
    line = {"split": "train", "shard": "train-00000.tar", "key": "a", "offset": 512, "error": "cut off"}
    (store / "quarantine.jsonl").write_text("".join(json.dumps({**line, "offset": n}) + "\n" for n in (512, 1024, 512)))
    train_here(digits, tmp_path / "run", "--teacher.store", store, "--run.stop_after_steps", 1)
    said = capsys.readouterr().out
    assert re.search("it was recorded with pipelines 0 instead of [^ ]+, so its pixels differ a little", said)
    assert "2 of its images were damaged and are gray" in said


def test_a_note_says_that_a_store_was_recorded_with_another_number_of_threads(digits, tiny_teacher, tmp_path, capsys):
    run = build_here(digits, tmp_path / "none", *tiny_teacher, "--augment.mix_group", 32)
    other = torch.get_num_threads() + 1
    store = record(run, tmp_path / "store", STEPS, made_with={"threads": other})
    train_here(digits, tmp_path / "run", "--teacher.store", store, "--run.stop_after_steps", 1)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"it was recorded with threads {other} instead of {other - 1}, so its outputs may differ in the last bits"
        in said
    )


def test_what_a_header_claims_is_clipped_in_a_note(digits, tiny_teacher, tmp_path, capsys):
    run = build_here(digits, tmp_path / "none", *tiny_teacher, "--augment.mix_group", 32)
    store = record(run, tmp_path / "store", STEPS, made_with={"pipeline": "x" * 10_000 + "end"})
    train_here(digits, tmp_path / "run", "--teacher.store", store, "--run.stop_after_steps", 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "recorded with pipeline xxxx" in said and "x" * 60 not in said.replace(" ", "") and "xend" not in said


def test_live_teachers_compute_in_their_own_precision(digits, tiny_teacher, tmp_path):
    """In half precision the targets change, and the student's own forward pass stays in float32."""
    logits = {}
    for precision in ("auto", "fp32", "bf16"):
        run = build_here(digits, tmp_path / precision, *tiny_teacher, "--teacher.precision", precision)
        batch = first_batches(run, 1)[0]
        with torch.no_grad():
            inputs = run.step.inputs(batch)
            logits[precision] = run.step.teachers(inputs.teachers).float()
        assert inputs.student.dtype == torch.float32
    assert torch.equal(logits["auto"], logits["fp32"]) and not torch.equal(logits["auto"], logits["bf16"])
    assert (logits["bf16"] - logits["fp32"]).abs().max() < 0.1
