"""This rank's images: how the global batch is divided, and how they are decoded."""

import json
import sys

import pytest
import torch

from conftest import TINY, train_here
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from pipelines.shards.index import read_index
from support.ranks import run_ranks
from support.tiny_runs import ONE, newest
from trainer.cluster.world import World
from trainer.config.sections import parse
from trainer.feed import choose_decode
from trainer.models.normalize import Normalize


def test_each_epoch_trains_on_images_of_its_size_and_the_last_size_is_evaluated(digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Normalize, "forward", _noting(Normalize.forward, seen))
    sizes = ["--data.image_size", "[[0,24],[1,16],[2,32]]", "--run.eval_every", 2, "--run.micro_batch", 64]
    train_here(digits, tmp_path, *sizes, "--run.stop_after_steps", 12)
    evaluation = [32]  # 96 images, in one batch
    assert seen == [24] * 5 + [16] * 5 + evaluation + [32] * 2


def _noting(forward, sizes: list[int]):
    def noting(self, pixels):
        sizes.append(pixels.shape[1])
        return forward(self, pixels)

    return noting


def assert_close_states(a: dict, b: dict, tolerance: float) -> None:
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), rtol=tolerance, atol=tolerance), name


def test_two_ranks_end_within_float_noise_of_one_and_hold_the_same_statistics(digits, teacher, tmp_path):
    arguments = [*teacher, "--run.stop_after_steps", 6, "--optim.lr", "1e-3", "--augment.mix_group", 16]
    train_here(digits, tmp_path / "1", *arguments)
    run_ranks(2, "--data.root", digits, "--run.out", tmp_path / "2", *arguments)
    one, two = newest(tmp_path / "1"), newest(tmp_path / "2")
    for part in ("student", "ema"):
        assert_close_states(one[part], two[part], 1e-4)
    losses = [
        [line["loss"] for line in read_json_lines(tmp_path / ranks / "metrics.jsonl") if line["kind"] == "train"]
        for ranks in ("1", "2")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    evaluations = [read_json_lines(tmp_path / ranks / "metrics.jsonl")[-2]["raw"] for ranks in ("1", "2")]
    assert evaluations[0]["images"] == evaluations[1]["images"] == 96
    assert evaluations[0]["loss"] == pytest.approx(evaluations[1]["loss"], rel=1e-3)


def test_micro_batches_change_only_what_batch_normalisation_sees(digits, tmp_path):
    """A model without batch normalisation: any split of the global batch gives the same weights."""
    arguments = ["--student.name", "test_vit", "--run.stop_after_steps", 3, "--optim.lr", "1e-3"]
    arguments += ["--augment.mix_group", 16]
    for micro in (16, 32, 64):
        train_here(digits, tmp_path / str(micro), *arguments, "--run.micro_batch", micro)
    for micro in (32, 64):
        a, b = newest(tmp_path / "16")["student"], newest(tmp_path / str(micro))["student"]
        assert_close_states(a, b, 1e-4)


def test_a_size_that_would_never_be_reached_is_refused():
    message = "data.image_size: 64 px begin with epoch 4, but the run ends after 4 epochs: let them begin earlier, or"
    with pytest.raises(UserError, match=message):
        parse([*TINY, "--data.image_size", "[[0,32],[4,64]]"])


def test_the_card_is_tried_once_and_the_answer_remembered(digits, tmp_path, monkeypatch):
    """On a machine without a GPU, which the world and the card's name only pretend to be."""
    index, tried = read_index(digits, "train"), []
    world = World(0, 1, 1, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr("trainer.feed.probe_dataset", lambda *a: tried.append(a) or ("full", "regions crashed"))
    config = parse(TINY).data
    path = tmp_path / "decode.json"
    chosen = choose_decode(config, index, world, path)
    assert chosen["decode"] == "full" and chosen["why"] == "regions crashed" and len(tried) == 1
    assert choose_decode(config, index, world, path) == chosen and len(tried) == 2  # nothing was written yet
    path.write_text(json.dumps(chosen))
    assert choose_decode(config, index, world, path) == chosen and len(tried) == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    assert choose_decode(config, index, world, path)["device"] == "H200" and len(tried) == 3
    path.write_text('{"deco')
    choose_decode(config, index, world, path)
    assert len(tried) == 4
    assert choose_decode(config, index, ONE) == {"decode": "roi"}
    assert choose_decode(parse([*TINY, "--data.decode", "full"]).data, index, world) == {"decode": "full"}


def _import_only_from(folder, monkeypatch) -> None:
    for name in {"nvidia", *(name for name in sys.modules if name.startswith("nvidia."))}:
        monkeypatch.setitem(sys.modules, name, None)  # What is there now is there again afterwards.
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(folder)])


@pytest.mark.parametrize("version", ["2.2.0", "unknown"])
def test_the_card_is_tried_whatever_the_name_of_the_package_of_dali(version, digits, tmp_path, monkeypatch):
    packages = [] if version == "unknown" else [("nvidia_dali_cuda130", "Name: nvidia-dali-cuda130")]
    for name, line in packages:
        (tmp_path / f"{name}-2.2.0.dist-info").mkdir()
        (tmp_path / f"{name}-2.2.0.dist-info" / "METADATA").write_text(f"{line}\nVersion: {version}\n")
    (tmp_path / "nvidia" / "dali").mkdir(parents=True)
    (tmp_path / "nvidia" / "dali" / "__init__.py").touch()
    _import_only_from(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr("trainer.feed.probe_dataset", lambda *_: ("full", "regions crashed"))
    world = World(0, 1, 1, torch.device("cuda", 0))
    chosen = choose_decode(parse(TINY).data, read_index(digits, "train"), world)
    assert (chosen["decode"], chosen["dali"]) == ("full", version)


def test_the_card_is_not_tried_without_dali(digits, tmp_path, monkeypatch):
    _import_only_from(tmp_path, monkeypatch)
    world = World(0, 1, 1, torch.device("cuda", 0))
    assert choose_decode(parse(TINY).data, read_index(digits, "train"), world) == {"decode": "roi"}
