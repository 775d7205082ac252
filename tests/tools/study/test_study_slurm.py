"""Parameters that a study gives to SLURM. A stand-in takes the place of submitit."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pipelines.common.errors import UserError
from support.studies import graph_of
from tools.lib.study.cluster import submit
from tools.lib.study.screen import Screen


@pytest.fixture
def submitted(monkeypatch) -> list[dict]:
    """The parameters of each job, with submitit in name only."""
    jobs: list[dict] = []

    class AutoExecutor:
        def __init__(self, folder, cluster):
            assert cluster == "slurm"

        def update_parameters(self, **parameters):
            jobs.append(parameters)

        def submit(self, *_):
            return SimpleNamespace(job_id=str(len(jobs)))

    modules = {name: ModuleType(name) for name in ("submitit", "submitit.core", "submitit.core.utils")}
    monkeypatch.setattr(modules["submitit"], "AutoExecutor", AutoExecutor, raising=False)
    monkeypatch.setattr(modules["submitit.core.utils"], "FailedJobError", subprocess.SubprocessError, raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return jobs


@pytest.mark.parametrize("setup", ["module load cuda", ["module load cuda"]], ids=["a line", "a list"])
def test_parameters_of_the_user_are_added_to_those_of_the_study(tmp_path, submitted, setup):
    graph = graph_of(tmp_path)
    given = {"slurm_setup": setup, "slurm_additional_parameters": {"account": "x"}, "timeout_min": 9}
    submit(graph, given, Screen(graph.stages))
    assert len(submitted) == len(graph.stages) + 1
    for job in submitted:
        export, *others = job["slurm_setup"]
        assert export.startswith("export PYTHONPATH=") and others == ["module load cuda"]
        assert job["slurm_additional_parameters"] == {"requeue": True, "account": "x"} and job["timeout_min"] == 9
    assert submitted[0]["name"] == "shards" and submitted[1]["slurm_dependency"] == "afterany:1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "x"}, "--slurm: the study decides name. Leave it out$"),
        ({"tasks_per_node": 2}, "--slurm: the study decides tasks_per_node. Leave it out$"),
        ({"slurm_dependency": "x"}, "--slurm: the study decides slurm_dependency. Leave it out$"),
        ({"slurm_additional_parameters": 3}, "--slurm: slurm_additional_parameters is 3; give keys with values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parameters_that_the_study_cannot_take_are_refused_before_anything_is_submitted(
    tmp_path, submitted, given, message
):
    graph = graph_of(tmp_path)
    with pytest.raises(UserError, match=message):
        submit(graph, given, Screen(graph.stages))
    assert submitted == []
