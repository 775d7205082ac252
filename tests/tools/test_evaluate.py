"""python tools/evaluate.py: what a trained model is worth, and what cannot be evaluated."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image

from conftest import REPOSITORY, TINY
from pipelines.common.errors import UserError
from pipelines.shards.reader import ShardReader
from support.forked_python import executable
from support.processes import without_workers
from tools import evaluate
from tools.lib.common.evaluation import EvalConfig
from tools.lib.evaluate.real_labels import read_real_labels
from tools.lib.evaluate.report import show, write_and_show
from tools.lib.shards.build import BuildOptions, build
from trainer.cluster.world import World
from trainer.config.cli import parse_settings
from trainer.evaluation import metrics
from trainer.evaluation import trained as inference
from trainer.evaluation.metrics import Predictions
from trainer.evaluation.predict import eval_plans
from trainer.feed import open_configured_pipeline
from trainer.models.checkpoint_format import digest_of
from trainer.models.class_names import read_classes

HERE = World(0, 1, 1, torch.device("cpu"))


def config_of(*arguments) -> EvalConfig:
    return parse_settings(EvalConfig, [str(each) for each in arguments], prog="evaluate", description="")


def report(*arguments) -> dict:
    return evaluate.evaluate_dataset(config_of(*arguments), HERE)


@pytest.fixture(scope="module")
def run(tiny_run) -> Path:
    """A run with its best weights, and the last ones raw and averaged."""
    return tiny_run


@pytest.fixture(scope="module")
def last(run) -> Path:
    return sorted((run / "checkpoints").glob("step-*.pt"))[-1]


@pytest.fixture(scope="module")
def three_classes(digits_folder, tmp_path_factory) -> Path:
    """The digits 7, 2 and 5 alone, as a dataset."""
    folder = tmp_path_factory.mktemp("three")
    for split in ("train", "val"):
        for name in "725":
            shutil.copytree(digits_folder / split / name, folder / "images" / split / name)
    with without_workers():
        build(folder / "images", folder / "dataset", BuildOptions())
    return folder / "dataset"


def test_the_predictions_of_each_image_are_written_and_give_the_reported_accuracy(run, digits, tmp_path):
    file = tmp_path / "predictions.npz"
    found = report("--data.root", digits, "--student.checkpoint", run, "--run.predictions", file)
    with np.load(file) as arrays:
        assert arrays["sample"].tolist() == list(range(found["images"])) and arrays["top"].shape == (96, 5)
        assert 100 * np.mean(arrays["top"][:, 0] == arrays["label"]) == found["top1"]
        assert arrays["loss"].mean(dtype=np.float64) == found["loss"]
    with pytest.raises(UserError, match=r"run.predictions is .*: not a file in a folder that is there"):
        config_of("--run.predictions", tmp_path / "none" / "file.npz")


# --- the pixels ---


@pytest.mark.parametrize(("pipeline", "tolerance"), [("torchvision", 0.01), ("dali", 0.05)])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("test_resnet", {}),
        ("test_vit", {}),
        ("test_byobnet", {"crop_mode": "squash"}),
        ("test_efficientnet", {"crop_pct": 0.8, "image_size": 96}),
    ],
)
def test_a_model_says_what_it_says_of_the_images_of_timms_own_validation(
    photos, tmp_path, name, changed, pipeline, tolerance
):
    """The tolerance is in units of how much the logits of these images differ from each other."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    trained = inference.load(name, tmp_path / "weights.pth", **changed)
    size = changed.get(
        "image_size", model.pretrained_cfg.get("test_input_size", model.pretrained_cfg["input_size"])[-1]
    )
    settings = {"img_size": size, **{key: changed.get(key) for key in ("crop_pct", "crop_mode")}}
    transform = timm.data.create_transform(**timm.data.resolve_data_config(settings, model=model, use_test_size=True))
    encoded = ShardReader(photos).read(np.arange(len(photos)))
    with torch.no_grad():
        expected = model(torch.stack([transform(Image.open(io.BytesIO(each)).convert("RGB")) for each in encoded]))

    opened = open_configured_pipeline(
        config_of("--data.pipeline", pipeline).data, photos, world=HERE, decode="roi", on_bad=_fail
    )
    batches = list(opened.batches(eval_plans(trained.transform.plan(photos), 8, HERE)))
    with torch.no_grad():
        found = torch.cat([trained.module(trained.normalize()(batch.images))[batch.valid] for batch in batches])
    assert (found - expected).abs().max() < tolerance * expected.std(0).mean()
    assert torch.equal(found.argmax(1), expected.argmax(1))


def _fail(sample: int, error: str) -> None:
    raise AssertionError((sample, error))


# --- the numbers ---


def test_an_evaluation_finds_what_the_run_had_found(run, last, digits):
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    found = report("--data.root", digits, "--student.checkpoint", run)
    assert (found["step"], found["weights"]) == (best["step"], best["weights"])
    for name in ("top1", "top5", "loss", "images"):
        assert found[name] == pytest.approx(best["metrics"][name], rel=1e-5), name
    logged = json.loads((run / "summary.json").read_text())["evaluation"]
    for kind in ("raw", "ema"):
        found = report("--data.root", digits, "--student.checkpoint", last, "--student.weights", kind)
        assert found["weights"] == kind
        assert {name: found[name] for name in logged[kind]} == pytest.approx(logged[kind], rel=1e-5)


def test_two_ranks_find_what_one_finds_and_write_it(last, digits, tmp_path):
    arguments = [
        str(REPOSITORY / "tools" / "evaluate.py"),
        "--data.root",
        str(digits),
        "--student.checkpoint",
        str(last),
    ]
    arguments += ["--run.device", "cpu", "--run.batch", "7", "--run.json"]  # 96 images: 7 a rank do not come out even
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for command, name in (([], "one.json"), (launcher, "two.json")):
        done = subprocess.run(
            [executable(), *command, *arguments, str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "Classes that are found least" in done.stdout
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert (one.pop("ranks"), two.pop("ranks")) == (1, 2)
    assert one.pop("loss") == pytest.approx(two.pop("loss"))
    assert one.pop("ece") == pytest.approx(two.pop("ece"))
    assert one == two and one["images"] == 96
    assert sum(row["images"] for row in one["classes"]) == 96


def test_fewer_classes_than_the_model_knows_are_compared_among_themselves(last, three_classes, capsys):
    found = report("--data.root", three_classes, "--student.checkpoint", last)
    assert [row["class"] for row in found["classes"]] == ["2", "5", "7"] and found["outputs"] == 10
    show(found)
    assert "told apart among 3 of its 10 classes" in capsys.readouterr().out

    trained = inference.load(None, last)
    config = config_of("--data.root", three_classes)
    index = evaluate.read_index(three_classes, "val")
    with torch.no_grad():
        logits, labels = [], []
        pipeline = open_configured_pipeline(config.data, index, world=HERE, decode="roi", on_bad=_fail)
        for batch in pipeline.batches(eval_plans(trained.transform.plan(index), 32, HERE)):
            logits.append(trained.module(trained.normalize()(batch.images))[batch.valid])
            labels.append(batch.labels[batch.valid])
    among = torch.cat(logits)[:, [2, 5, 7]]
    assert found["top1"] == pytest.approx(100 * (among.argmax(1) == torch.cat(labels)).float().mean().item())
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(among, torch.cat(labels)).item(), rel=1e-5)
    assert found["top5"] == 100  # There are three classes.


def test_outputs_are_found_by_the_names_in_a_file(last, three_classes, tmp_path):
    """A file of weights alone, whose outputs somebody names."""
    torch.save(torch.load(last, weights_only=True)["ema"], tmp_path / "weights.pth")
    (tmp_path / "classes.txt").write_text("".join(f"{label}\n" for label in range(10)))
    given = ["--student.name", "tiny_cnn", "--student.checkpoint", tmp_path / "weights.pth"]
    given += ["--data.image_size", "32", "--data.interpolation", "bicubic", "--data.root", three_classes]
    own = report("--data.root", three_classes, "--student.checkpoint", last, "--data.interpolation", "bicubic")
    assert report(*given, "--student.classes", tmp_path / "classes.txt")["loss"] == own["loss"]
    with pytest.raises(UserError, match=r"weights.pth: has 10 outputs, the dataset has 3 classes. .*option classes"):
        report(*given)
    (tmp_path / "classes.txt").write_text("0\n1\n2\n")
    with pytest.raises(UserError, match=r"classes.txt: names 3 classes, .*weights.pth has 10 outputs"):
        report(*given, "--student.classes", tmp_path / "classes.txt")


def test_a_models_own_crop_can_be_overruled(last, digits):
    found = report("--data.root", digits, "--student.checkpoint", last, "--data.crop_pct", "0.5")
    assert found["view"] == {"image_size": 32, "crop_pct": 0.5, "crop_mode": "center", "interpolation": "bilinear"}
    assert found["loss"] != report("--data.root", digits, "--student.checkpoint", last)["loss"]


def test_a_damaged_image_is_counted_and_named(last, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    index = evaluate.read_index(tmp_path / "digits", "val")
    row = index.samples[5]
    with open(index.paths[row["shard"]], "r+b") as shard:
        shard.seek(row["offset"] + 3)
        shard.write(b"\0\0\0")
    found = report("--data.root", tmp_path / "digits", "--student.checkpoint", last)
    assert found["images"] == 96
    (damaged,) = found["damaged"]
    assert damaged.startswith(index.name(5)) and "its bytes have changed" in damaged


def test_several_labels_of_an_image_and_none(last, digits, tmp_path):
    index = evaluate.read_index(digits, "val")
    keys = [key.decode() for key in index.samples["key"]]
    labels = {key: [] if i % 2 else list(range(10)) for i, key in enumerate(keys)}
    (tmp_path / "real.json").write_text(json.dumps(labels))
    given = ["--data.root", digits, "--student.checkpoint", last, "--data.real_labels", tmp_path / "real.json"]
    assert report(*given)["real"] == {"top1": 100.0, "images": 48}
    own = {key: [int(label)] for key, label in zip(keys, index.samples["label"], strict=True)}
    (tmp_path / "real.json").write_text(json.dumps(own))
    found = report(*given)
    assert found["real"] == {"top1": pytest.approx(found["top1"]), "images": 96}
    own[keys[3]] = ["2", "11"]  # This label is a name.
    (tmp_path / "real.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=f"real.json: sample {keys[3]} has the label '11', which is no class of the"):
        report(*given)
    (tmp_path / "real.json").write_text(json.dumps({key: [] for key in keys}))
    with pytest.raises(UserError, match="real.json: no sample has a label in it"):
        report(*given)
    del own[keys[3]]
    (tmp_path / "real.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=f"real.json: has no list of labels for sample {keys[3]}"):
        report(*given)
    for text, message in (
        ("{", "cannot be read"),
        ("1", "has no list of labels"),
        (f'{{"{keys[0]}": 1}}', "has no list"),
    ):
        (tmp_path / "real.json").write_text(text)
        with pytest.raises(UserError, match=f"real.json: {message}"):
            report(*given)


def test_reals_own_list_goes_by_the_number_of_the_image(photos):
    names = {"ILSVRC2012_val_00000002": 1, "ILSVRC2012_val_00050000": 49_999}
    samples = np.zeros(2, dtype=[("key", "S60")])
    samples["key"] = [f"n01440764/{name}".encode() for name in names]
    index = type(photos)(photos.paths, samples, 1000, "")
    labels = read_real_labels(Path("imagenet"), index, timm.data.ImageNetInfo().label_names())
    known = timm.data.RealLabelsImagenet([""] * 50_000).real_labels
    assert labels == [known[f"{name}.JPEG"] for name in names]
    with pytest.raises(
        UserError, match="imagenet: a list goes by ImageNet's 1,000 classes, and the dataset has others"
    ):
        read_real_labels(Path("imagenet"), index, ["n01440764", "n01443537"])


# --- what cannot be evaluated ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data.root is missing"),
        (["--data.root", "DIGITS"], "no model is named. Give a checkpoint or run folder"),
        (["--data.root", "DIGITS", "--student.checkpoint", "nowhere.pt"], "nowhere.pt: cannot be read"),
        (["--data.root", "DIGITS", "--student.checkpoint", "FOLDER"], "neither a run's folder with checkpoints nor"),
        (["--data.root", "DIGITS", "--student.checkpoint", "LAST", "--student.name", "resnet18"], "is of model 'tiny_"),
        (["--data.root", "DIGITS", "--student.checkpoint", "BEST", "--student.weights", "OTHER"], "holds no .* only"),
        (["--data.root", "DIGITS", "--student.checkpoint", "DAMAGED"], "damaged.pt: damaged"),
        (["--data.root", "DIGITS", "--student.name", "resnet51"], "unknown model 'resnet51'; did you mean resnet"),
        (["--data.root", "DIGITS", "--data.split", "test"], "has no split 'test', only train, val"),
        (
            ["--data.crop_pct", "1.5", "--data.root", "DIGITS", "--student.checkpoint", "LAST"],
            "crop_pct is 1.5; it must lie in .0, 1.",
        ),
        (
            ["--data.crop_mode", "border", "--data.root", "DIGITS", "--student.checkpoint", "LAST"],
            "Expected one of .*center.*squash",
        ),
        (["--student.wieghts", "ema"], "unknown key 'student.wieghts'; did you mean 'student.weights'"),
        (["--run.json", "nowhere/there.json"], "run.json is nowhere/there.json: not a file in a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error_of_one_line(arguments, message, digits, run, last, tmp_path):
    content = torch.load(last, weights_only=True)
    content["student"]["head.fc.bias"] += 1
    torch.save(content, tmp_path / "damaged.pt")
    best = run / "checkpoints" / "best.pt"
    other = {"raw": "ema", "ema": "raw"}[torch.load(best, weights_only=True)["weights"]]
    known = {"DIGITS": digits, "LAST": last, "BEST": best, "OTHER": other, "FOLDER": tmp_path}
    known["DAMAGED"] = tmp_path / "damaged.pt"
    with pytest.raises(UserError, match=message):
        report(*[known.get(each, each) for each in arguments])


def test_weights_that_do_not_fit_the_model_they_are_said_to_be_of(digits, tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "vit.pth")
    given = ["--data.root", digits, "--student.checkpoint", tmp_path / "vit.pth"]
    with pytest.raises(UserError, match="vit.pth: does not say which model it is of. Name it .option name"):
        report(*given)
    with pytest.raises(UserError, match="vit.pth: .*none of its weights has 1,000 outputs"):
        report(*given, "--student.name", "test_resnet")


def test_a_model_without_finite_outputs_has_no_accuracy(last, digits, tmp_path):
    weights = torch.load(last, weights_only=True)["ema"]
    weights["head.fc.weight"].fill_(1e38)  # finite, as its products are not
    torch.save(weights, tmp_path / "weights.pth")
    given = ["--student.name", "tiny_cnn", "--student.checkpoint", tmp_path / "weights.pth", "--data.root", digits]
    with pytest.raises(
        UserError, match="the model's outputs are not finite for 96 of 96 images, the first is val-0000"
    ):
        report(*given, "--data.image_size", "32")


def test_ranks_that_are_about_to_evaluate_different_things_are_refused():
    said: list[dict] = []

    class Rank(World):
        """One of two ranks that are asked one after the other."""

        def all_gather(self, values):
            said.extend(values)
            return [said[0], *values]

    facts = {"run.batch": 128, "the dataset's digest": "abc"}
    evaluate.check_ranks_agree(Rank(0, 2, 2, torch.device("cpu")), facts)
    second = Rank(1, 2, 2, torch.device("cpu"))
    evaluate.check_ranks_agree(second, facts)
    with pytest.raises(UserError, match=r"the dataset's digest is not the same on all ranks: \['abc', 'def'\]"):
        evaluate.check_ranks_agree(second, {**facts, "the dataset's digest": "def"})


def test_a_report_that_cannot_be_written_is_shown(last, digits, tmp_path, capsys):
    found = report("--data.root", digits, "--student.checkpoint", last)
    with pytest.raises(FileNotFoundError):
        write_and_show(found, tmp_path / "gone" / "report.json")
    assert "Classes that are found least" in capsys.readouterr().out


def test_a_report_that_nobody_reads_is_written(last, digits, tmp_path, monkeypatch):
    """Behind `| head -1` rich ends the process."""
    found = report("--data.root", digits, "--student.checkpoint", last)
    monkeypatch.setattr("tools.lib.evaluate.report.show", lambda report: sys.exit(1))
    with pytest.raises(SystemExit):
        write_and_show(found, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["top1"] == found["top1"]


def test_a_checkpoint_of_this_trainer_says_all_that_belongs_to_it(last):
    trained = inference.load(None, last)
    assert (trained.name, trained.weights, trained.origin["step"]) == ("tiny_cnn", "ema", 30)
    assert trained.classes == [str(label) for label in range(10)]
    assert trained.transform.image_size == int(TINY[TINY.index("--data.image_size") + 1])
    content = torch.load(last, weights_only=True)
    assert all(torch.equal(value, content["ema"][name]) for name, value in trained.module.state_dict().items())
    assert digest_of(content["ema"]) != digest_of(content["student"])


def test_a_file_of_classes_from_windows_and_an_empty_one(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert read_classes(tmp_path / "classes.txt") == ["cat", "dog"]
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(UserError, match="classes.txt: line 1 is empty. It should name one class on a line"):
        read_classes(tmp_path / "classes.txt")


def test_a_crop_that_is_larger_than_the_resized_image_is_refused():
    with pytest.raises(UserError, match=r"crop_pct is 1.15; it must lie in \(0, 1\]"):
        inference.EvalTransform(448, 1.15, "center", "bicubic")


# --- the arithmetic ---


def said(top: list[list[int]], label: list[int], confidence: list[float]) -> Predictions:
    num = len(label)
    return Predictions(
        np.arange(num), np.array(label), np.array(top), np.array(confidence, np.float32), np.ones(num, np.float32)
    )


def test_the_calibration_error_by_hand():
    correct = np.array([True, False, True, True])
    confidence = np.array([0.9, 0.95, 0.62, 1.0], np.float32)
    # There are ten bins: 0.62 is alone; 0.9 is alone, since a bin holds its upper end; 0.95 and 1.0 are together.
    expected = (abs(1 - 0.62) + abs(1 - 0.9) + abs(1 - 1.95)) / 4
    assert metrics.calibration_error(confidence, correct, bins=10) == pytest.approx(expected)
    assert metrics.calibration_error(np.ones(3, np.float32), np.ones(3, bool)) == 0


def test_classes_and_what_they_are_taken_for():
    predictions = said([[0, 1], [1, 0], [1, 2], [3, 1], [2, 3]], [0, 0, 0, 0, 2], [0.5] * 5)
    images, accuracy = metrics.per_class(predictions, 4)
    assert images.tolist() == [4, 0, 1, 0] and accuracy[[0, 2]].tolist() == [0.25, 1.0]
    assert np.isnan(accuracy[[1, 3]]).all()
    assert metrics.confusions(predictions, 0) == [(1, 0.5), (3, 0.25)]
    assert metrics.confusions(predictions, 2) == []
    assert metrics.summary(predictions)["top1"] == pytest.approx(40)
    assert metrics.summary(predictions)["top5"] == pytest.approx(60)


def test_an_image_that_comes_twice_or_not_at_all_is_noticed():
    part = said([[0]] * 3, [0] * 3, [0.5] * 3)
    assert len(metrics.joined([part], 3)) == 3
    with pytest.raises(AssertionError):
        metrics.joined([part, part], 3)
    with pytest.raises(AssertionError):
        metrics.joined([part], 4)
