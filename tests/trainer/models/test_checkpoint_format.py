"""The fields of this trainer's own files: each that is missing, of another type, not finite or too large is named."""

import copy
import functools
import math
import typing

import pytest
import timm
import torch

from chaos.runs import equal
from conftest import TINY
from pipelines.common.errors import UserError
from pipelines.plan.plan import BEFORE
from support.checkpoints import least_content as least
from trainer.config.sections import Config, parse, to_dict
from trainer.evaluation import trained
from trainer.models.checkpoint_format import RESUMED, Content, FieldError, check_fields, not_finite, wrong_setting
from trainer.models.ema import ModelEma
from trainer.state import checkpoint
from trainer.state.checkpoint import read, read_state
from trainer.state.train_state import TrainState
from trainer.state.writer import Writer
from trainer.update.optimizer import build_optimizer

WRONG = {
    "step": (None, True, "3", 3.0, -1, 10**13, torch.tensor(3), [3]),
    "config": (None, 7, [], {"student": 7}, {"data": {"image_size": torch.zeros(2)}}, {"run": {1: 2}}),
    "plan": (None, 7, [], {"seed": torch.zeros(2)}, {1: 2}),
    "audit": (7, {}, [7], [{"key": "optim.lr"}]),
    "classes": (7, "ab", {}, [1, 2], ["a", None]),
    "software": (7, [], {"torch": 2}),
    "evaluated": (None, -1, 1.0, True),
    "best": (None, 7, [], {"step": 1}, {"step": 1, "weights": "both", "top1": 3.0}),
    "student": (None, {}, [], {"w": 1.0}, {1: torch.zeros(2)}, torch.zeros(2)),
    "ema": ({}, 7, {"w": None}),
    "optimizer": (
        *(None, {}, [], {"state": []}, {"state": {}, "param_groups": {}}, {"state": {}, "param_groups": [{}]}),
        *({"state": {7: {}}, "param_groups": [{"params": [0]}]}, {"state": {}, "param_groups": [{"params": [0, 0]}]}),
    ),
    "scaler": (None, [], {"scale": 1.0}, {"scale": math.nan}, {"scale": 1 << 2000}),
    "stores": (None, [], {"teacher": 7}, {7: {}}, {"teacher": {"codec": torch.zeros(1)}}),
    "micro_batch": (None, -1, True, 1e30),
    "rank_statistics": (None, {}, [7], [[7]]),
    "weights": (None, "best", 7, ["ema"]),
    "top1": (None, "9", -1, 101, math.nan, math.inf, True),
    "metrics": (None, [], {}, {"images": math.nan}, {"images": 3, "loss": "0.5"}, {"images": 3, "loss": 1 << 2000}),
    "state_dict": (None, {}, {"w": 7}),
    "average": (None, {}, [], {"how": "uniform", "of": [{}]}, {"how": 7, "of": []}),
}


@pytest.mark.parametrize("name", typing.get_type_hints(Content))
def test_a_field_that_is_not_what_it_must_be_is_named(name):
    check_fields(least(2))
    for value in WRONG[name]:
        with pytest.raises(FieldError, match=f"^'{name}' is ") as error:
            check_fields({**least(2), name: value})
        assert len(str(error.value)) < 250


@pytest.mark.parametrize("name", ["plan", "student", "ema", "optimizer", "scaler", "step", "config"])
def test_a_field_without_which_no_run_can_go_on_is_named_and_the_others_may_be_absent(name, tmp_path):
    """Earlier versions wrote fewer fields."""
    content = least(2)
    assert set(content) - {"format_version"} == {*RESUMED}
    del content[name]
    checkpoint.write(tmp_path / "step-00000002.pt", content)
    with pytest.raises(checkpoint.DamagedError, match=rf"step-00000002.pt: damaged \('{name}' is missing\)"):
        read_state(tmp_path / "step-00000002.pt")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.image_size", "224"),
        ("data.image_size", [[0, 128], 7]),
        ("optim.betas", [0.9]),
        ("optim.lr", True),
        ("teacher.name", 7),
        ("teacher.others", [{"checkpoint": "w.pth"}]),
        ("teacher.others", [{"name": "resnet50", "checkpoint": 7}]),
        ("student.kwargs", [2]),
        ("student.checkpoint", 7),
        ("run.micro_batch", "most"),
        ("run.loggers", "wandb"),
        ("ema.warmup", 1),
    ],
)
def test_a_setting_of_another_type_is_named_if_it_is_asked_for(setting, value):
    section, _, name = setting.partition(".")
    config = to_dict(Config())
    assert wrong_setting(config, [setting]) == ""
    config[section][name] = value
    check_fields({**least(2), "config": config})
    assert wrong_setting(config, ["run.seed", setting]).startswith(f"{setting} = ")
    assert wrong_setting(config, ["run.seed"]) == ""


def test_every_configuration_that_can_be_written_is_read_as_one():
    others = "[{name: resnet50, checkpoint: a.pth, kwargs: {a: [1]}, image_size: 160}]"
    given = ["--teacher.others", others, "--data.image_size", "[[0,128],[9,160]]", "--run.micro_batch", "auto"]
    given += ["--student.kwargs.drop_rate", "0.1", "--run.loggers", "[wandb]", "--run.compile", "false"]
    config = to_dict(parse(given))
    assert wrong_setting(config, [f"{section}.{name}" for section in config for name in config[section]]) == ""
    assert wrong_setting({"of another version": 7, "run": {"removed": [1]}}, ["run.seed", "ema.decay"]) == ""


def test_a_setting_that_had_another_type_before_keeps_nobody_from_weights_that_do_not_depend_on_it(tiny_run, tmp_path):
    """A run resumes under today's settings, and reports which were others."""
    content = torch.load(tiny_run / "checkpoints" / "best.pt", weights_only=True)
    content.pop("digest")
    config = content["config"]
    config["run"]["watchdog_s"], config["optim"]["lr"] = math.inf, [0.1, 0.2]
    checkpoint.write(tmp_path / "old.pt", content)
    assert trained.load(None, tmp_path / "old.pt").classes == content["classes"]
    config["student"]["kwargs"] = None
    checkpoint.write(tmp_path / "old.pt", content)
    with pytest.raises(UserError, match="old.pt: written by another version: it holds student.kwargs = NoneType None"):
        trained.load(None, tmp_path / "old.pt")
    state, earlier = made(), saved()
    earlier["config"]["optim"]["lr"], earlier["config"]["run"]["ready_s"] = [0.1, 0.2], math.inf
    found = read_state(written(tmp_path, earlier, digest=True))
    assert checkpoint.load(tmp_path, found, state) == ["optim.lr was [0.1, 0.2], now it is 0.002"]


def test_a_loss_that_is_not_finite_beside_an_accuracy_is_written_and_read(tmp_path):
    state = made()
    state.best = {"step": 2, "weights": "raw", "top1": 50.0}
    for loss in (math.inf, math.nan):
        metrics = {"images": 3, "top1": 50.0, "loss": loss}
        writer = Writer()
        writer.submit(tmp_path / "best.pt", checkpoint.best_content_of(state, metrics))
        writer.wait()
        assert writer.failure == "" and str(read(tmp_path / "best.pt")["metrics"]) == str(metrics)


def test_infinities_and_nans_are_found_and_large_sums_are_not_taken_for_them():
    largest = torch.full((9,), torch.finfo(torch.float32).max)
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn):
        assert not_finite([("a", torch.ones(9).to(kind)), ("n", torch.ones(9).long())]) is None
        assert not_finite([("a", torch.ones(9)), ("b", torch.tensor([1, math.nan]).to(kind))]) == "b"
    assert not_finite([("a", largest), ("b", torch.tensor([math.inf, -math.inf]))]) == "b"
    assert not_finite([("a", torch.zeros(0)), ("b", largest.half() / 9)]) == "b"


# --- what a run resumes from ---


def made(step: int = 2, seed: int = 0) -> TrainState:
    """The state of a small run after `step` updates."""
    torch.manual_seed(seed)
    config = parse(TINY)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = build_optimizer(model, config.optim)
    for _ in range(step):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if seed == 0 else None
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, ModelEma(model), optimizer, scaler, {**BEFORE}, to_dict(config), [], None, step=step)


@functools.cache
def _saved(step: int) -> dict:
    return checkpoint.content_of(made(step))


def saved(step: int = 2) -> dict:
    """What the checkpoint of a small run holds."""
    return copy.deepcopy(_saved(step))


def written(folder, content: dict, digest: bool = False):
    path = checkpoint.path_of(folder, 2)
    torch.save({**content, "digest": checkpoint.digest_of(content)} if digest else content, path)
    return path


def first(part: dict) -> dict:
    return next(iter(part.values()))


def with_nan(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[0] = math.nan
    return value


DAMAGED = {
    "a weight that is not finite": (
        lambda found: found["student"].update({"fc.bias": with_nan(found["student"]["fc.bias"])}),
        "'fc.bias' in 'student' is not finite",
    ),
    "an average that is not finite": (
        lambda found: found["ema"].update({"fc.bias": with_nan(found["ema"]["fc.bias"])}),
        "'fc.bias' in 'ema' is not finite",
    ),
    "a moment that is not finite": (
        lambda found: found["optimizer"]["state"][3].update(
            exp_avg=with_nan(found["optimizer"]["state"][3]["exp_avg"])
        ),
        "'exp_avg' of parameter 3 in 'optimizer' is not finite",
    ),
    "moments that are lost": (
        lambda found: found["optimizer"]["state"].pop(3),
        "'optimizer' has lost the moments of some parameters",
    ),
    "an update that was not done": (
        lambda found: first(found["optimizer"]["state"])["step"].fill_(9),
        "'optimizer' has done 9.0 steps",
    ),
    "an evaluation to come": (lambda found: found.update(evaluated=3), "'evaluated' is 3, and 'step' is 2"),
    "another step": (lambda found: found.update(step=3, evaluated=0), "'step' is 3, and its name says 2"),
    "no average, though one is kept": (lambda found: found.update(ema=None), "'ema' is null, and its settings say"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_no_run_can_go_on_from_is_damage_and_the_checkpoint_before_is_taken(what, tmp_path):
    checkpoint.write(checkpoint.path_of(tmp_path, 1), saved(1))
    content = saved()
    assert equal(read_state(written(tmp_path, content)), content)
    change, message = DAMAGED[what]
    change(content)
    path = written(tmp_path, content, digest="lost" not in what)
    found, _, damaged = checkpoint.newest_complete(tmp_path)
    assert found.name == "step-00000001.pt" and damaged[0].startswith(f"{path}: damaged (")
    assert message in damaged[0]


@pytest.mark.parametrize("what", [what for what in DAMAGED if "not finite" in what])
def test_what_a_reader_would_reject_as_not_finite_is_not_written(what, tmp_path):
    content = saved()
    change, message = DAMAGED[what]
    change(content)
    writer = Writer()
    writer.submit(tmp_path / "step-00000002.pt", content)
    writer.wait()
    assert f"step-00000002.pt: not written: {message}. Lower optim.lr" in writer.failure
    assert not [*tmp_path.iterdir()]


def test_moments_that_a_parameter_never_had_are_none_that_were_lost(tmp_path):
    """A parameter without a gradient has none; the digest says that the file is what was written."""
    state = made()
    state.optimizer.state.pop(next(iter(state.optimizer.state)))
    path = written(tmp_path, checkpoint.content_of(state), digest=True)
    assert len(read_state(path)["optimizer"]["state"]) == len(state.optimizer.state)


OTHER = {
    "shape": lambda found: found["optimizer"]["state"][3].update(exp_avg_sq=torch.zeros(1)),
    "group": lambda found: found["optimizer"]["param_groups"].pop(),
    "missing weight": lambda found: found["student"].pop("fc.bias"),
    "unknown weight": lambda found: found["ema"].update(more=torch.zeros(1)),
    "weight of another shape": lambda found: found["student"].update({"fc.bias": torch.zeros(3)}),
    "statistics": lambda found: found.update(rank_statistics=[[torch.zeros(1)]]),
}


@pytest.mark.parametrize("what", OTHER)
def test_weights_and_moments_of_another_shape_are_refused(what, tmp_path):
    content = saved()
    OTHER[what](content)
    with pytest.raises(UserError, match="of another model .*. Start a new run with another --run.out"):
        checkpoint.load(tmp_path / "step-00000002.pt", content, made(1, seed=5))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), torch.AcceleratorError("CUDA error: misaligned")]
)
def test_an_error_of_the_gpu_is_not_taken_for_weights_of_another_model(error, tmp_path, monkeypatch):
    def copy(*_):
        raise error

    content, state = saved(), made(1, seed=5)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    with pytest.raises(RuntimeError, match=str(error)):
        checkpoint.load(tmp_path / "step-00000002.pt", content, state)


def test_all_that_a_run_writes_passes(tiny_run, tmp_path):
    for path in (tiny_run / "checkpoints").glob("*.pt"):
        assert (read if path.name == "best.pt" else read_state)(path)["format_version"] == 1
