"""tools/average.py: averages by hand, the limits, a greedy soup on real images, and what takes the result."""

import copy
import hashlib
from pathlib import Path

import pytest
import timm
import torch

from conftest import TINY
from pipelines.shards.index import read_index
from tools import average, export
from tools.average import ema_weights, main
from tools.evaluate import evaluate_dataset
from tools.lib.average import ingredients
from tools.lib.common.evaluation import EvalConfig, EvalDataConfig, EvalStudentConfig
from trainer.builder import build_models
from trainer.cluster.world import World
from trainer.config.sections import StudentConfig, parse
from trainer.evaluation import trained as inference
from trainer.feed import open_splits
from trainer.models.ema import ModelEma
from trainer.models.student import build_student
from trainer.state import checkpoint

CPU = World(0, 1, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def steps(tiny_run) -> list[Path]:
    """The run's checkpoints of steps 10, 20 and 30."""
    return checkpoint.checkpoints(tiny_run / "checkpoints")


def content_of(path: Path) -> dict:
    """What a checkpoint holds, its digest checked."""
    return checkpoint.checked(path, torch.load(path, weights_only=True))


def changed(source: Path, path: Path, **changes) -> Path:
    """A checkpoint as the source, but for some entries, with a digest of its own."""
    checkpoint.write(path, {**content_of(source), **changes})
    return path


def averaged(out: Path, mode: str, *arguments) -> dict:
    """What the tool writes."""
    main([mode, str(out), *map(str, arguments)])
    return content_of(out)


def refused(capsys, *arguments) -> str:
    """The line that the tool ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 1 and line.startswith("error: ")
    return line


def test_uniform_is_the_mean_of_weights_and_statistics_and_the_last_counter(tiny_run, steps, tmp_path):
    for which, key in (("raw", "student"), ("ema", "ema")):
        found = averaged(tmp_path / "out.pt", "uniform", tiny_run, "--weights", which)
        parts = [content_of(path)[key] for path in steps]
        assert found["weights"] == which and found["state_dict"].keys() == parts[0].keys()
        counters = [name for name in parts[0] if name.endswith("num_batches_tracked")]
        assert counters and all(found["state_dict"][name] == parts[-1][name] for name in counters)
        for name in parts[0].keys() - set(counters):
            expected = torch.stack([part[name].double() for part in parts]).mean(0).float()
            assert found["state_dict"][name].dtype == torch.float32
            torch.testing.assert_close(found["state_dict"][name], expected, rtol=1e-7, atol=0)
    name = "stem.bn.running_mean"
    assert not torch.equal(parts[0][name], parts[-1][name])  # there was something to average


def test_the_mean_of_one_checkpoint_is_itself_and_so_is_that_of_copies(steps, tmp_path):
    copies = [changed(steps[1], tmp_path / f"copy-{i}.pt") for i in range(3)]
    original = content_of(steps[1])["ema"]
    for mode in (["uniform", steps[1]], ["uniform", *copies]):
        found = averaged(tmp_path / "out.pt", *mode)["state_dict"]
        assert all(torch.equal(found[name], value) for name, value in original.items())


def test_the_result_says_what_it_was_made_of(tiny_run, steps, tmp_path):
    found = averaged(tmp_path / "out.pt", "uniform", steps[2], steps[0])
    last = content_of(steps[0])
    for key in ("step", "config", "classes", "audit", "plan", "format_version", "software"):
        assert found[key] == last[key]
    assert found["average"]["how"] == "uniform"
    for row, path in zip(found["average"]["of"], (steps[2], steps[0]), strict=True):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        step = checkpoint.step_of(path)
        assert row == {
            **{"file": str(path), "sha256": digest, "step": step, "weights": "ema", "fraction": 0.5},
            **{"kept": True, "alone": None, "together": None},
        }


def test_the_weights_of_an_average_are_those_of_the_steps_that_each_checkpoint_stands_for():
    decay, steps = 0.5, [2, 3, 6]
    by_hand = [
        sum((1 - decay) * decay ** (6 - t) for t in range(low, high)) for low, high in ((-99, 3), (3, 4), (4, 7))
    ]
    assert by_hand == pytest.approx([1 / 16, 1 / 16, 7 / 8])
    assert ema_weights(steps, decay) == pytest.approx(by_hand)


def test_the_weights_of_an_average_at_the_limits():
    steps = [10, 20, 30]
    assert ema_weights(steps, 0.0) == [0, 0, 1]
    assert ema_weights(steps, 1e-9) == pytest.approx([0, 0, 1])
    assert ema_weights(steps, 1 - 1e-9) == pytest.approx([1, 0, 0], abs=1e-7)  # it never leaves where it began
    assert ema_weights([7], 0.9) == [1]
    assert sum(ema_weights(list(range(1, 2000, 7)), 0.999)) == pytest.approx(1)


def test_from_checkpoints_of_every_step_it_is_the_trainers_own_average(steps, tmp_path):
    model = timm.create_model("tiny_cnn", num_classes=10)
    average, decay, folder = None, 0.8, tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in range(1, 6):
        for value in model.state_dict().values():
            value.add_(torch.randn(value.shape) if value.is_floating_point() else 1)
        average = average or ModelEma(model)
        average.update(decay if step > 1 else 0.0)
        changed(steps[0], folder / f"step-{step:08d}.pt", student=copy.deepcopy(model.state_dict()), step=step)
    found = averaged(tmp_path / "out.pt", "ema", tmp_path / "run", "--decay", decay)
    assert found["weights"] == "ema" and found["step"] == 5
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-5, atol=1e-5)


def evaluated(path: Path, digits: Path) -> float:
    """Top-1 of a checkpoint as `python tools/evaluate.py` finds it."""
    config = EvalConfig(data=EvalDataConfig(root=digits), student=EvalStudentConfig(checkpoint=path))
    return evaluate_dataset(config, CPU)["top1"]


def test_a_greedy_soup_keeps_what_does_not_make_it_worse(tiny_run, digits, tmp_path):
    best = tiny_run / "checkpoints" / "best.pt"
    twin = changed(best, tmp_path / "twin.pt")
    weights = content_of(best)["state_dict"]
    upside_down = {**weights, **{name: -9 * weights[name] for name in ("head.fc.weight", "head.fc.bias")}}
    spoiled = changed(best, tmp_path / "spoiled.pt", state_dict=upside_down)
    found = averaged(tmp_path / "out.pt", "greedy", spoiled, best, twin, "--data", digits)
    top1 = evaluated(best, digits)
    rows = {row["file"]: row for row in found["average"]["of"]}
    assert list(rows) == [str(best), str(twin), str(spoiled)]
    assert [row["kept"] for row in rows.values()] == [True, True, False]
    assert [row["fraction"] for row in rows.values()] == [0.5, 0.5, 0]
    assert rows[str(best)]["alone"] == rows[str(twin)]["together"] == found["average"]["top1"] == top1
    assert rows[str(spoiled)]["alone"] == evaluated(spoiled, digits) < top1
    assert rows[str(spoiled)]["together"] < top1
    assert all(torch.equal(value, weights[name]) for name, value in found["state_dict"].items())


def test_what_a_greedy_soup_is_said_to_reach_is_what_evaluation_finds(tiny_run, steps, digits, tmp_path, capsys):
    found = averaged(tmp_path / "out.pt", "greedy", tiny_run, "--data", digits, "--weights", "raw")["average"]
    shown = capsys.readouterr().out
    alone = [row["alone"] for row in found["of"]]
    assert alone == sorted(alone, reverse=True) and found["top1"] >= alone[0]
    assert found["dataset"] == read_index(digits, "val").digest
    assert found["top1"] == evaluated(tmp_path / "out.pt", digits)
    assert all(f"{row['alone']:.2f}" in shown for row in found["of"])
    kept = [Path(row["file"]) for row in found["of"] if row["kept"]]
    mean = averaged(tmp_path / "mean.pt", "uniform", *kept[::-1], "--weights", "raw")["state_dict"]
    soup = content_of(tmp_path / "out.pt")["state_dict"]
    assert all(torch.equal(soup[name], value) for name, value in mean.items())


def test_a_greedy_soup_hashes_each_checkpoint_once_and_reads_it_once_for_its_trial(
    tiny_run, digits, tmp_path, monkeypatch
):
    best = tiny_run / "checkpoints" / "best.pt"
    paths = [best, *(changed(best, tmp_path / f"{name}.pt") for name in "abc")]
    hashed, read = [], []
    sha256_of, read_file = average.sha256_of, ingredients.read_file
    monkeypatch.setattr(average, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    monkeypatch.setattr(ingredients, "read_file", lambda path: read.append(path) or read_file(path))
    found = averaged(tmp_path / "out.pt", "greedy", *paths, "--data", digits)
    assert [row["kept"] for row in found["average"]["of"]] == [True] * 4
    assert sorted(hashed) == sorted(paths) and sorted(read) == sorted([*paths, *paths])


def test_whatever_takes_a_checkpoint_takes_the_result(tiny_run, digits, tmp_path):
    out = tmp_path / "out.pt"
    weights = averaged(out, "uniform", tiny_run)["state_dict"]
    trained = inference.load(None, out)
    assert trained.name == "tiny_cnn" and trained.weights == "ema" and trained.classes == list(map(str, range(10)))
    assert trained.transform == inference.load(None, tiny_run).transform
    assert 0 < evaluated(out, digits) < 100
    student = build_student(StudentConfig(name="tiny_cnn", checkpoint=out), 10, 32)
    as_teacher = ["--teacher.name", "tiny_cnn", "--teacher.checkpoint", str(out), "--data.root", str(digits)]
    config = parse([*TINY, *as_teacher])
    _, teachers = build_models(config, 10, open_splits(config.data)[1], CPU, {}, None)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(pixels), trained.module(pixels))
    assert teachers is not None
    for model in (trained.module, student):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    export.main([str(out), str(tmp_path / "exported")])
    assert inference.load(None, tmp_path / "exported").digest() == trained.digest()
    again = averaged(tmp_path / "again.pt", "uniform", out, tiny_run)
    assert again["weights"] == "ema" and len(again["average"]["of"]) == 4


def test_raw_and_averaged_weights_together_are_refused(tiny_run, steps, tmp_path, capsys):
    raw = changed(tiny_run / "checkpoints" / "best.pt", tmp_path / "raw.pt", weights="raw")
    line = refused(capsys, "uniform", tmp_path / "out.pt", raw, steps[0])
    assert f"{steps[0]}: does not fit {raw}: the kind of weights is ema, there it is raw. Average" in line
    assert averaged(tmp_path / "out.pt", "uniform", raw, steps[0], "--weights", "raw")["weights"] == "raw"


def test_the_card_of_an_average_says_what_was_averaged_and_nothing_of_one_run_alone(tiny_run, steps, tmp_path):
    def card(name: str, mode: str, *arguments) -> str:
        averaged(tmp_path / f"{name}.pt", mode, *arguments)
        export.main([str(tmp_path / f"{name}.pt"), str(tmp_path / name)])
        return (tmp_path / name / "README.md").read_text()

    text = card("uniform", "uniform", tiny_run, "--weights", "ema")
    assert "| weights | EMA of the weights; uniform average of 3 checkpoints: steps 10, 20, 30 |" in text
    assert "| seed | 0 |" in text
    text = card("ema", "ema", tiny_run, "--decay", 0.9)
    assert "| weights | EMA of the weights; ema average with decay 0.9 of 3 checkpoints: steps 10, 20, 30 |" in text
    config = content_of(steps[0])["config"]
    runs = {**config["run"], "seed": 7, "out": "elsewhere"}
    other = changed(steps[0], tmp_path / "other.pt", config={**config, "run": runs})
    text = card("two", "uniform", steps[2], other, "--weights", "raw")
    assert "| raw weights, not averaged; uniform average of 2 checkpoints of several runs |" in text
    assert "The averaged checkpoints differ in `run.seed`." in text and "| seed |" not in text
    text = card("again", "uniform", tmp_path / "two.pt", "--weights", "raw")
    assert "of several runs" in text and "| seed |" not in text


def test_an_average_of_files_without_audit_and_software_is_exported(steps, tmp_path):
    content = {key: value for key, value in content_of(steps[0]).items() if key not in ("audit", "software")}
    checkpoint.write(tmp_path / "old.pt", content)
    found = averaged(tmp_path / "out.pt", "uniform", tmp_path / "old.pt")
    assert not {"audit", "software"} & found.keys()
    export.main([str(tmp_path / "out.pt"), str(tmp_path / "out")])


def test_an_average_that_is_mostly_the_oldest_checkpoint_is_warned_of(tiny_run, tmp_path, capsys):
    averaged(tmp_path / "out.pt", "ema", tiny_run, "--decay", 0.9999)
    warning = capsys.readouterr().err
    assert "step-00000010.pt: gets 100%" in warning and "run.keep_every" in warning
    averaged(tmp_path / "out.pt", "ema", tiny_run, "--decay", 0.9)
    assert "warning" not in capsys.readouterr().err


def test_checkpoints_of_another_model_are_refused_with_the_first_difference(tiny_run, steps, tmp_path, capsys):
    first, base = steps[0], content_of(steps[0])
    student = {**base["config"]["student"], "name": "test_vit"}
    others = {
        "name": (
            {"config": {**base["config"], "student": student}},
            "student.name is test_vit, there it is tiny_cnn",
        ),
        "count": ({"classes": base["classes"][:9]}, "the class of output 9 is None, there it is 9"),
        "class": ({"classes": [*base["classes"][:9], "ten"]}, "the class of output 9 is ten, there it is 9"),
        "shape": (
            {"ema": {**base["ema"], "head.fc.bias": torch.zeros(9)}},
            "the shape of 'head.fc.bias' is [9], there it is [10]",
        ),
        "lacks": ({"ema": {"head.fc.bias": torch.zeros(10)}}, "is None, there it is ["),
    }
    for name, (changes, says) in others.items():
        other = changed(first, tmp_path / f"{name}.pt", **changes)
        line = refused(capsys, "uniform", tmp_path / "out.pt", first, other)
        assert f"{other}: does not fit {first}: " in line and says in line
    assert not (tmp_path / "out.pt").exists()


def test_files_that_cannot_be_averaged_are_refused_by_name(tiny_run, steps, tmp_path, capsys):
    out, ema = tmp_path / "out.pt", content_of(steps[0])["ema"]
    bad = changed(steps[0], tmp_path / "nan.pt", ema={**ema, "head.fc.bias": torch.full((10,), float("nan"))})
    newer = changed(steps[0], tmp_path / "newer.pt", format_version=99)
    foreign, damaged = tmp_path / "foreign.pth", tmp_path / "damaged.pt"
    torch.save(ema, foreign)
    content = torch.load(steps[0], weights_only=True)
    content["ema"]["head.fc.bias"] += 1
    torch.save(content, damaged)
    (tmp_path / "empty").mkdir()
    for path, says in (
        (bad, "'head.fc.bias' is not finite"),
        (foreign, "not a checkpoint of this trainer"),
        (newer, "format version 99, this program reads 1. Use the version of the program"),
        (damaged, "damaged (its content does not have the hash"),
        (tmp_path / "nowhere.pt", "neither a checkpoint nor a run's folder"),
        (tmp_path / "empty", "neither a checkpoint nor a run's folder"),
        (steps[1], "given twice"),
    ):
        line = refused(capsys, "uniform", out, steps[1], path)
        assert str(path) in line and says in line
    raw = changed(tiny_run / "checkpoints" / "best.pt", tmp_path / "raw.pt", weights="raw")
    line = refused(capsys, "uniform", out, steps[1], raw, "--weights", "ema")
    assert f"{raw}: holds no ema weights, only raw ones" in line
    weights = {**ema, "head.fc.bias": torch.zeros(9)}
    alike = [changed(steps[0], tmp_path / f"{name}.pt", ema=weights) for name in ("odd", "too")]
    assert f"{alike[0]}: does not fit model 'tiny_cnn'" in refused(capsys, "uniform", out, *alike)
    assert not out.exists()


def test_the_output_is_never_one_of_the_inputs_or_of_a_runs_own_files(tiny_run, steps, tmp_path, capsys):
    mine = changed(steps[0], tmp_path / "mine.pt")
    before = mine.read_bytes()
    (tmp_path / "link.pt").symlink_to(mine)
    for out, says in (
        (mine, "neither one of the checkpoints to average"),
        (tmp_path / "link.pt", "neither one of the checkpoints to average"),
        (tiny_run / "checkpoints" / "best.pt", "nor a name that runs give to their own"),
        (tmp_path / "step-00000040.pt", "nor a name that runs give to their own"),
        (tmp_path / "out.safetensors", "ends in .pt or .pth"),
        (tmp_path / "no" / "out.pt", "not a file in a folder that is there"),
    ):
        line = refused(capsys, "uniform", out, mine, steps[1])
        assert str(out) in line and says in line
    assert mine.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["link.pt", "mine.pt"]


def test_a_moving_average_needs_a_decay_and_the_folder_of_a_run(tiny_run, steps, tmp_path, capsys):
    for arguments, says in (
        ((tiny_run, "--decay", 1.0), "--decay is 1.0; it must lie in [0, 1)"),
        ((tiny_run, "--decay", -0.1), "--decay is -0.1; it must lie in [0, 1)"),
        ((steps[0], "--decay", 0.9), f"{steps[0]}: the average is over the steps of a run"),
    ):
        assert says in refused(capsys, "ema", tmp_path / "out.pt", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_greedy_soup_needs_a_dataset_of_the_models_classes(steps, digits, tmp_path, capsys):
    other = changed(steps[0], tmp_path / "other.pt", classes=[f"digit {i}" for i in range(10)])
    line = refused(capsys, "greedy", tmp_path / "out.pt", other, "--data", digits)
    assert f"{other}: class '0' of the dataset is 0 times among the model's 10" in line
    assert "manifest.json: not found" in refused(capsys, "greedy", tmp_path / "out.pt", steps[0], "--data", tmp_path)
    assert not (tmp_path / "out.pt").exists()
