"""Files count in a stage's fingerprint by their content, wherever they lie and however they are named."""

import copy
import os
from pathlib import Path

import pytest

from pipelines.common.errors import UserError
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


def test_a_file_that_is_not_there_is_not_taken_for_no_file(tmp_path):
    begun = [DEMO, *(changed("recipe", "overrides", "student.checkpoint", f"/nowhere/{name}.pth") for name in "ab")]
    assert len({graph_of(tmp_path, each).students[0].train.folder for each in begun}) == 3
    files = [{}, {"checkpoint": "/nowhere/a.pth"}, {"checkpoint": "/nowhere/b.pth"}]
    taught = [changed("teacher", {"name": "test_resnet", **file}) for file in files]
    assert len({graph_of(tmp_path, each).common["store"].folder for each in taught}) == 3


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


def test_students_may_learn_from_the_teacher_alone(tmp_path):
    content = changed("recipe", "overrides", "distill.label_weight", 0)
    with pytest.raises(UserError, match="teacher.train: distill.label_weight is 0 and teacher.name is null"):
        graph_of(tmp_path, content)
    content["teacher"]["train"]["distill.label_weight"] = 1
    graph = graph_of(tmp_path, content)
    assert {each.config.distill.label_weight for each in graph.students} == {0}
    assert {each.config.teacher.store for each in graph.students} == {graph.common["store"].product}


def test_a_student_may_learn_from_the_teacher_alone(tmp_path):
    student = {"name": "test_byobnet", "overrides": {"distill.label_weight": 0}}
    first, *others = graph_of(tmp_path, changed("students", 0, student)).students
    assert first.config.distill.label_weight == 0 and {each.config.distill.label_weight for each in others} == {1}


def test_the_recipe_says_how_the_teacher_sees_images(tmp_path):
    content, classes = copy.deepcopy(DEMO), tmp_path / "classes.txt"
    classes.write_text("0\n")
    content["recipe"]["overrides"] |= {"teacher.image_size": 48, "teacher.classes": str(classes)}
    graph = graph_of(tmp_path, content)
    teacher, store = graph.common["teacher"].config, graph.common["store"].config
    assert teacher is not None and teacher.teacher.members == [] and store is not None
    assert (store.teacher.image_size, store.teacher.classes) == (48, classes)
    assert {each.config.teacher.image_size for each in graph.students} == {48}
