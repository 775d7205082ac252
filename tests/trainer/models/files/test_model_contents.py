"""Ranks compare the contents of the files that their models come from."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipelines.common.errors import UserError
from support.model_folder import NAME, write_folder
from trainer.builder import facts_to_compare
from trainer.config.sections import parse
from trainer.models.files.model_folders import _any_hub_file, model_contents
from trainer.models.teacher import build_teacher

pytest_plugins = ["support.model_folder"]
CPU = torch.device("cpu")


def changed_facts(config, change) -> set[str]:
    """The names of the facts that differ once something has been changed."""
    before = facts_to_compare(config, CPU)
    change()
    after = facts_to_compare(config, CPU)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_ranks_compare_the_contents_of_every_file_that_student_and_teachers_come_from(model, tmp_path):
    """A folder by its description and weights, each further teacher by its weights and names, as the first one."""
    folders = {key: write_folder(tmp_path / key, model) for key in ("student", "first", "third")}
    for name in ("w.pth", "c.txt"):
        (tmp_path / name).write_text("1")
    others = [
        {"name": NAME, "checkpoint": str(tmp_path / "w.pth"), "classes": str(tmp_path / "c.txt")},
        {"name": f"local_dir:{folders['third']}"},
    ]
    given = ["--student.name", f"local-dir:{folders['student']}", "--teacher.name", f"local-dir:{folders['first']}"]
    given += ["--teacher.others", json.dumps(others), "--data.pipeline", "synthetic"]
    config, started = parse(given), parse([*given, "--student.pretrained", "true"])

    def grown(path: Path):
        return lambda: path.write_bytes(path.read_bytes() + b" ")

    assert changed_facts(config, lambda: None) == set()
    for key, folder in (("teacher.name", "first"), ("teacher.others[1].name", "third")):
        for file, part in (("config.json", "config.json"), ("model.safetensors", "weights")):
            assert changed_facts(config, grown(folders[folder] / file)) == {f"content of {key} ({part})"}
    assert changed_facts(config, grown(tmp_path / "w.pth")) == {"content of teacher.others[0].checkpoint"}
    assert changed_facts(config, grown(tmp_path / "c.txt")) == {"content of teacher.others[0].classes"}
    assert changed_facts(config, grown(folders["student"] / "config.json")) == {"content of student.name (config.json)"}
    assert changed_facts(config, grown(folders["student"] / "model.safetensors")) == set()  # it begins at random
    assert changed_facts(started, grown(folders["student"] / "model.safetensors")) == {
        "content of student.name (weights)"
    }
    moved = [{**others[0], "checkpoint": str(shutil.copy(tmp_path / "w.pth", tmp_path / "moved.pth"))}, others[1]]
    assert (
        facts_to_compare(parse([*given, "--teacher.others", json.dumps(moved)]), CPU)["teacher.others"]
        == facts_to_compare(config, CPU)["teacher.others"]
    )


def test_ranks_compare_the_revisions_of_repositories_without_downloading_their_weights(hub, tmp_path):
    repository = tmp_path / "hub" / "models--someone--small"
    config = parse(["--teacher.name", f"hf-hub:{hub}", "--data.pipeline", "synthetic"])

    def update():
        shutil.copytree(repository / "snapshots" / ("a" * 40), repository / "snapshots" / ("b" * 40))
        (repository / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
        (repository / "refs" / "main").write_text("b" * 40)
        _any_hub_file.cache_clear()

    assert model_contents(config)["revision of teacher.name"] == "a" * 40
    assert changed_facts(config, update) == {"revision of teacher.name"}
    with pytest.raises(UserError, match=f"someone/small@{'b' * 40}: model.safetensors cannot be had"):
        build_teacher(config.teacher, 7, 160)
