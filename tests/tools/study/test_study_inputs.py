"""What a stage's fingerprint says of files: by their content, wherever they lie and however they are named."""

import copy
import os
from pathlib import Path

import pytest

from support.studies import DEMO, changed, graph_of
from trainer.state.checkpoint import BEST, checkpoints_folder


@pytest.fixture
def own_files(tmp_path) -> tuple[Path, Path]:
    """Two files of weights in the study's own folder, as earlier settings have left them there."""
    files = tuple(tmp_path / "out" / "teacher" / name / "run" / "checkpoints" / BEST for name in "ab")
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(str(file).encode())
    return files


def test_weights_that_the_user_names_in_the_studys_own_folder_count_by_their_content(tmp_path, own_files):
    taught = [changed("teacher", {"name": "test_resnet", "checkpoint": str(file)}) for file in own_files]
    first, second = ({stage.name: stage.folder for stage in graph_of(tmp_path, each).stages} for each in taught)
    assert [name for name in first if first[name] == second[name]] == ["shards"]
    begun = [changed("recipe", "overrides", "student.checkpoint", str(file)) for file in own_files]
    first, second = (graph_of(tmp_path, each).students[0].train for each in begun)
    assert first.folder != second.folder


def test_weights_of_the_teacher_that_the_study_trains_count_where_a_student_begins_with_them(tmp_path):
    graph = graph_of(tmp_path)
    best = checkpoints_folder(graph.common["teacher"].product) / BEST
    best.parent.mkdir(parents=True)
    best.write_bytes(b"weights")
    student = {"name": "test_byobnet", "overrides": {"student.checkpoint": str(best)}}
    begun = graph_of(tmp_path, changed("students", 0, student)).students
    assert begun[0].train.folder != graph.students[0].train.folder
    assert begun[1].train.folder == graph.students[1].train.folder


@pytest.mark.parametrize("named", ["~/labels.json", "labels.json"])
def test_labels_of_a_suite_count_by_their_content_however_they_are_named(tmp_path, monkeypatch, named):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    labels, content = tmp_path / "labels.json", copy.deepcopy(DEMO)
    content["evaluate"]["suites"] = {"real": {"data.real_labels": named}, "timm": {"data.real_labels": "imagenet"}}
    labels.write_text("[1]")
    first = graph_of(tmp_path, content).students[0].evaluations
    labels.write_text("[1, 2]")
    os.utime(labels, ns=(1, 1))
    second = graph_of(tmp_path, content).students[0].evaluations
    assert [name for name in first if first[name].folder != second[name].folder] == ["real"]
    assert str(labels) in second["real"].command and "imagenet" in second["timm"].command
