"""A teacher's outputs are matched to the dataset's classes by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.common.errors import UserError
from pipelines.shards.manifest import read_manifest
from support.teachers import first_teacher, train_here
from trainer.config.sections import TeacherConfig, parse
from trainer.feed import open_splits
from trainer.models.class_names import class_order, read_classes
from trainer.models.teacher import (
    build_teacher,
)

pytest_plugins = ["support.teachers"]


def write_lines(path: Path, names: list[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def reordered(files, path: Path, places: list[int], **more) -> Path:
    """test_resnet's weights with its outputs in another order: output i is what was places[i], random for -1."""
    weights = torch.load(files["test_resnet"], weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        extra = torch.randn(1, *weights[name].shape[1:])
        weights[name] = torch.cat([weights[name], extra])[places]
    torch.save({"student": weights, **more}, path)
    return path


@pytest.mark.parametrize("extra", [0, 3])
def test_the_order_of_classes_puts_every_output_where_the_dataset_has_it(extra):
    generator = np.random.default_rng(extra)
    names = [f"n{i:08d}" for i in range(100)]
    listed = list(generator.permutation(names + [f"x{i}" for i in range(extra)]))
    order = class_order(names, listed, Path("c.txt"))
    assert [listed[place] for place in order] == names


def test_a_class_that_is_missing_or_doubled_is_named():
    with pytest.raises(UserError, match="c.txt: class 'dog' of the dataset is 0 times among the model's 4, not once"):
        class_order(["cat", "dog", "emu"], ["emu", "cat", "fox", "gnu"], Path("c.txt"))
    with pytest.raises(UserError, match="c.txt: class 'cat' of the dataset is 2 times among the model's 3"):
        class_order(["dog", "cat"], ["cat", "dog", "cat"], Path("c.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "c.txt: cannot be read .*No such file"),
        (b"", "c.txt: line 1 is empty"),
        (b"cat\n\ndog\n", "c.txt: line 2 is empty"),
        (b"\xff\xfe", "c.txt: cannot be read"),
    ],
)
def test_files_that_name_no_classes(tmp_path, content, message):
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "c.txt")


def test_names_are_read_whatever_ends_their_lines(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"cat\r\n dog \nemu\n\n")
    assert read_classes(tmp_path / "c.txt") == ["cat", "dog", "emu"]


def test_the_names_of_the_datasets_classes_are_the_manifests(digits):
    assert open_splits(parse(["--data.root", str(digits)]).data)[1] == read_manifest(digits)["classes"]
    assert open_splits(parse(["--data.pipeline", "synthetic"]).data)[1] is None


SHUFFLED = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


WITH_MORE = [-1, *SHUFFLED, -1]


@pytest.mark.parametrize("places", [SHUFFLED, WITH_MORE], ids=["shuffled", "with more classes"])
@pytest.mark.parametrize("named_by", ["file", "checkpoint"])
def test_outputs_in_another_order_are_found_by_name(digits, files, tmp_path, capsys, places, named_by):
    """The training is as with the teacher whose outputs lie in the dataset's order."""
    classes = [*read_manifest(digits)["classes"], "unknown"]
    listed = [classes[place] for place in places]
    if named_by == "file":
        teacher = ["--teacher.checkpoint", reordered(files, tmp_path / "t.pt", places)]
        teacher += ["--teacher.classes", write_lines(tmp_path / "c.txt", listed)]
    else:
        teacher = ["--teacher.checkpoint", reordered(files, tmp_path / "t.pt", places, classes=listed)]
    teacher += ["--teacher.name", "test_resnet", "--run.stop_after_steps", 2]
    lines = train_here(digits, tmp_path / "run", *teacher)
    said = f"teacher 'test_resnet': 10 of its {len(places)} classes are found by name ("
    assert said in capsys.readouterr().out
    expected = train_here(digits, tmp_path / "plain", *first_teacher(files), "--run.stop_after_steps", 2)
    for name in ("loss", "teacher_top1", "agreement"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-5)
    assert "found by name" not in capsys.readouterr().out


def test_a_checkpoint_with_the_datasets_own_classes_needs_no_order(digits, files, tmp_path):
    classes = read_manifest(digits)["classes"]
    path = reordered(files, tmp_path / "t.pt", list(range(10)), classes=classes)
    teacher = build_teacher(TeacherConfig("test_resnet", path), 10, 32, names=classes)
    assert teacher.order is None and teacher.note == ""


def test_a_checkpoint_of_other_classes_is_refused(digits, files, tmp_path):
    path = reordered(files, tmp_path / "t.pt", list(range(10)), classes=[*"012345678", "ten"])
    more = ["--teacher.name", "test_resnet", "--teacher.checkpoint", path]
    with pytest.raises(UserError, match="t.pt: class '9' of the dataset is 0 times among the model's 10"):
        train_here(digits, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()
    # The names that a user gives take precedence over those in the file.
    names = write_lines(tmp_path / "c.txt", read_manifest(digits)["classes"])
    train_here(digits, tmp_path / "run", *more, "--teacher.classes", names, "--run.stop_after_steps", 1)


def test_weights_of_another_number_of_classes_than_the_file_names_are_refused(files, tmp_path):
    names = [str(i) for i in range(10)]
    listed = write_lines(tmp_path / "c.txt", [*names, "more"])
    with pytest.raises(UserError, match="test_resnet.pth: its weights have 10 classes, .*c.txt names 11. Give weights"):
        build_teacher(TeacherConfig("test_resnet", files["test_resnet"], classes=listed), 10, 32, names=names)
    with pytest.raises(
        UserError, match="timm's weights of 'tresnet_v2_l': its weights have 1000 classes, .*c.txt names 11"
    ):
        build_teacher(TeacherConfig("tresnet_v2_l", classes=listed), 10, 32, names=names)
    with pytest.raises(UserError, match=r"has 5. Give weights .* or name every output in a file"):
        build_teacher(TeacherConfig("test_resnet", files["test_resnet"]), 5, 32, names=names[:5])


def test_a_dataset_without_names_needs_the_number_alone(files, tmp_path):
    path = reordered(files, tmp_path / "t.pt", list(range(10)), classes=list("abcdefghij"))
    assert build_teacher(TeacherConfig("test_resnet", path), 10, 32, names=None).order is None
    with pytest.raises(UserError, match="its weights have 10 classes, the dataset has 7"):
        build_teacher(TeacherConfig("test_resnet", path), 7, 32, names=None)
