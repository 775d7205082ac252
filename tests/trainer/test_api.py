"""What a researcher uses from a notebook: Config, build, train, load_model."""

import json
import re
import subprocess
import sys

import pytest

import trainer
from conftest import REPOSITORY
from pipelines.common.errors import UserError
from trainer import Config, build, load_model, train
from trainer.cluster.code_version import source_hash

SETTINGS = {
    "student.name": "tiny_cnn",
    "teacher.name": None,
    "data.image_size": 32,
    "augment.mix_group": 32,
    "run.global_batch": 64,
    "run.device": "cpu",
    "run.loggers": [],
    "run.channels_last": True,
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "schedule.cooldown_epochs": 0,
}


def test_a_config_has_the_values_of_its_file_and_the_overrides(tmp_path):
    (tmp_path / "file.yaml").write_text("optim: {lr: 0.5, eps: 0.25}\nema: {warmup: true}\n")
    config = Config.load(tmp_path / "file.yaml", {**SETTINGS, "optim.eps": 0.125, "student.kwargs": {"width": 8}})
    assert (config.optim.lr, config.optim.eps, config.ema.warmup) == (0.5, 0.125, True)
    assert config.teacher.name is None and config.student.kwargs == {"width": 8}
    assert Config.load() == Config()


def test_a_config_names_the_nearest_known_setting():
    with pytest.raises(UserError, match="optim.weight_decay"):
        Config.load(overrides={"optim.weigth_decay": 0.1})


def test_a_run_is_built_trained_and_its_model_loaded(digits, tmp_path):
    run = build(Config.load(overrides={**SETTINGS, "data.root": digits, "run.out": tmp_path / "run"}))
    summary = train(run)
    assert summary["finished"] and summary["step"] == run.total_steps == 5
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["version"] == trainer.__version__ and summary["source"] == source_hash()
    assert load_model(tmp_path / "run").classes == run.state.classes


def test_a_single_update_can_be_made_by_hand(digits, tmp_path):
    run = build(Config.load(overrides={**SETTINGS, "data.root": digits, "run.out": tmp_path / "run"}))
    feed = run.feed(0)
    metrics = run.step(feed, 0)
    feed.close()
    assert metrics.loss.isfinite() and len(metrics.bad) == 64
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_documented_example_runs(digits, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "training.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "OUT").symlink_to(digits)
    short = '"run.out": "RUN", "run.stop_after_steps": 1, "schedule.epochs": 6, "run.device": "cpu"}'
    found = {}
    exec(example.replace('"run.out": "RUN"}', short), found)
    assert found["summary"]["step"] == 1 and found["model"].classes == found["run"].state.classes
    assert found["logits"].shape == (4, 10) and found["logits"].isfinite().all()


def test_importing_the_trainer_imports_no_torch():
    program = "import sys, trainer; print('torch' in sys.modules, trainer.__version__, *trainer.__all__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == ["False", trainer.__version__, *trainer.__all__]


def test_every_public_name_is_found_and_no_other():
    assert all(hasattr(trainer, name) for name in trainer.__all__)
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'Trainer'"):
        trainer.Trainer  # noqa: B018


def test_the_package_is_installed_under_the_same_version():
    from setuptools.config.setupcfg import read_configuration

    assert read_configuration(REPOSITORY / "setup.cfg")["metadata"]["version"] == trainer.__version__
