"""The facts that must be equal on all ranks: settings, data, models, code and versions."""

import shutil

import torch

from conftest import TINY
from trainer.builder import facts_to_compare
from trainer.cluster.world import World
from trainer.config.sections import parse

ONE = World(0, 1, 1, torch.device("cpu"))


def test_paths_and_threads_may_differ_between_machines_and_nothing_else(digits, tmp_path):
    here = [*TINY, "--data.root", str(digits)]
    copy = shutil.copytree(digits, tmp_path / "copy")
    there = [*TINY, "--data.root", str(copy), "--data.threads", "3", "--run.out", str(tmp_path), "--run.device", "auto"]
    assert facts_to_compare(parse(here), ONE.device) == facts_to_compare(parse(there), ONE.device)
    for change in (["--optim.lr", "1"], ["--run.seed", "1"], ["--augment.mix_group", "16"]):
        assert facts_to_compare(parse(here), ONE.device) != facts_to_compare(parse([*here, *change]), ONE.device)


def test_the_facts_hold_the_data_the_code_the_versions_and_the_weights(digits, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"1")
    arguments = [*TINY, "--data.root", str(digits), "--student.checkpoint", str(weights)]
    found = facts_to_compare(parse(arguments), ONE.device)
    assert found["version of torch"] and found["source file trainer/cluster/rendezvous.py"]
    assert len(found["dataset digest of 'train'"]) == len(found["dataset digest of 'val'"]) == 12
    weights.write_bytes(b"2")
    now = facts_to_compare(parse(arguments), ONE.device)
    assert {name for name in found if found[name] != now[name]} == {"content of student.checkpoint"}


def test_ranks_whose_devices_would_compute_otherwise_do_not_agree():
    config = parse([])
    assert facts_to_compare(config, ONE.device)["the precision"] == "torch.float32"
    assert facts_to_compare(parse(["--run.precision", "bf16"]), ONE.device)["the precision"] == "torch.bfloat16"
