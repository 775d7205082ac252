"""Measures what users wait for, side by side in the same run: medians of repeated, interleaved runs.

    python tools/benchmark.py shard [--images N] [--repeats R] [--json FILE]

Every row is measured against the row it is a ratio of, on this machine, now. Nothing is estimated.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __package__ in (None, ""):  # run as a script: find the packages from the repository, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image
from rich.console import Console
from rich.table import Table

from tools.sharding.images import ImageOptions
from tools.sharding.shards import write_shard
from tools.sharding.sources import open_source


def photographs(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of ImageNet's common size (500 x 375, quality 92) cut from scikit-learn's two photographs, in
    FOLDER/train/CLASS."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    paths = []
    for i in range(count):
        left, top = 7 * i % 141, 5 * i % 53
        path = folder / "train" / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[i % 2].crop((left, top, left + 499, top + 374)).resize((500, 375)).save(path, quality=92)
        paths.append(path)
    return paths


def interleaved(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender, `repeats` times in turn, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start_s = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start_s)
    return seconds


def shard(images: int, repeats: int) -> list[dict]:
    """Writing a shard on one core: without the audit against tar, with it against decoding alone."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = photographs(folder / "src", images)
        source = open_source(folder / "src", "folder", folder)
        entries = list(source.splits["train"]())
        names = folder / "names"
        names.write_text("".join(f"{path.relative_to(folder / 'src')}\n" for path in paths))

        def ours(audit: bool) -> None:
            (folder / "records").mkdir(exist_ok=True)
            write_shard(folder / "ours.tar", folder / "records", entries, source.read, ImageOptions(audit=audit))

        def tar() -> None:
            subprocess.run(["tar", "cf", folder / "tar.tar", "-C", folder / "src", "-T", names], check=True)
            descriptor = os.open(folder / "tar.tar", os.O_RDONLY)
            os.fsync(descriptor)  # a shard is on the disk before it counts
            os.close(descriptor)

        def decode() -> None:
            for path in paths:
                Image.open(io.BytesIO(path.read_bytes())).load()

        contenders = {
            "tar cf, then fsync": tar,
            "ours, audit off": lambda: ours(False),
            "decoding alone (PIL)": decode,
            "ours, audit on": lambda: ours(True),
        }
        seconds = interleaved(contenders, repeats)
        num_bytes = sum(path.stat().st_size for path in paths)
        shutil.rmtree(folder / "src")
    against = {"ours, audit off": "tar cf, then fsync", "ours, audit on": "decoding alone (PIL)"}
    return [
        {
            "what": name,
            "images_per_s": round(images / statistics.median(times)),
            "mb_per_s": round(num_bytes / statistics.median(times) / 1e6, 1),
            "spread": round((max(times) - min(times)) / statistics.median(times), 3),
            **({"ratio": _ratio(seconds[against[name]], times), "of": against[name]} if name in against else {}),
        }
        for name, times in seconds.items()
    ]


def _ratio(baseline: list[float], ours: list[float]) -> float:
    """Our speed over the baseline's: the median of the ratios of neighbouring runs."""
    return round(statistics.median(b / o for b, o in zip(baseline, ours, strict=True)), 3)


def machine() -> dict:
    """What a number depends on."""
    packages = ("pillow", "numpy", "torch", "torchvision", "timm", "nvidia-dali-cuda120", "webdataset")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("shard", help="writing shards, on one core")
    command.add_argument("--images", type=int, default=400)
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--json", type=Path, help="write the result to this file, too")
    options = parser.parse_args()
    rows = shard(options.images, options.repeats)
    table = Table(title=f"{options.images} JPEGs of 500 x 375, one core, median of {options.repeats}")
    for column in ("what", "images/s", "MB/s", "spread", "ratio", "of"):
        table.add_column(column, justify="left" if column in ("what", "of") else "right")
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in ("what", "images_per_s", "mb_per_s", "spread", "ratio", "of")))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
