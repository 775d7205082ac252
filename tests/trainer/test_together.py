"""Students that are trained in one process end bit by bit as each would alone."""

import collections
import contextlib
import dataclasses
import functools
import json
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import DROPOUT, REPOSITORY, TINY
from pipelines.batch import BatchMaker
from pipelines.common.errors import UserError
from pipelines.common.files import locked, read_json_lines
from support.ranks import Ranks
from support.recorded import record
from support.tiny_runs import ONE, assert_same_end, at_step, build_here, newest
from trainer import feed, together
from trainer.builder import build
from trainer.cluster.preemption import Preemption
from trainer.config.sections import Config, parse, to_yaml
from trainer.loop import train
from trainer.models.teacher import Teacher
from trainer.monitor.clock import InputWait
from trainer.sharing import check_configs, use_shared_batches
from trainer.state.checkpoint import checkpoints, checkpoints_folder
from trainer.targets.store import TeacherStore
from trainer.together import build_together, train_together
from trainer.update import compiler
from trainer.update.step import TrainStep

STEPS = 20  # four epochs of five updates, each of two micro-batches
FILL = ["--augment.fill", "[124,116,104]"]
# Two students with other means, seeds, rates and lengths; the second one has no EMA.
STUDENTS = {
    "a": [*DROPOUT, "--student.seed", 1, "--optim.lr", 0.01, "--run.eval_every", 2],
    "b": ["--student.name", "test_byobnet", "--schedule.epochs", 3, "--ema.decay", 0, "--run.checkpoint_every", 4],
}
SYNTHETIC = ["--data.pipeline", "synthetic", "--data.synthetic_samples", 320, "--data.synthetic_classes", 10]


def config_of(out: Path, *arguments) -> Config:
    """A student in a folder of its own, with the settings of the folder's name."""
    always = [*TINY, *FILL, "--run.log_every", 1, "--run.out", out, *STUDENTS.get(out.name, [])]
    return parse([str(text) for text in [*always, *arguments]])


def both(folder: Path, *arguments) -> list[Config]:
    return [config_of(folder / name, *arguments) for name in STUDENTS]


def changed(config: Config, **values) -> Config:
    """The configuration with other values in its section `run`."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **values))


@pytest.fixture(scope="module")
def store(digits, tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    run = build_here(digits, folder / "none", *tiny_teacher, *FILL, "--augment.mix_group", 32)
    return record(run, folder / "store", STEPS)


@pytest.fixture(scope="module")
def alone(digits, tiny_teacher, tmp_path_factory) -> Path:
    """Each student, trained alone from the live teacher."""
    folder = tmp_path_factory.mktemp("alone")
    for config in both(folder, "--data.root", digits, *tiny_teacher):
        train(build(config, ONE))
    return folder


def lines(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on time, and without its sessions."""
    found = [line for line in read_json_lines(out / "metrics.jsonl") if line["kind"] != "session"]
    return [{k: v for k, v in line.items() if k not in ("time", "images_per_s", "input_wait")} for line in found]


def watch_updates(monkeypatch) -> list[int]:
    """The numbers of all updates that are made from now on."""
    made, step = [], TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, *given: made.append(given[1]) or step(self, *given))
    return made


def assert_same(found: Path, expected: Path, names=STUDENTS) -> None:
    for name in names:
        assert_same_end(found / name, expected / name)
        assert lines(found / name) == lines(expected / name)
        before, after = (json.loads((folder / name / "summary.json").read_text()) for folder in (expected, found))
        for summary in (before, after):
            del summary["session"]
        assert before == after
        assert (found / name / "samples.png").read_bytes() == (expected / name / "samples.png").read_bytes()


@pytest.mark.parametrize(
    "kind",
    ["live", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("recorded", "none", "synthetic", "averaged"))],
)
def test_students_end_as_each_would_alone(digits, tiny_teacher, store, alone, tmp_path, kind):
    young = [{"name": "tiny_cnn", "checkpoint": str(tiny_teacher[3])}]
    settings = {
        "live": ["--data.root", digits, *tiny_teacher],
        "recorded": ["--data.root", digits, "--teacher.store", store],
        "none": ["--data.root", digits],
        "synthetic": [*SYNTHETIC, *tiny_teacher],
        "averaged": ["--data.root", digits, "--teacher.store", store, "--teacher.others", json.dumps(young)],
    }[kind]
    expected = alone if kind == "live" else tmp_path / "alone"
    if kind != "live":
        settings += ["--run.stop_after_steps", 6]
        for config in both(expected, *settings):
            train(build(config, ONE))
    students = train_together(both(tmp_path / "run", *settings), ONE)
    assert [student.summary["step"] for student in students] == ([20, 15] if kind == "live" else [6, 6])
    assert_same(tmp_path / "run", expected)
    assert newest(tmp_path / "run" / "b")["ema"] is None
    if kind == "recorded":  # The recording is of the teacher that the others had live.
        assert lines(tmp_path / "run" / "a") == [line for line in lines(alone / "a") if line["step"] <= 6]


def test_images_are_loaded_once_and_the_teacher_is_asked_once(digits, tiny_teacher, store, tmp_path, monkeypatch):
    rows = collections.Counter()

    def count(owner: type, method: str, size: Callable[..., int]) -> None:
        original = getattr(owner, method)

        def counted(self, *arguments):
            rows[method] += size(*arguments)
            return original(self, *arguments)

        monkeypatch.setattr(owner, method, counted)

    count(BatchMaker, "make", lambda images, plan: len(plan) if plan.mix_group else 0)  # Validation mixes nothing.
    count(Teacher, "forward", len)
    count(TeacherStore, "read", len)
    settings = ["--data.root", digits, "--run.stop_after_steps", 3]
    train_together(both(tmp_path / "live", *settings, *tiny_teacher), ONE)
    assert rows == {"make": 3 * 64, "forward": 3 * 64}
    train_together(both(tmp_path / "recorded", *settings, "--teacher.store", store), ONE)
    assert rows == {"make": 6 * 64, "forward": 3 * 64, "read": 3 * 64}


def test_the_teachers_pass_is_no_wait_for_input(digits, tiny_teacher, tmp_path, monkeypatch):
    """Neither for the student that makes it nor for the others: it is a part of the update, as in a run alone."""
    waits, passes = [], []

    def waiting(self):
        waits.append(self)
        try:
            return wait(self)
        finally:
            waits.pop()

    def passing(self, inputs):
        passes.append(len(waits))
        return forward(self, inputs)

    wait, forward = InputWait.__next__, Teacher.forward
    monkeypatch.setattr(InputWait, "__next__", waiting)
    monkeypatch.setattr(Teacher, "forward", passing)
    train_together(both(tmp_path, "--data.root", digits, *tiny_teacher, "--run.stop_after_steps", 2), ONE)
    assert passes == [0] * 4  # two updates of two micro-batches


def test_no_update_of_a_compiled_student_is_compiled_again(digits, tiny_teacher, tmp_path, monkeypatch):
    """Also if the teacher's logits are of another type than the students'."""
    compile_eagerly = functools.partial(torch.compile, backend="eager", dynamic=False)
    monkeypatch.setattr(compiler, "compiled", compile_eagerly)
    monkeypatch.setattr(compiler, "why_not", lambda device: "")
    settings = ["--data.root", digits, *tiny_teacher, "--teacher.precision", "bf16", "--run.compile", "true"]
    configs = both(tmp_path, *settings, "--run.stop_after_steps", 2)
    runs = build_together(configs, ONE, Preemption(ONE))
    with contextlib.closing(use_shared_batches(runs)), torch._dynamo.config.patch(error_on_recompile=True):
        for run in runs:
            with contextlib.closing(run.feed(0)) as batches:
                run.step(batches, 0)
    assert runs[0].step.logits_cache and {each.dtype for each in runs[0].step.logits_cache.values()} == {torch.bfloat16}


def test_the_decode_path_is_chosen_once(digits, tmp_path, monkeypatch):
    """On a GPU the choice starts a process. Each student's folder keeps it for a session alone."""
    choice, asked = {"decode": "roi", "why": "it works", "device": "H100"}, []
    monkeypatch.setattr(feed, "choose_decode", lambda *arguments: asked.append(arguments) or choice)
    train_together(both(tmp_path, "--data.root", digits, "--run.stop_after_steps", 1), ONE)
    assert len(asked) == 1
    assert [json.loads((tmp_path / name / feed.DECODE).read_text()) for name in STUDENTS] == [choice] * 2


def test_students_that_were_stopped_go_on_together_and_alone(digits, tiny_teacher, alone, tmp_path, monkeypatch):
    settings = ["--data.root", digits, *tiny_teacher]
    configs = both(tmp_path, *settings)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        students = train_together(configs, ONE)
    assert [student.summary["session"]["stopped_by"] for student in students] == ["SIGTERM"] * 2
    assert [newest(config.run.out)["step"] for config in configs] == [7, 6]
    train(build(changed(configs[0], stop_after_steps=9), ONE))
    made = watch_updates(monkeypatch)
    train_together([changed(config, stop_after_steps=11) for config in configs], ONE)
    assert made == [6, 7, 8, 9, 9, 10, 10]
    train(build(configs[1], ONE))
    made.clear()
    students = train_together(configs, ONE)
    assert made == list(range(11, 20)) and students[1].summary["finished"]
    sessions = [line for line in read_json_lines(tmp_path / "a" / "metrics.jsonl") if line["kind"] == "session"]
    assert [session["together"] for session in sessions] == [True, False, True, True]
    assert {(session["precision"], session["pipeline"]) for session in sessions} == {("float32", "torchvision")}
    assert_same(tmp_path, alone)


def test_a_student_without_its_checkpoint_goes_first(digits, tiny_teacher, alone, tmp_path, monkeypatch):
    """As after a kill: one has written the checkpoint of a later update than the other."""
    configs = both(tmp_path, "--data.root", digits, *tiny_teacher)
    train(build(changed(configs[0], stop_after_steps=3), ONE))
    made = watch_updates(monkeypatch)
    train_together([changed(config, stop_after_steps=5) for config in configs], ONE)
    assert made == [0, 1, 2, 3, 3, 4, 4]
    assert lines(tmp_path / "a") == [line for line in lines(alone / "a") if line["step"] <= 5]


@pytest.mark.long
def test_a_student_that_diverges_leaves_the_others_alone(digits, tiny_teacher, alone, tmp_path, capsys):
    settings = ["--data.root", digits, *tiny_teacher]
    wild = config_of(tmp_path / "wild", *settings, "--optim.lr", "1e9", "--schedule.warmup_lr", "1e9")
    students = train_together([wild, *both(tmp_path, *settings)], ONE)
    assert [student.summary is None for student in students] == [True, False, False]
    assert "not finite" in students[0].failure and students[0].run is None
    assert f"error: {wild.run.out}: {students[0].failure}" in capsys.readouterr().err
    assert_same(tmp_path, alone)


def test_the_memory_of_a_student_that_has_ended_is_free_for_the_others(digits, tiny_teacher, tmp_path, monkeypatch):
    first, second = both(tmp_path, "--data.root", digits, *tiny_teacher)
    states, is_there = [], []

    def built(*arguments):
        runs = build_together(*arguments)
        states.append(weakref.ref(runs[0].state))
        return runs

    monkeypatch.setattr(together, "build_together", built)
    at_step(monkeypatch, 2, lambda: is_there.append(states[0]() is not None))
    train_together([changed(first, stop_after_steps=1), changed(second, stop_after_steps=3)], ONE)
    assert is_there == [False]


def test_a_student_that_runs_out_of_memory_leaves_the_others_alone(digits, tiny_teacher, alone, tmp_path, monkeypatch):
    step = TrainStep.__call__

    def lacking(self, batches, number):
        if number == 2 and self._config.run.out.name == "a":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batches, number)

    monkeypatch.setattr(TrainStep, "__call__", lacking)
    students = train_together(both(tmp_path, "--data.root", digits, *tiny_teacher, "--run.stop_after_steps", 4), ONE)
    assert students[0].failure.startswith("CUDA out of memory. Lower run.micro_batch") and not students[1].failure
    assert lines(tmp_path / "b") == [line for line in lines(alone / "b") if line["step"] <= 4]


def test_students_with_a_damaged_store_are_saved_and_end_as_each_would_alone(digits, store, alone, tmp_path):
    """The damage is in the second micro-batch of an update."""
    damaged = shutil.copytree(store, tmp_path / "store")
    piece = min(damaged.glob("*.safetensors"))
    intact = piece.read_bytes()
    piece.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))  # in the last of its ten steps
    configs = both(tmp_path, "--data.root", digits, "--teacher.store", damaged)
    for student in train_together(configs, ONE):
        assert student.failure.startswith(f"{piece}: is damaged at step 9")
        assert student.failure.endswith("it resumes after 9 updates, from step-00000009.pt")
    piece.write_bytes(intact)
    train_together(configs, ONE)
    for name in STUDENTS:
        assert_same_end(tmp_path / name, alone / name)
        assert lines(tmp_path / name) == lines(alone / name)


@pytest.mark.long
def test_a_student_that_rolls_back_is_waited_for(digits, tiny_teacher, alone, tmp_path, monkeypatch):
    """The machine is at fault once: the update gives a loss that is not finite."""
    first, second = both(tmp_path, "--data.root", digits, *tiny_teacher)
    step, made = TrainStep.__call__, []

    def faulty(self, batches, number):
        made.append(number)
        metrics = step(self, batches, number)
        return metrics._replace(loss=metrics.loss * float("nan")) if made.count(6) == 2 and number == 6 else metrics

    monkeypatch.setattr(TrainStep, "__call__", faulty)
    train_together([first, changed(second, on_nonfinite="rollback")], ONE)
    assert made[12:22] == [6, 6, 7, 4, 5, 6, 7, 8, 8, 9]
    monkeypatch.setattr(TrainStep, "__call__", step)
    assert_same_end(tmp_path / "a", alone / "a")
    assert_same_end(tmp_path / "b", alone / "b")


def refused(configs: list[Config], words: str) -> None:
    """The command refuses them in one line, before it has written anything."""
    with pytest.raises(UserError) as error:
        train_together(configs, ONE)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not any(config.run.out.exists() for config in configs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run.seed", 1], "run.seed is 0 for {a} and 1 for {b}: students that are trained together share it"),
        (["--augment.flip", 0.2], "augment.flip is 0.5 for {a} and 0.2 for {b}"),
        (["--data.image_size", 48], "data.image_size is 32 for {a} and 48 for {b}"),
        (["--data.pipeline", "synthetic"], "data.pipeline is auto for {a} and synthetic for {b}"),
        (["--augment.fill", "null"], "augment.fill is [124, 116, 104] for {a} and [128, 128, 128] for {b}"),
        (["--teacher.name", "test_vit"], "teacher.name is None for {a} and test_vit for {b}"),
        (["--run.micro_batch", 64], "run.micro_batch is 32 for {a} and 64 for {b}"),
        (["--run.precision", "bf16"], "run.precision is auto for {a} and bf16 for {b}"),
        (["--run.loggers", "[wandb]"], "run.loggers of {b} has wandb, which has one run in a process"),
    ],
)
def test_what_does_not_fit_together_is_refused(digits, tmp_path, arguments, words):
    first = config_of(tmp_path / "a", "--data.root", digits)
    second = config_of(tmp_path / "b", "--data.root", digits, "--student.name", "tiny_cnn", *arguments)
    refused([first, second], words.format(a=first.run.out, b=second.run.out))


def test_another_store_is_refused_and_a_teacher_that_one_file_leaves_to_its_store_is_not(digits, store, tmp_path):
    first = config_of(tmp_path / "a", "--data.root", digits, "--teacher.store", store)
    named = dataclasses.replace(first, teacher=dataclasses.replace(first.teacher, name="tiny_cnn"))
    check_configs([first, changed(named, out=tmp_path / "b")])
    other = shutil.copytree(store, tmp_path / "copy")
    second = config_of(tmp_path / "b", "--data.root", digits, "--teacher.store", other)
    refused([first, second], f"teacher.store is {store} for {first.run.out} and {other} for {second.run.out}")


def test_one_folder_for_two_students_is_refused(digits, tmp_path):
    config = config_of(tmp_path / "a", "--data.root", digits)
    refused([config, config], f"run.out is {tmp_path / 'a'} for 2 students: give each its own folder")


def test_a_folder_in_which_another_run_works_is_refused_before_a_student_is_trained(digits, tmp_path):
    configs = both(tmp_path, "--data.root", digits)
    configs[1].run.out.mkdir()
    with locked(configs[1].run.out / ".lock", ""), pytest.raises(UserError, match="b: another run is working in it"):
        train_together(configs, ONE)
    assert not checkpoints(checkpoints_folder(configs[0].run.out))


def test_means_of_several_teachers_are_taken_at_one_temperature(digits, tiny_teacher, tmp_path):
    young = json.dumps([{"name": "tiny_cnn", "checkpoint": str(tiny_teacher[3])}])
    first, second = both(tmp_path, "--data.root", digits, *tiny_teacher, "--teacher.others", young)
    other = dataclasses.replace(second, distill=dataclasses.replace(second.distill, temperature=2.0))
    refused([first, other], "distill.temperature is 1.0 for")


@pytest.mark.long
def test_the_command_trains_on_two_ranks_and_its_exit_code_says_that_a_student_failed(digits, tiny_teacher, tmp_path):
    settings = ["--data.root", digits, *tiny_teacher, "--run.stop_after_steps", 6]
    wild = config_of(tmp_path / "wild", *settings, "--optim.lr", "1e9", "--schedule.warmup_lr", "1e9")
    files = []
    for folder in ("together", "alone"):
        for config in both(tmp_path / folder, *settings):
            files.append(tmp_path / f"{folder}-{config.run.out.name}.yaml")
            files[-1].write_text(to_yaml(config))
    (tmp_path / "wild.yaml").write_text(to_yaml(wild))
    commands = [[REPOSITORY / "trainer" / "run.py", "--config", file] for file in files[2:]]
    commands.append([REPOSITORY / "trainer" / "together.py", *files[:2], tmp_path / "wild.yaml"])
    ends = []
    for command in commands:
        with Ranks(command, 2) as ranks:
            ends.append(ranks.end())
    assert [[code for code, *_ in each] for each in ends] == [[0, 0], [0, 0], [1, 1]], ends
    for _, _, error in ends[2]:
        assert f"error: {wild.run.out}: step " in error and "Traceback" not in error
    assert f"{tmp_path / 'together' / 'a'}: stopped after step 6 of 20" in ends[2][0][1]
    for name in STUDENTS:
        assert_same_end(tmp_path / "together" / name, tmp_path / "alone" / name)
        assert lines(tmp_path / "together" / name) == lines(tmp_path / "alone" / name)


def test_a_signal_ends_the_command_with_the_code_of_a_run(digits, tmp_path, monkeypatch):
    files = []
    for config in both(tmp_path, "--data.root", digits):
        files.append(str(tmp_path / f"{config.run.out.name}.yaml"))
        Path(files[-1]).write_text(to_yaml(config))
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        together.main(files)
    assert ended.value.code == 75
    assert [newest(tmp_path / name)["step"] for name in STUDENTS] == [4, 3]
