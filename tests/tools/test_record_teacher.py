"""A recording holds what a live teacher says, bit for bit; it is stopped and resumed anywhere, and refuses nonsense."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from conftest import REPOSITORY
from pipelines.common.files import read_json, read_json_lines
from pipelines.shards.index import read_index
from pipelines.shards.quarantine import QUARANTINE
from support.recordings import SMALL, command, files, pieces, record, save_teacher
from support.tiny_runs import ONE
from tools.lib.common.terminal import Progress
from tools.lib.record_teacher import recording
from tools.lib.record_teacher.blocks import in_own_order, record_blocks, this_process
from tools.lib.record_teacher.recording import teacher_facts
from tools.record_teacher import _codec, main
from trainer import builder
from trainer.builder import build
from trainer.config.sections import parse
from trainer.models.preprocessing import timm_config
from trainer.models.teacher import Teachers, build_teacher
from trainer.targets.codec import open_codec
from trainer.targets.pieces import Piece
from trainer.targets.store import TeacherStore, verify

GROUPS = ("--augment.mix_group", 16, "--run.global_batch", 64)  # Five steps an epoch, of four groups each.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> list[str]:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(scope="module")
def store(digits, teacher, tmp_path_factory):
    """A recording that one process made in one go."""
    return record(tmp_path_factory.mktemp("stores") / "in-one-go", digits, teacher)


def says(capsys) -> str:
    """What was printed, on one line."""
    return " ".join(capsys.readouterr().err.split())


def live_logits(digits, out, teacher, *more) -> tuple[np.ndarray, torch.Tensor]:
    """What a run's own teacher says in its first ten updates: positions, and logits float32 [n, 10]."""
    run = build(parse([str(text) for text in (*SMALL, *teacher, "--data.root", digits, "--run.out", out, *more)]), ONE)
    positions, logits = [], []
    plans = list(run.plan.batches(0, 10, micro_batch=run.state.micro_batch))
    for plan, batch in zip(plans, run.pipelines.of["train"].batches(plans), strict=True):
        with torch.no_grad():
            logits.append(run.step.teachers(run.step.inputs(batch).teachers))
        positions.append(plan.positions)
    return np.concatenate(positions), torch.cat(logits)


# --- what is recorded ---


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("--run.micro_batch", 24),  # The run's batches are pairs that lie apart.
        ("--data.image_size", "[[0,24],[1,32]]"),
        ("--teacher.image_size", 40),
        ("--augment.mix_group", 32, "--augment.repeats", 1, "--augment.erase_prob", 0.5),
        ("--run.eval_batch", 16),  # The recorder's forward passes are smaller than the run's,
        ("--run.eval_batch", 48),  # or are pairs that lie apart,
        ("--run.eval_batch", 10),  # also where not even a group fits.
    ],
    ids=str,
)
def test_a_store_of_fp32_has_the_bits_of_a_live_teacher(digits, teacher, tmp_path, settings):
    settings = (*GROUPS, "--run.micro_batch", 64, *settings)
    store = TeacherStore(record(tmp_path / "store", digits, teacher, "--codec", "fp32", "--epochs", 2, *settings))
    positions, logits = live_logits(digits, tmp_path / "run", teacher, *settings)
    assert sorted(positions) == list(range(640))
    assert torch.equal(store.codec.decode(store.read(positions)), logits)


def test_int8_is_the_default_and_its_softmax_is_near_the_live_teachers(digits, teacher, tmp_path, store):
    recorded = TeacherStore(store)
    assert recorded.header.codec == "int8" and recorded.codec.row_bytes == 10
    positions, logits = live_logits(digits, tmp_path / "run", teacher)
    found = recorded.codec.decode(recorded.read(positions)).softmax(1)
    assert logits.softmax(1).amax(1).mean() > 0.2 and (found - logits.softmax(1)).abs().max() < 0.02


def test_the_header_says_what_was_recorded(digits, teacher, store):
    header = TeacherStore(store).header
    config = parse([*SMALL, *teacher, "--data.root", str(digits)])
    assert header.plan["dataset"] == read_index(digits, "train").digest and header.plan["global_batch"] == 8
    assert header.precision == "fp32" and header.made_with["steps_per_epoch"] == 40
    assert header.teacher == teacher_facts(config, build_teacher(config.teacher, 10, 32))
    assert header.teacher.name == "tiny_cnn" and header.teacher.order is None


def test_the_same_weights_under_another_normalisation_or_description_are_another_teacher(digits, teacher, tmp_path):
    config = parse([*SMALL, *teacher, "--data.root", str(digits)])
    built = build_teacher(config.teacher, 10, 32)
    facts = teacher_facts(config, built)
    built.model.pretrained_cfg = {**timm_config(built.model), "mean": (0.4, 0.5, 0.6)}
    assert teacher_facts(config, built) != facts == dataclasses.replace(teacher_facts(config, built), model=facts.model)
    found = []
    for activation in ("relu", "gelu"):  # timm builds a folder's model with the arguments of its config.json.
        folder = tmp_path / activation
        folder.mkdir()
        content = {"architecture": "test_resnet", "num_classes": 10, "model_args": {"act_layer": activation}}
        (folder / "config.json").write_text(json.dumps(content))
        named = dataclasses.replace(config.teacher, name=f"local-dir:{folder}")
        found.append(teacher_facts(dataclasses.replace(config, teacher=named), built).model)
    assert found[0] != found[1] and found[0]["kwargs"] == {"act_layer": "relu"}


def test_other_weights_have_another_digest_and_a_store_of_them_is_refused(digits, store, tmp_path, capsys):
    other = save_teacher(tmp_path / "other.pth", seed=6)
    with pytest.raises(SystemExit):
        record(store, digits, other)
    assert "was recorded with teacher.weights" in says(capsys)


def test_the_teachers_precision_can_be_chosen_and_is_recorded(digits, teacher, tmp_path):
    stores = {
        precision: TeacherStore(
            record(
                tmp_path / precision,
                digits,
                teacher,
                "--codec",
                "fp32",
                "--epochs",
                1,
                "--teacher.precision",
                precision,
            )
        )
        for precision in ("fp32", "bf16", "fp16")
    }
    positions = np.arange(320)
    logits = {name: each.codec.decode(each.read(positions)) for name, each in stores.items()}
    errors = {name: (each - logits["fp32"]).abs().mean().item() for name, each in logits.items()}
    assert {name: each.header.precision for name, each in stores.items()} == {name: name for name in stores}
    assert 0 < errors["fp16"] < errors["bf16"] < 0.1 * logits["fp32"].abs().mean()


def test_all_epochs_of_the_schedule_are_recorded_if_none_are_named(digits, teacher, tmp_path):
    main([str(tmp_path / "store"), *command(tmp_path, digits, teacher, "--schedule.epochs", 2)[3:]])
    recorded = TeacherStore(tmp_path / "store")
    assert recorded.coverage.first_missing(0, 80) is None and recorded.coverage.first_missing(0, 81) == 80


def test_epochs_that_repeat_others_are_not_recorded(digits, teacher, tmp_path, store, capsys):
    cycle = ["--augment.cycle_epochs", "1"]
    main([str(tmp_path / "store"), *command(tmp_path, digits, teacher, *cycle)[3:]])
    recorded, all_epochs = TeacherStore(tmp_path / "store"), TeacherStore(store)
    assert pieces(tmp_path / "store") == ["00000000-00000040.0-8.safetensors"]
    assert recorded.header.identity == all_epochs.header.identity
    assert torch.equal(recorded.read(np.arange(320)), all_epochs.read(np.arange(320)))
    with pytest.raises(SystemExit):
        record(tmp_path / "store", digits, teacher, *cycle)
    assert "--epochs is 4, and augment.cycle_epochs is 1, so that later epochs repeat" in says(capsys)


def test_with_a_fill_colour_of_its_own_a_plan_needs_no_student(digits, teacher, tmp_path, store, capsys, monkeypatch):
    def no_student(*_):
        raise AssertionError("a student is built")

    with monkeypatch.context() as patched:
        patched.setattr("tools.lib.record_teacher.recording.build_student", no_student)
        with pytest.raises(AssertionError, match="a student is built"):
            record(tmp_path / "store", digits, teacher)
        record(tmp_path / "store", digits, teacher, "--augment.fill", "[128,128,128]")
    assert files(tmp_path / "store") == files(store)  # It is the colour of the student elsewhere in this file.


def test_more_epochs_are_added_to_the_first_ones_which_stay_as_they_were(digits, teacher, tmp_path, store):
    short = record(tmp_path / "store", digits, teacher, "--epochs", 1)
    first = files(short)
    assert pieces(short) == ["00000000-00000040.0-8.safetensors"]
    record(short, digits, teacher)
    assert files(short).items() >= first.items()
    positions = np.arange(1280)
    assert torch.equal(TeacherStore(short).read(positions), TeacherStore(store).read(positions))


def test_a_complete_store_is_left_alone(digits, teacher, store, capsys):
    before = files(store)
    capsys.readouterr()
    record(store, digits, teacher)
    assert files(store) == before and "0 of the 160 steps" in (said := says(capsys)) and "has all 160 steps" in said


def test_a_teacher_that_does_not_know_the_classes_is_named_once_after_enough_images(
    digits, teacher, tmp_path, store, capsys
):
    """With ten classes these are 200 images. The tests' teacher has learned nothing."""
    record(tmp_path / "store", digits, teacher)
    said = says(capsys)
    run = build(parse([*SMALL, *teacher, "--data.root", str(digits), "--run.out", str(tmp_path / "run")]), ONE)
    plan, recorded = run.plan[0:1280], TeacherStore(store)
    best = recorded.codec.decode(recorded.read(plan.positions)).argmax(1).numpy()
    labels = run.plan.index.samples["label"][plan.sample]
    partners = labels.reshape(-1, 8)[:, ::-1].reshape(-1)  # Groups of 8 are mixed with themselves in reverse.
    is_right = best == np.where(plan.lam >= 0.5, labels, partners)
    assert 0 < (found := is_right[:200].mean()) < 0.2 and said.count("it hardly knows these classes") == 1
    assert f"the teacher finds the label of {found:.2%} of the mixed images, chance is 10.00%" in said
    assert f"; the teacher finds the label of {is_right.mean():.2%} of these 1,280 mixed images; " in said


def test_a_store_that_is_there_keeps_its_codec(digits, teacher, tmp_path):
    store = record(tmp_path / "store", digits, teacher, "--codec", "fp16", "--epochs", 1)
    record(store, digits, teacher, "--epochs", 2)
    recorded = TeacherStore(store)
    assert recorded.header.codec == "fp16" and recorded.coverage.first_missing(0, 80) is None


# --- several processes ---


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "{}", "WORLD_SIZE": "2", "LOCAL_RANK": "{}", "LOCAL_WORLD_SIZE": "2"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "{}",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_STEP": "1",
    "SLURM_ARRAY_TASK_COUNT": "2",
}


@pytest.mark.parametrize("variables", [TORCHRUN, ARRAY], ids=["torchrun", "job array"])
def test_a_process_of_any_launcher_records_its_own_blocks_and_then_what_others_have_not(
    digits, teacher, tmp_path, store, monkeypatch, capsys, variables
):
    recorded = []

    def recording_blocks(*arguments, **named):
        recorded.append([(block.first_step, block.stop_step) for block in arguments[3]])
        return record_blocks(*arguments, **named)

    monkeypatch.setattr("tools.lib.record_teacher.session.record_blocks", recording_blocks)
    for index in (1, 0):
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(index))
        record(tmp_path / "store", digits, teacher)
        assert files(tmp_path / "store") == files(store)
    assert recorded == [[(64, 128), (128, 160), (0, 64)], []]
    said = says(capsys)
    assert "process 2 of 2: 160 of the 160 steps" in said and "process 2 of 2: done" in said
    assert "process 1 of 2: 0 of the 160 steps" in said and "process 1 of 2: done, 0 bytes" in said
    assert "another process" not in said


def test_a_block_that_another_process_has_recorded_in_the_meantime_is_passed_over(
    digits, teacher, tmp_path, store, monkeypatch
):
    """The other one records a block while this one is at its first."""
    add_step, target, seen = Progress.add_step, tmp_path / "store", []

    def recording_another(self):
        add_step(self)
        seen.append(self.num_steps)
        if self.num_steps == 1:
            shutil.copy(store / pieces(store)[1], target)

    monkeypatch.setattr(Progress, "add_step", recording_another)
    record(target, digits, teacher)
    assert len(seen) == 96 and files(target) == files(store)


def test_a_process_says_how_many_of_its_steps_another_one_had_recorded_first(
    digits, teacher, tmp_path, store, monkeypatch, capsys
):
    """The other one ends its first block while this one is at the same."""
    add_step, target = Progress.add_step, tmp_path / "store"

    def recording_the_same(self):
        add_step(self)
        if self.num_steps == 64:
            shutil.copy(store / pieces(store)[0], target)

    monkeypatch.setattr(Progress, "add_step", recording_the_same)
    record(target, digits, teacher)
    assert "; another process was first with 64 of its 160 steps; the teacher" in says(capsys)


def test_a_process_of_its_own_has_all_blocks_and_others_those_of_their_number():
    def part(environment: dict) -> tuple[int, int, int, int]:
        this = this_process(environment)
        return this.rank, this.size, this.local_rank, this.local_size

    assert part({}) == (0, 1, 0, 1)
    torchrun = {name: value.format(1) for name, value in TORCHRUN.items()}
    array = {name: value.format(1) for name, value in ARRAY.items()}
    assert part(torchrun) == (1, 2, 1, 2)
    assert part(array) == (1, 2, 0, 1)
    assert part({**torchrun, **array}) == (3, 4, 1, 2)  # torchrun in each task of an array
    srun = {"SLURM_STEP_ID": "0", "SLURM_TASK_PID": str(os.getpid())}
    tasks = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert part({**srun, **tasks}) == (5, 8, 1, 1)


def block(first_step: int, stop_step: int) -> Piece:
    return Piece(first_step, stop_step, 0, 8)


def test_the_number_of_a_block_decides_who_records_it_first_whatever_is_missing():
    blocks = [block(0, 64), block(70, 128), block(192, 256), block(256, 300)]
    first, second = (in_own_order(blocks, 64, rank, 2) for rank in (0, 1))
    assert first[:2] == [blocks[0], blocks[3]] and second[:2] == [blocks[1], blocks[2]]
    assert sorted(first) == sorted(second) == blocks
    whole = [block(step, step + 64) for step in range(0, 64 * 24, 64)]
    assert [in_own_order(whole, 64, rank, 8)[:3] for rank in range(8)] == [whole[rank::8] for rank in range(8)]


def test_processes_that_start_again_divide_what_one_of_them_has_left():
    """Process 3 of 8 was lost with ten blocks to record. As many again need two rounds of one block each."""
    missing = [block(64 * number, 64 * number + 64) for number in range(3, 83, 8)]
    orders = [in_own_order(missing, 64, rank, 8) for rank in range(8)]
    recorded = [order[0] for order in orders]
    assert len(set(recorded)) == 8
    left = [[block for block in order if block not in recorded] for order in orders]
    assert {order[0] for order in left} == set(missing) - set(recorded)


# --- stopping ---


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda each: str(each)
)
def test_a_signal_ends_a_recording_with_a_line_and_loses_the_block_in_work_at_most(
    digits, teacher, tmp_path, store, monkeypatch, capsys, number, code
):
    add_step = Progress.add_step

    def signalling(self):
        add_step(self)
        if self.num_steps == 100:
            signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "add_step", signalling)
        with pytest.raises(SystemExit) as end:
            record(tmp_path / "store", digits, teacher)
    assert end.value.code == code
    assert pieces(tmp_path / "store") == pieces(store)[:1]
    assert f"{signal.Signals(number).name}: stopped" in (said := says(capsys))
    assert "lacks 96 steps. Run the same command again to record the rest" in said
    assert files(record(tmp_path / "store", digits, teacher)) == files(store)


@pytest.mark.parametrize("name", ["store.json", "00000064-00000128.0-8.safetensors"])
def test_a_full_disk_ends_a_recording_with_a_line_and_the_store_is_completed_later(
    digits, teacher, tmp_path, store, monkeypatch, capsys, name
):
    link = os.link

    def full(source, target, **others):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        return link(source, target, **others)

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        with pytest.raises(SystemExit) as end:
            record(tmp_path / "store", digits, teacher)
    assert end.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and name in errors[0] and "No space left on device). Make room there" in errors[0]
    assert not list((tmp_path / "store").glob("*.partial"))
    assert files(record(tmp_path / "store", digits, teacher)) == files(store)


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--teacher.name", "null", "--teacher.checkpoint", "null"],
            "teacher.name is null: there is nothing to record",
        ),
        (["--teacher.others", '[{"name":"test_resnet"}]'], "teacher.others names 1 more: a store is of one teacher"),
        (["--augment.mix_grup", "8"], "did you mean 'augment.mix_group'?"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--run.global_batch", "12"], "run.global_batch is 12; it must be a multiple of augment.mix_group, 8"),
        (["--data.pipeline", "dali", "--data.threads", "-1"], "data.threads is -1"),
    ],
    ids=lambda each: "".join(each)[:40],
)
def test_settings_that_cannot_be_recorded_are_refused_before_anything_is_written(
    digits, teacher, tmp_path, capsys, settings, message
):
    with pytest.raises(SystemExit) as end:
        record(tmp_path / "store", digits, teacher, *settings)
    assert end.value.code == 1 and not (tmp_path / "store").exists()
    assert message in (said := says(capsys)) and said.startswith("error: ")


@pytest.mark.parametrize("arguments", [["STORE"], ["transcode", "STORE", "OUT"]], ids=str)
def test_an_unknown_codec_is_refused_before_anything_is_imported(capsys, monkeypatch, arguments):
    for module in ("trainer.targets.codec", "tools.lib.record_teacher.session", "tools.lib.record_teacher.transcode"):
        monkeypatch.setitem(sys.modules, module, None)  # An import of it would fail.
    for name in ("int9", "top0", "top", "INT8", ""):
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--codec", name])
        assert end.value.code == 2
        assert f"argument --codec: '{name}' is none of int8, compact, fp16, fp32, topK (as in top64)" in says(capsys)


@pytest.mark.parametrize("name", ["int8", "compact", "fp16", "fp32", "top64"])
def test_every_codec_that_there_is_can_be_named(name):
    assert _codec(name) == name == open_codec(name, 10_000).name


@pytest.mark.parametrize("epochs", ["0", "-1", "1000001", "many"])
def test_epochs_are_a_positive_number(tmp_path, capsys, epochs):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "store"), "--epochs", epochs])
    assert end.value.code == 2 and "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--run.seed", "1"], "was recorded with seed 0, and run.seed is 1. Use the same"),
        (["--augment.repeats", "1"], "was recorded with augment.repeats 3, and augment.repeats is 1"),
        (["--augment.fill", "[124,116,104]"], "was recorded with fill [128, 128, 128], and augment.fill is [124, 116,"),
        (["--codec", "fp16"], "was recorded with codec int8, and the wanted codec is fp16"),
        (["--teacher.precision", "bf16"], "was recorded with precision fp32, and the wanted precision is bf16"),
        (
            ["--teacher.name", "tresnet_v2_l"],
            "is of the teacher tiny_cnn, and teacher.name is tresnet_v2_l. Give --teacher.name tiny_cnn, and its file "
            "with --teacher.checkpoint, or name another store",
        ),
    ],
    ids=lambda each: "".join(each)[:40],
)
def test_a_store_of_something_else_is_refused_and_left_alone(digits, teacher, store, capsys, settings, message):
    before = files(store)
    with pytest.raises(SystemExit):
        record(store, digits, teacher, *settings)
    assert message in says(capsys) and files(store) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inof", "A"], "'inof' would be STORE, and 'A' follows it; did you mean 'info'?"),
        (["mrege", "A", "B"], "did you mean 'merge'?"),
        (["STORE", "OTHER"], "'OTHER' follows it; the subcommands are info, verify, merge, transcode"),
        (["STORE", "--epocs", "3"], "unknown option '--epocs'; did you mean '--epochs'?"),
        (["STORE", "--codek=int8"], "unknown option '--codek'; did you mean '--codec'?"),
        (["STORE", "--confg", "mine.yaml"], "unknown option '--confg'; did you mean '--config'?"),
    ],
    ids=lambda each: " ".join(each)[:40],
)
def test_a_misspelled_subcommand_or_option_is_named_with_the_right_one(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and message in says(capsys)


@pytest.mark.parametrize(("arguments", "too_much"), [(["--help"], "torch"), (["info", "STORE"], "timm")])
def test_what_does_not_record_imports_no_trainer(store, arguments, too_much):
    """The import of PyTorch takes seconds, and that of timm and the trainer as long again."""
    arguments = [str(store) if word == "STORE" else word for word in arguments]
    program = (
        "import sys\nfrom tools.record_teacher import main\n"
        f"try:\n main({arguments!r})\nexcept SystemExit:\n pass\nassert {too_much!r} not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def test_the_store_comes_before_the_settings(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--epochs", "4", str(tmp_path / "store")])
    assert end.value.code == 2 and "STORE comes first, in front of --epochs" in capsys.readouterr().err


def test_a_run_or_another_folder_with_something_in_it_does_not_become_a_store(digits, teacher, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run: {}\n")
    with pytest.raises(SystemExit):
        record(tmp_path, digits, teacher)
    assert "holds config.yaml and no store.json, so it is no store" in says(capsys)
    with pytest.raises(SystemExit):
        record(tmp_path / "config.yaml", digits, teacher)
    assert "config.yaml: is no folder. Name a new one, or a store" in says(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_logits_that_are_not_finite_are_refused_by_name_and_not_written(digits, tmp_path, capsys):
    huge = save_teacher(tmp_path / "huge.pth", scale=1e8)
    with pytest.raises(SystemExit) as end:
        record(tmp_path / "store", digits, huge, "--teacher.precision", "fp16")
    said = says(capsys)
    assert end.value.code == 1 and "the teacher's outputs are not finite at " in said
    assert (
        "of 512 positions of steps 0 to 63, such as position " in said and "train-000" in said and ": sample " in said
    )
    assert "These steps are not recorded. Use --teacher.precision fp32 and a new store" in said
    assert pieces(tmp_path / "store") == []
    record(tmp_path / "fp32", digits, huge, "--epochs", 1)


def test_logits_that_the_codec_does_not_hold_are_refused_by_name_and_not_written(digits, tmp_path, capsys):
    huge = save_teacher(tmp_path / "huge.pth", scale=1e7)
    with pytest.raises(SystemExit) as end:
        record(tmp_path / "store", digits, huge, "--codec", "fp16")
    said = says(capsys)
    assert end.value.code == 1 and "the teacher's outputs are not finite or beyond 65,504 at " in said
    assert said.endswith("These steps are not recorded. Use --codec int8 and a new store")
    assert pieces(tmp_path / "store") == []


# --- the decode path of DALI ---


def test_what_a_trial_on_the_gpu_found_is_kept_in_the_store_for_the_next_recorder(
    digits, teacher, tmp_path, monkeypatch
):
    """A trial takes seconds; a stand-in for it says what a GPU would say."""
    tried, found = [], {"decode": "full", "why": "regions crashed", "device": "H100"}

    def choose(config, index, world, path):
        tried.append(read_json(path))
        return found

    monkeypatch.setattr("trainer.feed.choose_decode", choose)
    store = record(tmp_path / "store", digits, teacher, "--epochs", 1)
    record(store, digits, teacher, "--epochs", 2)
    assert tried == [{}, found] and not list(verify(store))


# --- damaged images ---


def test_damaged_images_are_named_once_in_the_store_by_all_sessions(digits, teacher, tmp_path, capsys):
    root = shutil.copytree(digits, tmp_path / "damaged")
    index = read_index(root, "train")
    row = index.samples[5]
    with open(index.paths[row["shard"]], "r+b") as file:
        file.seek(int(row["offset"]) + int(row["nbytes"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    store = record(tmp_path / "store", root, teacher, "--augment.repeats", 1, "--epochs", 1)
    record(store, root, teacher, "--augment.repeats", 1, "--epochs", 2)
    lines = read_json_lines(store / QUARANTINE)
    assert [(line["split"], line["key"]) for line in lines] == [("train", row["key"].decode())]
    assert TeacherStore(store).num_quarantined() == 1 and "damaged and replaced: train: sample" in says(capsys)
    with pytest.raises(SystemExit):
        record(tmp_path / "strict", root, teacher, "--augment.repeats", 1, "--data.max_bad_fraction", 0)
    assert "of the 320 images in 'train' are damaged, more than data.max_bad_fraction" in says(capsys)
    assert pieces(tmp_path / "strict") == []
    with pytest.raises(SystemExit):  # It has nothing to record any more, and judges what others have found.
        record(store, root, teacher, "--augment.repeats", 1, "--epochs", 2, "--data.max_bad_fraction", 0)
    assert "1 of the 320 images in 'train' are damaged" in says(capsys)


# --- progress ---


def test_without_a_terminal_a_line_says_how_far_the_recording_is(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("tools.lib.common.terminal.time.monotonic", lambda: next(clock))
    progress = Progress(total_steps=100, global_batch=1024, name="process 1 of 1")
    with progress.showing():
        for _ in range(3):
            progress.add_bytes(65_536_000)
            progress.add_step()
        progress.finding = "teacher's top-1 12.00%"
        progress.add_step()
    *_, line, last = capsys.readouterr().err.splitlines()
    assert " written, teacher's top-1 12.00%, " in last
    assert line.startswith("process 1 of 1: ") and " of 100 steps, " in line and " images/s, " in line
    assert " MB written, " in line and line.endswith(" left")


def test_help_says_what_a_lost_process_needs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "If all were lost, start again" in said and "teacher.precision auto is fp16" in said
    assert said.isascii()


def test_a_process_with_other_software_than_the_first_one_says_so(digits, teacher, tmp_path, capsys, monkeypatch):
    store = tmp_path / "store"
    real = recording.pipeline_and_versions
    monkeypatch.setattr(recording, "pipeline_and_versions", lambda *where: {**real(*where), "timm": "0.9"})
    main(command(store, digits, teacher, "--epochs", 1))
    assert "was recorded with" not in says_all(capsys)
    monkeypatch.undo()
    main(command(store, digits, teacher, "--epochs", 2))
    assert f"{store} was recorded with timm 0.9 instead of {version('timm')}, so its outputs may" in says_all(capsys)


def test_a_process_with_another_number_of_threads_than_the_first_one_says_so(
    digits, teacher, tmp_path, capsys, monkeypatch
):
    store, threads = tmp_path / "store", torch.get_num_threads()
    record(store, digits, teacher, "--epochs", 1)
    assert TeacherStore(store).header.made_with["threads"] == threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    record(store, digits, teacher, "--epochs", 2)
    assert f"was recorded with threads {threads} instead of {threads + 1}, so its outputs may" in says_all(capsys)


def test_a_process_with_another_forward_batch_than_the_first_one_says_so(digits, teacher, tmp_path, capsys):
    """A matrix product of another size may round in another order."""
    store = tmp_path / "store"
    record(store, digits, teacher, *GROUPS, "--epochs", 1, "--run.eval_batch", 40)
    header = TeacherStore(store).header
    assert header.made_with["forward_batch"] == 32
    record(store, digits, teacher, *GROUPS, "--epochs", 2, "--run.eval_batch", 16)
    assert f"{store} was recorded with forward_batch 32 instead of 16, so its outputs may" in says_all(capsys)
    assert TeacherStore(store).header == header


def test_too_little_memory_ends_a_recording_with_the_setting_that_helps(digits, teacher, tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Teachers, "forward", no_memory)
    with pytest.raises(SystemExit):
        record(tmp_path / "store", digits, teacher)
    said = says(capsys)
    assert "Tried to allocate 2 GiB. Lower run.eval_batch, which is a recorder's batch, down to 2" in said
    assert "micro_batch" not in said and pieces(tmp_path / "store") == []


def test_the_last_line_names_a_gap_in_front_of_later_steps(digits, teacher, tmp_path, store, capsys):
    first = record(tmp_path / "store", digits, teacher, "--epochs", 1)
    shutil.copy(store / pieces(store)[2], first)
    capsys.readouterr()
    record(first, digits, teacher, "--epochs", 1)
    later = "It has later steps, too, and lacks steps 40 to 127 in front of them: --epochs decides how far"
    assert f"{first} has all 40 steps. {later}" in says(capsys)


def test_timing_does_not_choose_the_kernels_of_a_recording(digits, teacher, tmp_path, monkeypatch):
    """Where models are placed on a GPU, a run lets it choose them."""
    place, forward, allowed = builder.place, Teachers.forward, []

    def placing(*arguments):
        place(*arguments)
        torch.backends.cudnn.benchmark = True

    def watched(self, inputs):
        allowed.append(torch.backends.cudnn.benchmark)
        return forward(self, inputs)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(builder, "place", placing)
    monkeypatch.setattr(Teachers, "forward", watched)
    record(tmp_path / "store", digits, teacher, "--epochs", 1)
    assert set(allowed) == {False}


def says_all(capsys) -> str:
    """Return what was printed to both streams, on one line."""
    return " ".join(" ".join(capsys.readouterr()).split())
