"""tools/doctor.py: what it concludes from numbers, what it measures, and that it leaves a run alone.

Nothing is said about how fast."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import REPOSITORY, TINY, train_here
from pipelines.common.errors import UserError
from pipelines.shards.reader import ShardReader
from support.forked_python import executable
from support.recorded import record
from support.tiny_runs import build_here
from tools import doctor
from tools.lib.doctor import input_stages, output, proposals, stages
from tools.lib.doctor.diagnosis import Remaining, diagnose, remaining
from tools.lib.doctor.proposals import Trial
from tools.lib.doctor.stages import Rate
from trainer.builder import build
from trainer.cluster.world import World
from trainer.config.sections import Config, parse

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))
PIPELINE_SPEEDS = {
    stages.READING: 50_000,
    stages.DECODING: 6_000,
    stages.RESIZING: 5_500,
    stages.PIPELINE: 5_000,
}


# A rank of the doctor whose timed runs are as short as those of the fixture below.
RANK = """
from tools import doctor
from tools.lib.doctor import stages
stages._LEAST_UPDATES = 1
doctor.main()
"""


@pytest.fixture(autouse=True)
def short_timed_runs(monkeypatch):
    """A timed run has one update at least: no speed is looked at here."""
    monkeypatch.setattr(stages, "_LEAST_UPDATES", 1)


def judged(shared_cores: bool = False, input_wait: float = 0.0, **speeds: float):
    names = {"teacher": stages.TEACHER, "student": stages.STUDENT, "step": stages.STEP, "whole": stages.WHOLE}
    names |= {
        "all_reduce": stages.ALL_REDUCE,
        "to_device": stages.TO_DEVICE,
        "pipeline": stages.PIPELINE,
        "store": stages.STORE,
    }
    speeds = {**PIPELINE_SPEEDS, **{names[name]: speed for name, speed in speeds.items()}}
    rates = {name: Rate(speed, speed, speed) for name, speed in speeds.items()}
    return diagnose(rates, shared_cores=shared_cores, input_wait=input_wait)


def test_a_step_that_runs_at_its_own_speed_limits_and_the_headroom_is_said():
    found = judged(student=4_000, teacher=3_000, step=1_700, whole=1_690, input_wait=0.001)
    assert (found.side, found.part) == ("step", stages.TEACHER)
    assert found.headroom == pytest.approx(5_000 / 1_690) and "headroom 3.0 x" in found.text


def test_a_step_that_waits_is_limited_by_the_slowest_part_of_the_pipeline():
    found = judged(student=9_000, step=9_000, whole=4_900, input_wait=0.45)
    assert (found.side, found.part) == ("input", "decoding") and "45.0%" in found.text
    slow_operations = judged(student=9_000, step=9_000, pipeline=2_000, whole=1_950)
    assert slow_operations.part == "RandAugment"
    slow_copies = judged(student=9_000, step=9_000, to_device=4_000, whole=3_900)
    assert slow_copies.part == stages.TO_DEVICE
    slow_store = judged(student=9_000, step=9_000, store=2_000, whole=1_990)
    assert (slow_store.side, slow_store.part) == ("input", stages.STORE) and "headroom 1.0 x" in slow_store.text


def test_gradients_limit_where_they_travel_longer_than_the_student_computes():
    assert judged(student=3_000, all_reduce=2_500, step=2_400, whole=2_400).part == stages.ALL_REDUCE
    assert judged(student=3_000, all_reduce=9_000, step=2_900, whole=2_900).part == stages.STUDENT


def test_on_shared_cores_the_larger_part_of_the_work_limits():
    found = judged(shared_cores=True, student=1_000, step=1_000, whole=830)
    assert found.side == "step" and found.input_fraction == pytest.approx(1 / 6)
    assert judged(shared_cores=True, student=20_000, step=20_000, whole=3_900).part == "decoding"


def test_what_cannot_be_done_is_refused_before_anything_is_measured(tmp_path, capsys):
    for arguments, message in (
        (["--seconds", "0"], "--seconds is 0; it must be positive"),
        (["--seconds", "nan"], "--seconds is nan; it must be positive"),
        (["--json", str(tmp_path / "no" / "a.json")], "a.json: not a file in a folder that is there"),
        (["--json", str(tmp_path)], f"{tmp_path}: not a file in a folder that is there"),
        (["--config", "configs/demo.yaml"], "takes the file, or a run's folder, first and without --config"),
    ):
        with pytest.raises(SystemExit):
            doctor.main([str(tmp_path), *arguments])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_setting_counts_as_faster_only_if_each_timed_run_was():
    now = Rate(100, 90, 110)
    assert proposals.trial("a", Rate(130, 111, 140), now) == Trial(
        "a", Rate(130, 111, 140), now, pytest.approx(0.3), True
    )
    assert not proposals.trial("a", Rate(130, 109, 140), now).faster


def test_an_override_is_what_the_command_line_takes():
    changes = {"data.threads": 4, "data.decode": "full", "run.compile": False}
    config = proposals.with_changes(Config(), changes)
    assert proposals.override(changes) == "--data.threads 4 --data.decode full --run.compile false"
    assert parse(proposals.override(changes).split()) == config


def test_what_is_left_counts_the_updates_of_each_size_and_the_evaluations(digits, tmp_path):
    sizes = ("--data.image_size", "[[0,32],[2,48]]", "--run.eval_every", "3")
    run = build(parse([*TINY, *sizes, "--data.root", str(digits), "--run.out", str(tmp_path)]), ALONE)
    # 320 images, 4 epochs of 5 updates; evaluated after the third epoch and the last
    assert remaining(run) == Remaining({32: 10, 48: 10}, 2)
    run.state.step = 7
    assert remaining(run) == Remaining({32: 3, 48: 10}, 2)
    run.state.step = run.state.evaluated = 15
    assert remaining(run) == Remaining({48: 5}, 1)
    stopped = dataclasses.replace(run.config, run=dataclasses.replace(run.config.run, stop_after_steps=15))
    assert remaining(dataclasses.replace(run, config=stopped)) == Remaining({}, 0, to_the_end=False)


def test_the_stages_take_whole_updates_of_the_size_that_is_asked_for(digits, tmp_path):
    sizes = ("--data.image_size", "[[0,32],[2,48]]")
    run = build(parse([*TINY, *sizes, "--data.root", str(digits), "--run.out", str(tmp_path)]), ALONE)
    for size, first in ((32, 0), (48, 10)):
        plans = list(input_stages.plans_of_size(run, size)(25))
        assert {plan.image_size for plan in plans} == {size} and len(plans) == 25 * run.step.num_micro_batches
        assert plans[0].position == first * 64
        positions = [plan.position for plan in plans]
        assert len(set(positions)) == 10 * run.step.num_micro_batches  # ten updates, again and again


def test_a_dropped_sample_can_still_be_read(photos):
    before = ShardReader(photos).read(np.arange(3))
    input_stages.drop_from_cache(photos, np.arange(3))
    for old, new in zip(before, ShardReader(photos).read(np.arange(3)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_and_no_file_is_said_in_one_line(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        doctor.main([str(tmp_path / name)])
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / name) in line and "Give" in line


def test_a_missing_dataset_is_said_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        doctor.main([str(REPOSITORY / "configs/demo.yaml"), "--teacher.name", "null", "--data.root", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a finished dataset" in line


def test_a_run_is_measured_from_its_checkpoint_and_left_as_it_is(digits, tmp_path, capsys):
    out, report = tmp_path / "run", tmp_path / "doctor.json"
    train_here(digits, out, "--run.stop_after_steps", 7)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    settings = ["--data.prefetch", "3", "--data.threads", "2"]
    doctor.main([str(out), "--seconds", "0.01", "--no-trials", "--json", str(report), *settings])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    found, printed = json.loads(report.read_text()), capsys.readouterr().out
    assert found["remaining"] == {"updates": {"32": 13}, "evaluations": 3, "to_the_end": True}
    measured = found["measured"]
    assert found["seconds_left"] == 13 * 64 / found["images_per_s"] + 3 * measured["evaluation_s"]
    assert found["images_per_s"] == measured["rates"][stages.WHOLE]["images_per_s"] and measured["evaluation_s"] > 0
    for name in (*PIPELINE_SPEEDS, stages.READING_COLD, stages.STEP, stages.STUDENT, stages.WHOLE):
        assert measured["rates"][name]["min"] > 0 and name in printed
    assert "With data.threads 2, data.prefetch 3\n" in printed
    assert found["diagnosis"]["text"] in printed.replace("\n", " ") and found["machine"]["cores"] >= 1


def test_what_nobody_reads_is_written(digits, tmp_path, monkeypatch):
    """Behind `| head -1` rich ends the process."""
    names = (*PIPELINE_SPEEDS, stages.STUDENT, stages.STEP, stages.WHOLE)
    measured = output.Measured(32, {name: Rate(1, 1, 1) for name in names}, {32: 1.0}, 0.0, 1.0, cached=True)
    monkeypatch.setattr(doctor, "measure", lambda *arguments: measured)
    monkeypatch.setattr(doctor, "stage_table", lambda measured: sys.exit(1))
    config = parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        doctor.examine(config, ALONE, 0.01, tmp_path / "doctor.json")
    assert json.loads((tmp_path / "doctor.json").read_text())["measured"]["size"] == 32


def test_the_store_of_a_recorded_teacher_is_a_stage(digits, teacher, tmp_path):
    store = record(build_here(digits, tmp_path / "none", *teacher), tmp_path / "store", 20)
    run = build_here(digits, tmp_path / "none", "--teacher.store", store)
    measured = doctor.measure(run, remaining(run), 0.01)
    assert measured.rates[stages.STORE].images_per_s > 0 and stages.TEACHER not in measured.rates
    assert not (tmp_path / "none").exists()


def test_every_setting_that_can_be_had_is_tried_on_the_whole(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(proposals, "REPEATS", 1)
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path / "none")]), ALONE)
    candidates = [{"data.threads": 1}, {"run.micro_batch": 32}, {"run.micro_batch": 7}]  # 7 is odd
    trials = proposals.try_all(run, 32, candidates, seconds=0.01)
    assert [trial.override for trial in trials] == ["--data.threads 1", "--run.micro_batch 32"]
    for trial in trials:
        assert 0 < trial.rate.min <= trial.rate.images_per_s <= trial.rate.max
    assert run.config.data.threads == 0 and not (tmp_path / "none").exists()


def test_an_error_that_is_not_about_the_setting_ends_the_trials(digits, tmp_path, monkeypatch):
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path / "none")]), ALONE)

    def stage(run, size):
        def read(count):
            raise UserError("train-00000.tar: damaged")

        return read

    monkeypatch.setattr(proposals, "_whole_stage", stage)
    monkeypatch.setattr(proposals, "rates", lambda *arguments: {"unchanged": Rate(1, 1, 1)})
    with pytest.raises(UserError, match=r"train-00000.tar: damaged"):
        proposals.try_all(run, 32, [{"data.threads": 1}], seconds=0.01)


def test_a_finished_run_has_nothing_left_to_predict(digits, tmp_path):
    run = build(parse([*TINY, "--data.root", str(digits), "--run.out", str(tmp_path)]), ALONE)
    run.state.step = run.state.evaluated = run.total_steps
    assert remaining(run) == Remaining({}, 0)


def test_several_ranks_measure_together_and_the_gradients_too(digits, tmp_path):
    """Of 64 images, which three ranks do not divide equally."""
    report, config, program = (tmp_path / name for name in ("doctor.json", "config.yaml", "doctor.py"))
    config.write_text("{}\n")
    program.write_text(RANK)
    launcher = [executable(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*launcher, str(program), str(config), "--seconds", "0.01", "--no-trials"]
    command += ["--json", str(report), *TINY, "--data.root", str(digits), "--run.out", str(tmp_path / "none")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The rest of the run takes") == 1
    rates = json.loads(report.read_text())["measured"]["rates"]
    assert rates[stages.ALL_REDUCE]["images_per_s"] > 0 and rates[stages.WHOLE]["images_per_s"] > 0
    assert not (tmp_path / "none").exists()


def test_every_size_that_is_to_come_is_predicted_with_its_own_speed():
    whole = {32: 100.0, 48: 50.0}
    measured = output.Measured(48, {stages.WHOLE: Rate(50, 40, 60)}, whole, 0.1, 2.0, cached=True)
    (line,) = output.duration_lines(Remaining({32: 100, 48: 200}, 1), measured, 64, [])
    assert "100 updates of 64 images at 100 images/s (32 px)" in line and "at 50 images/s (48 px)" in line
    assert line.startswith("The rest of the run takes 5 min:")  # 64 s, 256 s, 2 s


def test_the_duration_with_the_best_setting_counts_its_gain_for_the_updates_alone():
    measured = output.Measured(48, {stages.WHOLE: Rate(50, 40, 60)}, {48: 50.0}, 0.1, 100.0, cached=True)
    trials = [Trial(name, Rate(1, 1, 1), Rate(1, 1, 1), gain, gain > 0) for name, gain in (("a", 0.25), ("b", 1.0))]
    *_, line = output.duration_lines(Remaining({48: 200}, 1), measured, 64, trials)
    assert line == "With b, if it gains as much throughout: 4 min"  # 256 s / 2 + 100 s


def test_uneven_runs_of_a_stage_that_matters_are_reported_and_others_are_not():
    even, uneven, fast = Rate(50, 45, 55), Rate(50, 40, 55), Rate(5_000, 1_000, 6_000)
    assert list(output.spread_lines({stages.READING: fast, stages.WHOLE: even})) == []
    (line,) = output.spread_lines({stages.READING: fast, stages.TEACHER: uneven, stages.WHOLE: even})
    assert "timed runs of teacher differ" in line and "--seconds" in line


def test_nothing_that_helps_is_said():
    trials = [Trial("--data.threads 4", Rate(1, 1, 1), Rate(1, 1, 1), -0.05, False)]
    assert list(output.proposal_lines(trials)) == [
        "Nothing is faster in each timed run than in every unchanged one: --data.threads 4 (-5%)"
    ]
    faster = [*trials, dataclasses.replace(trials[0], override="--data.threads 8", gain=0.2, faster=True)]
    lines = list(output.proposal_lines(faster))
    assert lines[1].startswith("  --data.threads 8: +20%") and lines[-1].startswith("Not faster")
