"""A launcher's variables divide work only where they are complete and sane, and where it started this process."""

import os

import pytest

from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.launcher import Launch, array_task, launched
from tools.shard_imagenet import main
from trainer.cluster.world import join_world

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    **MASTER,
}
POD = {"RANK": "3", "WORLD_SIZE": "8", **MASTER}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_TASK_PID": str(os.getpid()),  # With xdist this is the parent of the process that runs the tests.
}
ARRAY = {"SLURM_ARRAY_" + name: text for name, text in [("TASK_ID", "5"), ("TASK_MIN", "1"), ("TASK_STEP", "2")]}
ARRAY |= {"SLURM_ARRAY_TASK_COUNT": "4"}  # sbatch --array=1-7:2
NAMES = [*TORCHRUN, *STEP, *ARRAY, "SLURM_PTY_PORT"]


@pytest.fixture
def environment(monkeypatch):
    """Sets a launcher's variables in this process, and no others of a launcher."""

    def only(**variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    only()
    return only


def without(variables: dict, *names: str) -> dict:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize("by_hand", [True, False])
def test_torchrun_and_a_step_of_srun_divide_any_work(by_hand):
    assert launched(TORCHRUN, by_hand=by_hand) == Launch("torchrun", 3, 8, 1, 2)
    assert launched(STEP, by_hand=by_hand) == Launch("srun", 5, 8)
    assert launched({**STEP, **TORCHRUN}, by_hand=by_hand).by == "torchrun"  # one torchrun a task, for instance


def test_variables_set_by_hand_divide_training_and_no_conversion():
    """A pod of Kubernetes has them, and tools/slurm/train.sbatch sets them."""
    assert launched(POD) == Launch("RANK and WORLD_SIZE", 3, 8)
    assert launched({**STEP, **POD}).by == "RANK and WORLD_SIZE"
    this = launched(POD, by_hand=False)
    assert (this.by, this.rank, this.size) == ("", 0, 1)
    assert this.ignored.startswith("RANK=3, WORLD_SIZE=8 ignored (")
    assert launched({**STEP, **POD}, by_hand=False) == Launch("srun", 5, 8)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "8"},
        {"RANK": "1"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "2"},
        {**POD, "WORLD_SIZE": "abc"},
        {**POD, "WORLD_SIZE": "8.0"},
        {**POD, "RANK": "-1"},
        {**POD, "RANK": "\N{ARABIC-INDIC DIGIT THREE}"},
        {**POD, "RANK": "9" * 5000},
        {**POD, "RANK": "8"},
        {**POD, "WORLD_SIZE": "0"},
        {**POD, "LOCAL_RANK": "$SLURM_LOCALID"},
        {**POD, "LOCAL_WORLD_SIZE": "0"},
        without(POD, *MASTER),
    ],
)
def test_incomplete_or_insane_variables_are_ignored_and_named(variables):
    for by_hand in (True, False):
        this = launched(variables, by_hand=by_hand)
        assert (this.by, this.rank, this.size, this.local_rank, this.local_size) == ("", 0, 1, 0, 1)
        assert this.ignored.endswith(": this process works alone") and len(this.ignored) < 300
        assert next(name for name in variables if name != "RANK" or "WORLD_SIZE" not in variables) in this.ignored


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # salloc
        {"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_STEP_ID": "4294967292"},  # ssh to a node of the job
        {"SLURM_STEP_ID": "4294967293"},
        {"SLURM_STEP_ID": ""},  # salloc that opens its shell on the login node
        {"SLURM_STEP_ID": "batch"},
        {"SLURM_TASK_PID": "1000000000"},
        {"SLURM_TASK_PID": ""},
        {"SLURM_PROCID": "8"},
        {"SLURM_PROCID": ""},
        {"SLURM_STEP_NUM_TASKS": "many"},
        {"SLURM_PTY_PORT": "34889", "SLURM_TASK_PID": str(os.getppid())},
    ],
)
def test_slurms_variables_without_a_task_of_srun_above_this_process_are_ignored(variables):
    this = launched({**STEP, **variables})
    assert (this.by, this.rank, this.size) == ("", 0, 1)
    assert "SLURM_NTASKS=8" in this.ignored


def test_a_task_of_srun_may_be_a_script_that_starts_this_process():
    assert launched({**STEP, "SLURM_TASK_PID": str(os.getppid())}) == Launch("srun", 5, 8)


def test_an_ancestor_is_found_whatever_it_is_called(tmp_path):
    for pid, name, parent in ((os.getpid(), "a) R 1 (b", 21), (21, "tmux: server", 1), (1, "init", 0)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 0 0")
    assert launched({**STEP, "SLURM_TASK_PID": "21"}, proc=tmp_path).by == "srun"
    assert launched({**STEP, "SLURM_TASK_PID": "22"}, proc=tmp_path).by == ""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **MASTER},
        {"RANK": "", "WORLD_SIZE": ""},
        MASTER,
        {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_TASK_PID": "1"},  # a batch script that names no tasks
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_divide(variables):
    assert launched(variables) == launched(variables, by_hand=False) == Launch()


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "8"}, {**POD, "RANK": "x"}, {**STEP, "SLURM_STEP_ID": "4294967290"}]
)
def test_a_trainer_that_ignores_variables_says_so_in_one_line_and_works_alone(environment, capsys, variables):
    environment(**variables)
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.local_size) == (0, 1, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and "this process works alone. torchrun and tools/slurm/train.sbatch start" in line


def test_copies_that_srun_alone_started_are_refused_and_the_advice_helps(environment, monkeypatch):
    environment(**STEP)
    with pytest.raises(UserError, match="srun has started 8 copies.*tools/slurm/train.sbatch' or with torchrun"):
        join_world("cpu").__enter__()
    environment(**STEP, WORLD_SIZE="8")  # a batch script has exported it
    with pytest.raises(UserError, match="srun has started 8 copies"):
        join_world("cpu").__enter__()
    environment(**STEP, **{"RANK": "5", "WORLD_SIZE": "8"}, **MASTER)  # as train.sbatch does
    assert launched().rank == 5
    environment(**STEP, **TORCHRUN)
    assert launched().by == "torchrun"
    environment(**{**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})  # srun --ntasks 1
    with join_world("cpu") as world:
        assert world.size == 1


@pytest.mark.parametrize("variables, prefix", [(TORCHRUN, "[rank 3] "), ({**POD, "WORLD_SIZE": "abc"}, ""), ({}, "")])
def test_an_error_begins_with_the_rank_where_there_are_several(environment, capsys, variables, prefix):
    environment(**variables)
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError("a: b. Do c")
    assert capsys.readouterr().err == f"{prefix}error: a: b. Do c\n"


@pytest.mark.parametrize("variables", [POD, {"WORLD_SIZE": "4"}, {**STEP, "SLURM_STEP_ID": "4294967290"}])
def test_a_conversion_that_no_launcher_started_is_whole_and_names_what_it_ignored(
    environment, digits_folder, tmp_path, capsys, variables
):
    environment(**variables)
    main(["build", str(digits_folder), str(tmp_path / "out"), "--no-audit", "--workers", "1"])
    out, err = capsys.readouterr()
    assert (tmp_path / "out" / "manifest.json").is_file() and "320 train" in out
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].endswith("this process works alone. --part I/N divides a conversion")


def test_the_part_that_a_launcher_gives_is_reported_and_part_1_of_1_converts_everything(
    environment, digits_folder, tmp_path, capsys
):
    environment(**STEP)
    command = ["build", str(digits_folder), str(tmp_path / "out"), "--no-audit", "--workers", "1"]
    main(command)
    out, err = capsys.readouterr()
    assert "part 6/8 is done" in out
    assert "note: this is part 6/8, for srun started 8 processes. --part 1/1 converts everything\n" in err
    main([*command, "--part", "1/1"])
    out, err = capsys.readouterr()
    assert (tmp_path / "out" / "manifest.json").is_file() and "note" not in err


@pytest.mark.parametrize("command", [["info"], ["verify"], ["merge"]])
def test_only_a_conversion_asks_for_its_launcher(environment, tmp_path, capsys, command):
    environment(**POD)
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path)])
    assert "ignored" not in capsys.readouterr().err


def test_a_job_array_divides_a_conversion_and_no_training(environment):
    environment(**ARRAY)
    assert array_task() == Launch("SLURM's job array", 2, 4)
    assert launched() == Launch()
    environment(**{**ARRAY, "SLURM_ARRAY_TASK_COUNT": "1"})
    assert array_task() == Launch()


@pytest.mark.parametrize(
    "variables", [{"SLURM_ARRAY_TASK_ID": "4"}, {"SLURM_ARRAY_TASK_ID": "9"}, {"SLURM_ARRAY_TASK_STEP": "0"}]
)
def test_an_array_that_is_no_range_is_named_and_ignored(environment, variables):
    environment(**{**ARRAY, **variables})
    assert array_task().size == 1 and "is ignored (--array is no range)" in array_task().ignored


def test_a_task_of_a_job_array_converts_its_part_and_says_so(environment, digits_folder, tmp_path, capsys):
    environment(**ARRAY)
    main(["build", str(digits_folder), str(tmp_path / "out"), "--no-audit", "--workers", "1"])
    out, err = capsys.readouterr()
    assert "this is part 3/4, for SLURM's job array started 4 processes" in err and "part 3/4 is done" in out
    environment(**ARRAY, **STEP)
    with pytest.raises(SystemExit):
        main(["build", str(digits_folder), str(tmp_path / "out"), "--no-audit", "--workers", "1"])
    assert "Divide the work with --part I/N" in capsys.readouterr().err
