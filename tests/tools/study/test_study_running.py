"""How a study carries out its stages: in order, again after a failure, a signal or a kill, several at once."""

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import REPOSITORY
from pipelines.common import machine
from support.forked_python import executable
from tools.lib.study import running
from tools.lib.study.running import Process, jobs_of, locked_logs, run
from tools.lib.study.screen import Screen, accuracy_of, shortened
from tools.lib.study.stage import LOG, SETTINGS, Stage, command_of
from trainer.config.sections import Config, parse, to_yaml

# A command that notes each start, does what FOLDER/how says, and makes FOLDER/product.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path

signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath("saved").write_text("yes"), os._exit(75)))
folder = Path(sys.argv[1])
how = Path(sys.argv[2])
with open(folder / "starts", "a") as starts:
    print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES"), file=starts)
mode = how.read_text() if how.exists() else ""
if mode == "fail":
    print("working\\nerror: no such model")
    sys.exit(1)
while mode == "wait" and not (folder / "saved").exists() and how.exists():
    time.sleep(0.02)
(folder / "product").write_text("resumed" if (folder / "saved").exists() else "at once")
"""


class Study:
    """Stages in a folder: b needs a, and c needs b; d needs nothing."""

    def __init__(self, folder: Path, inputs: dict | None = None):
        self.folder = folder
        self.script = folder / "command.py"
        self.script.write_text(SCRIPT)
        self.stages: dict[str, Stage] = {}
        for name, needs in {"a": "", "b": "a", "c": "b", "d": ""}.items():
            needed = tuple(self.stages[need] for need in needs)
            stage = Stage(folder / "out", name, "", name, (inputs or {}).get(name, {}), needed, "product")
            self.stages[name] = stage.by(self.script, stage.folder, self.how(name))

    def how(self, name: str) -> Path:
        """The file that says what a stage's command does."""
        return self.folder / f"how-{name}"

    def run(self, slots: int = 1) -> int:
        return run([*self.stages.values()], slots=slots, together=1, screen=Screen([*self.stages.values()]))

    def starts(self) -> dict[str, int]:
        """How often each stage's command was started."""
        files = {name: stage.folder / "starts" for name, stage in self.stages.items()}
        return {name: len(file.read_text().splitlines()) if file.exists() else 0 for name, file in files.items()}

    def done(self) -> str:
        return "".join(name for name, stage in self.stages.items() if stage.is_done)


def training(name: str, folder: Path, seed: int = 0) -> Stage:
    """The stage of a training, whose images depend on `seed`."""
    config = parse(["--run.seed", str(seed), "--augment.fill", "[1, 2, 3]"])
    return Stage(folder, "train", name, name, {"student.name": name, "run.seed": seed}, (), "run", config)


def started_job(job: list[Stage]) -> Process:
    with locked_logs(job, Screen(job)) as logs:
        return Process(job, logs)


def wait_for_end(process: Process) -> None:
    while not process.note_end():
        time.sleep(0.02)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_stages_are_carried_out_once(tmp_path, capsys):
    study = Study(tmp_path)
    assert study.run() == 0 and study.done() == "abcd"
    assert "a: done in" in capsys.readouterr().out
    assert study.run() == 0 and study.starts() == dict.fromkeys("abcd", 1)
    assert capsys.readouterr().out == ""
    log = (study.stages["a"].folder / LOG).read_text()
    assert log.startswith(f"$ {sys.executable} {study.script} ")


def test_warnings_of_a_command_are_shown_once_when_it_ends(tmp_path, capsys):
    study = Study(tmp_path)
    study.script.write_text(SCRIPT + 'print("process 1 of 1: warning: it hardly knows the classes\\n" * 2, "a: fine")')
    study.run()
    shown = capsys.readouterr().out
    assert shown.count("a: warning: it hardly knows the classes\n") == 1 and "fine" not in shown
    assert study.stages["a"].warnings == ["it hardly knows the classes"]


def test_a_training_that_resumes_is_announced_with_its_step(tmp_path, capsys):
    study = Study(tmp_path)
    checkpoint = study.stages["b"].product / "checkpoints" / "step-00000120.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    study.run()
    shown = capsys.readouterr().out
    assert f"b: running in {study.stages['b'].folder}, resumes after step 120\n" in shown
    assert shown.count(", resumes after step") == 1


def test_a_training_that_was_killed_before_its_first_checkpoint_is_announced(tmp_path, capsys):
    stage = training("one", tmp_path)
    Screen([stage]).begin([stage])
    stage.product.mkdir(parents=True)
    Screen([stage]).begin([stage])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"train one: running in {stage.folder}"
    assert second == f"{first}, from its first step, for it has saved no checkpoint"


def test_of_a_teacher_the_weights_that_students_learn_from_are_shown(tmp_path):
    teacher = dataclasses.replace(training("one", tmp_path), kind="teacher")
    best = {"weights": "raw", "top1": 48.891, "step": 3}
    summary = {"finished": True, "best": best, "evaluation": {"ema": {"top1": 10.0}}}
    for stage in (teacher, student := training("two", tmp_path)):
        stage.product.mkdir(parents=True)
        (stage.product / "summary.json").write_text(json.dumps(summary))
        stage.note()
    assert accuracy_of(teacher) == ", raw top-1 48.89 % in best.pt, which students learn from"
    assert accuracy_of(student) == ", ema top-1 10.00 %"


def test_without_a_terminal_a_line_now_and_then_says_how_far_a_stage_is_and_its_time_is_noted(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(running, "_NOTE_EVERY_S", 0.2)
    monkeypatch.setattr(running, "_SHOW_EVERY_S", 0.2)
    study = Study(tmp_path)
    study.script.write_text("print('step 5 of 9', flush=True)\n" + SCRIPT)
    stage = study.stages["a"]
    process = started_job([stage])
    wait_for(stage.folder / "starts")
    time.sleep(0.3)
    screen = Screen([stage])
    screen.begin([stage])
    process.note_progress(screen)
    noted = stage.seconds
    wait_for_end(process)
    assert re.search(r"^a: running [\d.]+ s; step 5 of 9$", capsys.readouterr().out, re.MULTILINE)
    assert 0.2 <= noted <= stage.seconds and stage.is_done


def test_a_failed_stage_stops_only_what_needs_it_and_is_tried_again(tmp_path, capsys):
    study = Study(tmp_path)
    study.how("b").write_text("fail")
    assert study.run() == 0 and study.done() == "ad"
    shown = capsys.readouterr().out
    assert f"b: failed, exit code 1: error: no such model; its folder is {study.stages['b'].folder}\n" in shown
    assert "c: left out, because there is no result of b" in shown
    assert study.stages["b"].failure == "exit code 1: error: no such model" and not study.stages["c"].failure
    study.how("b").unlink()
    assert study.run() == 0 and study.done() == "abcd" and not study.stages["b"].failure
    assert study.starts() == {"a": 1, "b": 2, "c": 1, "d": 1}


def test_a_changed_input_does_again_what_depends_on_it_and_the_earlier_results_stay(tmp_path):
    first = Study(tmp_path)
    first.run()
    other = Study(tmp_path, {"b": {"epochs": 2}})
    assert other.done() == "ad"
    other.run()
    assert other.starts() == dict.fromkeys("abcd", 1)
    assert first.done() == other.done() == "abcd"


def test_a_training_that_ends_early_is_a_failure_though_its_process_ends_well(tmp_path):
    study, stage = Study(tmp_path), training("one", tmp_path)
    stage.product_name = "product"
    wait_for_end(started_job([stage.by(study.script, stage.folder, study.how("one"))]))
    assert stage.product.exists() and stage.failure == "exit code 0: it has printed nothing"


def test_a_process_that_the_system_kills_is_a_failure_with_the_signal(tmp_path):
    study = Study(tmp_path)
    study.script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    study.run()
    assert study.stages["a"].failure == "killed by SIGKILL: it has printed nothing"


@pytest.fixture
def started(tmp_path):
    """Starts a study in a process of its own whose stage waits, and waits until that has begun."""
    processes = []

    def start(waiting: str) -> tuple[Study, subprocess.Popen]:
        study = Study(tmp_path)
        study.how(waiting).write_text("wait")
        folders = [str(REPOSITORY), str(REPOSITORY / "tests"), str(Path(__file__).parent)]
        code = (
            f"import sys\nsys.path[:0] = {folders}\nfrom pathlib import Path\n"
            f"import {Path(__file__).stem} as tests\nsys.exit(tests.Study(Path({str(tmp_path)!r})).run())"
        )
        processes.append(subprocess.Popen([executable(), "-c", code]))
        wait_for(study.stages[waiting].folder / "starts")
        return study, processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_killed_study_resumes_inside_the_stage_that_was_running(started):
    study, process = started("b")
    process.kill()
    process.wait()
    wait_for(study.stages["b"].folder / "saved")  # Its command was stopped, too, and has saved.
    assert study.done() == "a"
    study.run()
    assert study.done() == "abcd" and study.starts() == {"a": 1, "b": 2, "c": 1, "d": 1}
    assert study.stages["b"].product.read_text() == "resumed"
    assert study.stages["c"].product.read_text() == "at once"


def test_what_two_studies_want_at_once_is_done_once(started, capfd):
    study, first = started("a")
    _, second = started("a")
    while "a: waiting until the process of an earlier study" not in capfd.readouterr().out:
        time.sleep(0.02)
    study.how("a").unlink()
    assert first.wait(timeout=120) == second.wait(timeout=120) == 0
    assert study.done() == "abcd" and study.starts() == dict.fromkeys("abcd", 1)


def test_studies_that_want_the_same_group_in_another_order_do_not_wait_for_each_other(tmp_path):
    stages = [training(name, tmp_path) for name in ("one", "two")]

    def lock_often(job: list[Stage]) -> None:
        for _ in range(200):
            with locked_logs(job, Screen(job)):
                time.sleep(0)

    threads = [threading.Thread(target=lock_often, args=(job,), daemon=True) for job in (stages, stages[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def test_a_study_that_is_started_while_a_command_of_a_killed_one_still_saves_waits_for_it(tmp_path, capsys):
    study = Study(tmp_path)
    slow = SCRIPT.replace('(folder.joinpath("saved")', '(time.sleep(1), folder.joinpath("saved")')
    study.script.write_text(slow)
    study.how("a").write_text("wait")
    first = started_job([study.stages["a"]])
    wait_for(study.stages["a"].folder / "starts")
    first.stop()
    for lock in first._locks:  # As the system does it when a study is killed.
        os.close(lock)
    study.run()
    said = capsys.readouterr().out
    assert said.count("a: waiting until the process of an earlier study has saved and ended") == 1
    assert said.index("waiting") < said.index("a: running") and study.stages["a"].product.read_text() == "resumed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_running_command_and_nothing_has_failed(started, number):
    study, process = started("a")
    process.send_signal(number)
    assert process.wait(timeout=120) == number
    assert (study.stages["a"].folder / "saved").exists()
    assert study.done() == "" and not study.stages["a"].failure and study.starts()["d"] == 0


def test_two_stages_at_once_get_a_part_of_the_cores_or_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(running, "num_cores", lambda: 8)
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 0)
    study = Study(tmp_path)
    study.run(slots=2)
    assert (study.stages["d"].folder / "starts").read_text().split()[0] == "4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [running.resources(slot, 2) for slot in (0, 1)] == [({"CUDA_VISIBLE_DEVICES": each}, None) for each in "46"]
    assert running.resources(0, 1) == ({}, None)


def test_students_of_one_plan_are_trained_together_and_others_are_not(tmp_path):
    one, two, three = (training(name, tmp_path) for name in ("one", "two", "three"))
    other = training("other", tmp_path, seed=1)
    evaluate = Stage(tmp_path, "evaluate", "one", "one", {}, (one,), "report.json")
    assert jobs_of([one, evaluate, two, other, three], 2) == [[one, two], [evaluate], [other], [three]]
    one.note(failure="exit code 1: it cannot begin")
    assert jobs_of([one, evaluate, two, other, three], 2) == [[one], [evaluate], [two, three], [other]]


# A command for students of the settings in its arguments: the first one fails, and ends by itself; the others finish.
TOGETHER = """
import sys
from pathlib import Path

first, *others = (Path(settings).parent / "run" for settings in sys.argv[1:])
print("warning: it hardly knows the classes")
print(f"{first}: warning: ema.decay is slow")
print(f"error: {first}: loss is not finite")
for other in others:
    other.mkdir()
    (other / "summary.json").write_text('{"finished": true}')
    print(f"{other}: warning: damaged and replaced")
    print(f"{other}: step 9 of 9")
sys.stdout.flush()
"""


def trained_together(folder: Path, monkeypatch, script: str) -> list[Stage]:
    """Two students whose common command carries out a script."""
    command = folder / "together.py"
    command.write_text(script)
    monkeypatch.setattr(
        running, "command_of_job", lambda job: command_of(command, *(each.folder / SETTINGS for each in job))
    )
    return [training(name, folder) for name in ("one", "two")]


def test_each_of_the_students_that_are_trained_together_has_its_own_reason_and_warnings_and_half_of_the_time(
    tmp_path, monkeypatch, capsys
):
    one, two = job = trained_together(tmp_path, monkeypatch, TOGETHER + "sys.exit(1)")
    run(job, together=2, screen=Screen(job))
    assert two.is_done and not two.failure
    assert one.failure == f"exit code 1: error: {one.product}: loss is not finite"
    assert one.warnings == ["it hardly knows the classes", "ema.decay is slow"]
    assert two.warnings == ["it hardly knows the classes", "damaged and replaced"]
    assert one.log == two.log and one.log.parent == one.folder
    assert f"{two.product}: step 9 of 9\n" in two.log.read_text()
    assert (two.folder / LOG).read_text().endswith(f"{two.folder / SETTINGS}\n")
    assert two.seconds == one.seconds > 0
    shown = capsys.readouterr().out
    assert f"train one: failed, {one.failure}; its folder is {one.folder}\n" in shown


def test_warnings_of_students_that_were_trained_together_and_moved_are_their_own_and_earlier_ones_are_kept(
    tmp_path, monkeypatch
):
    one, two = job = trained_together(tmp_path, monkeypatch, TOGETHER)
    two.folder.mkdir(parents=True)
    (two.folder / LOG).write_text("warning: when it was trained alone\n")
    wait_for_end(started_job(job))
    (tmp_path / "moved").mkdir()
    (tmp_path / "train").rename(tmp_path / "moved" / "train")
    one, two = (dataclasses.replace(stage, out=tmp_path / "moved") for stage in job)
    assert one.warnings == ["it hardly knows the classes", "ema.decay is slow"]
    assert two.warnings == ["when it was trained alone", "it hardly knows the classes", "damaged and replaced"]


def test_a_process_that_fails_before_its_students_train_is_the_reason_for_each_of_them(tmp_path, monkeypatch):
    one, two = job = trained_together(tmp_path, monkeypatch, "")
    (tmp_path / "together.py").write_text(f"import sys\nsys.exit('error: {two.product}: another run works in it')")
    wait_for_end(started_job(job))
    expected = f"exit code 1: error: {two.product}: another run works in it"
    assert one.failure == two.failure == expected


def test_the_line_with_which_a_command_fails_is_noted_completely_and_shown_shortened(tmp_path, monkeypatch):
    one, two = job = trained_together(tmp_path, monkeypatch, "")
    line = f"error: {'the logits are not finite, ' * 20}lower optim.lr"
    (tmp_path / "together.py").write_text(f"import sys\nsys.exit({line!r})")
    wait_for_end(started_job(job))
    assert one.failure == two.failure == f"exit code 1: {line}"
    assert len(shortened(one.failure)) <= 300 and shortened(one.failure).endswith("not finite, lower optim.lr")


def test_a_study_survives_that_the_folder_of_a_running_stage_is_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "_NOTE_EVERY_S", 0.0)
    one, two = trained_together(tmp_path, monkeypatch, "import sys; sys.exit('gone')")
    for job in ([one], [one, two]):
        process = started_job(job)
        process._process.wait()
        shutil.rmtree(one.folder)
        screen = Screen(job)
        screen.begin(job)
        process.note_progress(screen)
        wait_for_end(process)
        assert one.failure == "exit code 1: gone"


def test_only_what_is_new_in_a_log_is_read(tmp_path):
    study = Study(tmp_path)
    stage = study.stages["a"]
    stage.folder.mkdir(parents=True)
    (stage.folder / LOG).write_text("error: of an earlier start\n")
    study.script.write_text("import sys\nsys.exit(3)")
    study.run()
    assert stage.failure == "exit code 3: it has printed nothing"


def test_students_at_once_are_bound_to_cores_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 0)
    script = tmp_path / "cores.py"
    script.write_text("import os, pathlib, sys\npathlib.Path(sys.argv[1]).write_text(repr(os.sched_getaffinity(0)))")
    everywhere, found = os.sched_getaffinity(0), {}
    for subject in ("", "one", "two"):
        stage = Stage(tmp_path, "train", subject, f"x{subject}", {"name": subject}, (), "cores")
        found[subject] = stage.by(script, stage.product)
    run([*found.values()], slots=len(everywhere) + 1, screen=Screen([*found.values()]))
    cores = {subject: ast.literal_eval(stage.product.read_text()) for subject, stage in found.items()}
    assert cores[""] == everywhere and len(cores["one"]) == len(cores["two"]) == 1


def test_the_cores_of_all_slots_are_distinct_and_a_quota_is_kept(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8, 16)))
    monkeypatch.setattr(machine, "num_cores", lambda: 8)
    assert [running.resources(slot, 2)[1] for slot in (0, 1)] == [{8, 9, 10, 11}, {12, 13, 14, 15}]
    assert [running.resources(slot, 3)[1] for slot in range(3)] == [{8, 9}, {10, 11}, {13, 14}]
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    assert [running.resources(slot, 2)[1] for slot in (0, 1)] == [{8, 9}, {12, 13}]
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 1)
    assert running.resources(0, 2) == ({"CUDA_VISIBLE_DEVICES": "0"}, None)


def test_settings_are_there_before_the_command_starts(tmp_path):
    stage = Stage(tmp_path, "store", "", "x", {}, (), "copy", Config())
    script = tmp_path / "copy.py"
    script.write_text("import shutil, sys\nshutil.copy(*sys.argv[1:])")
    stage.by(script, stage.folder / "settings.yaml", stage.product)
    wait_for_end(started_job([stage]))
    assert stage.is_done and stage.product.read_text() == to_yaml(Config())
