"""The executor on the CPU decodes an image once for all rows that show it."""

import contextlib
import dataclasses
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipelines.cpu import _RepeatedImages
from pipelines.plan.plan import EvalPlan
from pipelines.shards.index import read_index
from support.executors import BAD, overwritten, pixels, recording


def test_an_image_is_decoded_once_for_all_plans_that_show_it(photos):
    decoded = []

    def decode(sample: int) -> np.ndarray:
        decoded.append(sample)
        return np.full((1, 1, 3), sample)

    images = _RepeatedImages(photos, decode)
    shown = [np.array([1, 2, 1]), np.array([2, 3]), np.array([1])]
    for samples in shown:
        images.announce(samples)
    for samples in shown:
        assert [int(images.take(s)()[0, 0, 0]) for s in samples.tolist()] == samples.tolist()
    assert sorted(decoded) == [1, 2, 3]
    assert not images._kept and not images._uses and images._kept_bytes == 0


def test_an_image_is_decoded_once_for_threads_that_ask_at_the_same_time(photos):
    decoded, both = [], threading.Barrier(2)

    def decode(sample: int) -> np.ndarray:
        decoded.append(sample)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # A second thread that decodes meets the first one here.
        return np.full((1, 1, 3), sample)

    images = _RepeatedImages(photos, decode)
    images.announce(np.array([1, 1]))
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(images.take(1)) for _ in range(2)]
    assert found[0].result() is found[1].result() and decoded == [1]


def test_what_is_kept_changes_nothing(digits, tmp_path, monkeypatch):
    """Copies that meet a damaged image at the same time, too."""
    nbytes = int(read_index(digits, "train").samples[BAD]["nbytes"])
    index = overwritten(digits, tmp_path / "zeros", BAD, bytes(nbytes), crc32=zlib.crc32(bytes(nbytes)))
    plan = EvalPlan(index, 8, 1.0, "bicubic").rows(0, 10)
    plan = dataclasses.replace(plan, sample=np.array([BAD, 1] * 5, dtype=np.int32))
    for budget in (0, 200, 1 << 20):
        monkeypatch.setattr("pipelines.cpu._KEPT_BYTES", budget)
        reported = []
        images = pixels("torchvision", index, [plan] * 4, threads=4, on_damage=recording(reported))
        assert (images[::2] == 128).all() and len(reported) == 1
        assert all(np.array_equal(image, images[1]) for image in images[1::2])
