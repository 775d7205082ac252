"""What the index and the plan cost by the number of samples. Each measurement is a process of its own, without torch:

    python -m tools.lib.benchmark.planning FOLDER

opens the dataset in FOLDER as a run does, checks included, plans global batches from all over a run of the recipe, and
prints seconds, milliseconds and MB. The datasets are real but for the images: an index file, its manifest, and shards
that are holes; all of it is in the page cache. "memory" is what the process has taken for itself since before it opened
the index, "mapped" the index's own pages that it can see: they belong to the page cache, and all ranks of a machine
share them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.common.files import sha256_of, write_synced
from pipelines.plan.draws import AugmentConfig
from pipelines.plan.plan import TrainPlan
from pipelines.shards.index import read_index, sample_dtype
from pipelines.shards.manifest import FORMAT_VERSION, INDEX, MANIFEST, manifest_bytes, split_digest

SAMPLES = (10_000, 100_000, 1_281_167, 14_000_000)
_REPOSITORY = Path(__file__).resolve().parents[3]
_GLOBAL_BATCH, _EPOCHS = 1024, 310
_BATCHES = 20  # planned in one process
_NUM_CLASSES = 1000
_PER_SHARD, _IMAGE_BYTES, _SAMPLE_BYTES = 5000, 110_000, 112_128  # ImageNet's mean; with the tar's headers
_KEY_BYTES = 15  # n01440764_10026
_AT_A_TIME = 1 << 20


def plan_rows(sizes: tuple[int, ...], repeats: int) -> list[dict]:
    """A row for each number of samples, medians over `repeats` processes in turn. No fewer samples than a batch."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {size: Path(scratch) / str(size) for size in sizes}
        for size, folder in folders.items():
            write_dataset(folder, size)
        found = {size: [] for size in sizes}
        for _ in range(repeats):
            for size, folder in folders.items():
                found[size].append(_in_own_process(folder))
    return [_row(size, results) for size, results in found.items()]


def _row(size: int, results: list[dict]) -> dict:
    opened = [result["open_s"] for result in results]
    planned = [milliseconds for result in results for milliseconds in result["plan_ms"]]
    return {
        "what": f"{size:,} samples",
        "augmentation": "index and plan",
        "open_s": round(statistics.median(opened), 3),
        "open_min": round(min(opened), 3),
        "open_max": round(max(opened), 3),
        "plan_ms": round(statistics.median(planned), 2),
        "min": round(min(planned), 2),
        "max": round(max(planned), 2),
        "memory_mb": round(statistics.median(result["memory_mb"] for result in results), 1),
        "mapped_mb": round(statistics.median(result["mapped_mb"] for result in results), 1),
    }


def _in_own_process(folder: Path) -> dict:
    command = [sys.executable, "-m", "tools.lib.benchmark.planning", str(folder)]
    done = subprocess.run(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measured(folder: Path) -> dict:
    """Open the training split and plan batches from all over a run: seconds, milliseconds each, and MB."""
    before = _resident_mb()
    start_s = time.perf_counter()
    index = read_index(folder, "train")
    open_s = time.perf_counter() - start_s
    plan = TrainPlan(index, AugmentConfig(), 0, _GLOBAL_BATCH, 224, fill=(124, 116, 104))
    steps = np.linspace(0, _EPOCHS * plan.steps_per_epoch - 1, 1 + _BATCHES).astype(int).tolist()
    plan_ms = []
    for step in steps:
        start_s = time.perf_counter()
        plan.rows(step * _GLOBAL_BATCH, (step + 1) * _GLOBAL_BATCH)
        plan_ms.append(1e3 * (time.perf_counter() - start_s))
    memory_mb, mapped_mb = (now - then for now, then in zip(_resident_mb(), before, strict=True))
    return {"open_s": open_s, "plan_ms": plan_ms[1:], "memory_mb": memory_mb, "mapped_mb": mapped_mb}  # 1 is warm-up


def _resident_mb() -> tuple[float, float]:
    """Memory of this process alone, and of the files that it has mapped."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped = (int(status[key].split()[0]) / 1e3 for key in ("RssAnon", "RssFile"))
    return anonymous, mapped


def write_dataset(folder: Path, num_samples: int) -> None:
    """A dataset folder without images: 375 x 500 pixels each, as tools/shard_imagenet.py would describe them."""
    train = folder / "train"
    train.mkdir(parents=True)
    path = train / INDEX
    dtype = sample_dtype(_KEY_BYTES)
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_samples,)}
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, num_samples, _AT_A_TIME):
            file.write(_rows(np.arange(start, min(start + _AT_A_TIME, num_samples)), dtype).tobytes())
    shards = [_write_hole(train, first, num_samples) for first in range(0, num_samples, _PER_SHARD)]
    digest = sha256_of(path)
    entry = {
        "samples": num_samples,
        "bytes": sum(shard["bytes"] for shard in shards),
        "class_counts": np.bincount(np.arange(num_samples) % _NUM_CLASSES, minlength=_NUM_CLASSES).tolist(),
        "index_sha256": digest,
        "digest": split_digest(digest, [shard["sha256"] for shard in shards]),
        "shards": shards,
    }
    remarks = ("repaired", "rejected", "duplicates", "tiny", "oriented", "resized")
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": {"kind": "folder", "name": "none"},
        "classes": [f"n{number:08}" for number in range(_NUM_CLASSES)],
        "options": {"audit": True},
        "splits": {"train": entry},
        "audit": {"sha256": "", "counts": dict.fromkeys(remarks, 0), **{kind: [] for kind in remarks[:3]}},
    }
    write_synced(folder / MANIFEST, manifest_bytes(manifest))


def _rows(number: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The index's rows of samples `number`: int64 [n]."""
    rows = np.zeros(len(number), dtype=dtype)
    rows["shard"], place = np.divmod(number, _PER_SHARD)
    rows["offset"] = place * _SAMPLE_BYTES + 1024
    rows["nbytes"] = _IMAGE_BYTES
    rows["label"] = number % _NUM_CLASSES
    rows["height"], rows["width"] = 375, 500
    rows["crc32"] = number
    rows["orientation"] = 1
    # digits: [n, key bytes], as ASCII
    digits = number[:, None] // 10 ** np.arange(_KEY_BYTES - 1, -1, -1) % 10 + ord("0")
    rows["key"] = digits.astype(np.uint8).view(f"S{_KEY_BYTES}")[:, 0]
    return rows


def _write_hole(folder: Path, first: int, num_samples: int) -> dict:
    """A shard that has its size and nothing in it. Returns its entry in the manifest."""
    samples = min(_PER_SHARD, num_samples - first)
    name = f"train-{first // _PER_SHARD:05}.tar"
    with open(folder / name, "wb") as file:
        file.truncate(samples * _SAMPLE_BYTES)
    return {
        "name": name,
        "samples": samples,
        "bytes": samples * _SAMPLE_BYTES,
        "sha256": f"{first:064x}",
        "idx_sha256": "",
    }


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]))))
