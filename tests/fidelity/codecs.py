"""Whole demo runs from a recording in each codec, several seeds each: `make codecs`.

A student of the demo is distilled from recordings of one teacher that differ in their codec alone, with several seeds
of the student. Two runs whose targets differ in the last bits drift apart, as any two runs do, so the loss curves are
compared epoch by epoch with what another seed of the student changes. There are two datasets:

- digits: the demo's, of 10 classes. `compact` stores all of ten classes in float16, so it is not tried there.
- pairs: two digits side by side, 100 classes, of which `compact` stores 16 one by one and 84 in its tail.

A stage that DIR has is not made again, so this can be interrupted. DIR/codecs.json has the numbers.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(REPOSITORY)]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tools.lib.common.photos import write_digits  # noqa: E402

CODECS = {"digits": ("fp32", "int8", "fp16"), "pairs": ("fp32", "int8", "compact")}
SEEDS = {"digits": range(6), "pairs": range(3)}
_EPOCH = 22  # updates, with 1,437 training images


def write_pairs(folder: Path) -> None:
    """Two digits of one split side by side, as FOLDER/{train,val}/AB/*.png, the same every time."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    pixels = (data.images * 255 / 16).astype(np.uint8)
    split = train_test_split(
        np.arange(len(data.target)), train_size=1437, test_size=360, random_state=0, stratify=data.target
    )
    rng = np.random.default_rng(0)
    for name, chosen in zip(("train", "val"), split, strict=True):
        for i, j in zip(chosen, rng.permutation(chosen), strict=True):
            path = folder / name / f"{data.target[i]}{data.target[j]}" / f"{i:04d}-{j:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = np.repeat(np.hstack([pixels[i], pixels[j]]), 2, axis=0)  # as large as a digit for the demo's recipe
            Image.fromarray(image).save(path)


def call(out: Path, *command: object) -> None:
    """Run a command, its output in OUT.log, unless OUT.done is there."""
    done, log = out.with_name(f"{out.name}.done"), out.with_name(f"{out.name}.log")
    if done.exists():
        return
    with log.open("ab") as file:
        arguments = [sys.executable, *map(str, command)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(arguments, cwd=REPOSITORY, stdout=file, stderr=file, env=environment, check=True)
    done.touch()


def runs_of(folder: Path, dataset: str, jobs: int) -> dict[tuple[str, int], Path]:
    """Make all runs of a dataset. Returns the folders by codec and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    images, shards, teacher = folder / "images", folder / "dataset", folder / "teacher"
    if not images.exists():
        {"digits": write_digits, "pairs": write_pairs}[dataset](folder / "images.partial")
        (folder / "images.partial").rename(images)
    call(shards, "tools/shard_imagenet.py", "build", images, shards, "--samples-per-shard", 500)
    settings = ["--config", "configs/demo.yaml", "--data.root", shards, "--data.threads", 1, "--run.log_every", _EPOCH]
    labels = ["--teacher.name", "null", "--augment.mix_prob", 0, "--schedule.epochs", 26]
    call(teacher, "trainer/run.py", *settings, *labels, "--student.name", "test_resnet", "--run.out", teacher)
    checkpoint = sorted((teacher / "checkpoints").glob("*.pt"))[-1]
    named = ["--student.name", "test_byobnet"]
    with_teacher = ["--teacher.name", "test_resnet", "--teacher.checkpoint", checkpoint]
    found, commands = {}, []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        recordings = []
        for codec in CODECS[dataset]:
            store = folder / f"store-{codec}"
            record = ["tools/record_teacher.py", store, *settings, *named, *with_teacher, "--codec", codec]
            recordings.append(pool.submit(call, store, *record))
            for seed in SEEDS[dataset]:
                out = found[codec, seed] = folder / f"{codec}-{seed}"
                seeded = ["--student.seed", seed, "--teacher.store", store, "--run.out", out]
                commands.append((out, "trainer/run.py", *settings, *named, *seeded))
        for each in recordings:
            each.result()
        for each in [pool.submit(call, *command) for command in commands]:
            each.result()
    return found


def measured(runs: dict[tuple[str, int], Path]) -> dict[str, Any]:
    """For each codec: top-1 of each seed, and how far the losses of its epochs are from those of fp32, relatively."""
    losses, top1, seeds = {}, {}, sorted({seed for _, seed in runs})
    for key, folder in runs.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        # A run that was stopped has a line of its last update, too.
        lines = [line for line in lines if line["kind"] == "train" and line["step"] % _EPOCH == 0]
        losses[key] = np.array([line["loss"] for line in lines])
        top1[key] = json.loads((folder / "summary.json").read_text())["evaluation"]["ema"]["top1"]
    found: dict[str, Any] = {}
    for codec in dict.fromkeys(codec for codec, _ in runs):
        apart = np.array([np.abs(losses[codec, seed] / losses["fp32", seed] - 1) for seed in seeds])
        found[codec] = {
            "top1": [round(top1[codec, seed], 2) for seed in seeds],
            "mean_top1": round(statistics.mean(top1[codec, seed] for seed in seeds), 2),
            "loss_apart_mean": round(float(apart.mean()), 5),
            "loss_apart_max": round(float(apart.max()), 5),
            "last_loss": [round(float(losses[codec, seed][-1]), 4) for seed in seeds],
        }
    others = np.array([np.abs(losses["fp32", seed] / losses["fp32", 0] - 1) for seed in seeds[1:]])
    found["another seed, fp32"] = {
        "loss_apart_mean": round(float(others.mean()), 5),
        "loss_apart_max": round(float(others.max()), 5),
    }
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    folder = options.folder.absolute()
    results = {name: measured(runs_of(folder / name, name, options.jobs)) for name in CODECS}
    (folder / "codecs.json").write_text(json.dumps(results, indent=1) + "\n")
    table = Table("dataset", "codec", "top-1 % of the seeds", "mean", "loss apart: mean", "largest")
    for dataset, codecs in results.items():
        for codec, row in codecs.items():
            top1 = ", ".join(f"{each:.1f}" for each in row.get("top1", []))
            mean = f"{row['mean_top1']:.2f}" if top1 else ""
            apart = [f"{row[key]:.2%}" for key in ("loss_apart_mean", "loss_apart_max")]
            table.add_row(dataset, codec, top1, mean, *apart)
    Console().print(table)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, of one thread each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
