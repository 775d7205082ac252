"""Readers of shards within the system's limits."""

import gc
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import REPOSITORY
from pipelines.common.errors import UserError
from pipelines.plan.plan import EvalPlan
from pipelines.shards.index import read_index
from pipelines.shards.reader import ShardReader
from support.executors import pixels


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_a_shard_that_shrank_is_named(digits, tmp_path, name):
    root = shutil.copytree(digits, tmp_path / "shrunk")
    index = read_index(root, "train")
    index.paths[0].write_bytes(index.paths[0].read_bytes()[:2048])
    with pytest.raises(UserError, match=r"train-00000.tar: the index names bytes .* the shard has 2048"):
        pixels(name, index, [EvalPlan(index, 32, 1.0, "bicubic").rows(0, 50)])


def test_readers_raise_the_limit_of_open_files_together(digits):
    """Two splits of many shards, in a process whose limit is low."""
    script = (
        "import dataclasses, resource, sys; from pathlib import Path; from pipelines.shards.index import read_index;"
        "from pipelines.shards.reader import ShardReader;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (600, 5000));"
        "index = read_index(Path(sys.argv[1]), 'train');"
        "many = dataclasses.replace(index, paths=index.paths * 200);"
        "readers = [ShardReader(many) for _ in range(2)];"
        "[reader._open(i) for reader in readers for i in range(800)]; print('opened')"
    )
    done = subprocess.run([sys.executable, "-c", script, digits], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "opened\n", done.stderr


@pytest.mark.parametrize("limit", [40, 64, 900])
def test_more_shards_than_the_system_allows_open_files_are_read_by_several_threads_alike(digits, limit):
    """A thousand shards, every one of which is a file of its own to the readers."""
    script = f"""
import dataclasses, os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from pipelines.shards.index import read_index
from pipelines.shards.reader import ShardReader

resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
index = read_index(Path(sys.argv[1]), "train")
samples = np.concatenate([index.samples] * 250)
samples["shard"] += len(index.paths) * np.repeat(np.arange(250), len(index)).astype(samples["shard"].dtype)
many = dataclasses.replace(index, paths=index.paths * 250, samples=samples)
readers = [ShardReader(many) for _ in range(3)]  # as of two splits and a tool

def same(reader, rows):
    reader.will_need(rows)
    expected = expected_of[0].read(rows % len(index))
    return all(np.array_equal(a, b) for a, b in zip(reader.read(rows), expected, strict=True))

expected_of = [ShardReader(index)]
chance = np.random.default_rng(0)
jobs = [(readers[i % 3], chance.integers(0, len(many), 50)) for i in range(120)]
with ThreadPoolExecutor(8) as pool:
    print(all(pool.map(same, *zip(*jobs))), len(os.listdir("/proc/self/fd")) < {limit})
"""
    done = subprocess.run([sys.executable, "-c", script, digits], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "True True\n", done.stderr


def test_a_reader_that_is_gone_has_closed_its_files(digits):
    index = read_index(digits, "train")
    gc.collect()  # Readers of other tests go first.
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        ShardReader(index).read(np.arange(len(index)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_limit_of_open_files_is_named_where_not_even_one_more_can_be_opened(digits, tmp_path):
    """In a process that has everything open that it may; with the limit that the message names it reads."""
    script = (
        "import os, resource, sys; from pathlib import Path; import numpy as np;"
        "from pipelines.shards.index import read_index;"
        "from pipelines.shards.reader import ShardReader; reader = ShardReader(read_index(Path(sys.argv[1]), 'train'));"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), 8192));"
        "others = [os.open('/dev/null', os.O_RDONLY) for _ in range(64 - len(os.listdir('/proc/self/fd')) + 1)];"
        "print(len(reader.read(np.arange(3))))"
    )
    command = [sys.executable, "-c", script, digits]
    done = subprocess.run([*command, "64"], capture_output=True, text=True, cwd=REPOSITORY)
    assert "(Too many open files). Allow more open files, with 'ulimit -n 4096'" in done.stderr
    done = subprocess.run([*command, "4096"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "3\n", done.stderr
