"""Started by tests/trainer/state/test_resume_ranks.py: runs whose number of ranks changes, with a note of all that each
step was given.

python tests/support/elastic_runs.py FOLDER few|many: the runs below, beside each what its steps were given.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(_TESTS), str(_TESTS.parent)]

from chaos import runs  # noqa: E402
from trainer.state.checkpoint import path_of  # noqa: E402
from trainer.update.mixing import mix_pixels  # noqa: E402
from trainer.update.step import TrainStep  # noqa: E402

GLOBAL_BATCH = 64
# Its gradients do not depend on how a batch is divided.
NO_BATCH_NORM = [
    *("--student.name", "test_vit", "--student.kwargs.drop_rate", "0", "--student.kwargs.drop_path_rate", "0")
]
# How many ranks a run has after step 10, and until which step. An update has four groups of 16 images.
CHANGES = {"few": ((3, 12), (5, 13), (1, 15)), "many": ((4, 12), (7, 14), (3, 16), (16, 17), (1, 20))}
ONE_UPDATE = {"few": (1, 3, 5), "many": (1, 3, 5, 7)}  # With how many ranks a run of one update is made.
LENGTH = ["--run.checkpoint_every", "1", "--run.keep_checkpoints", "100"]


def noting_batches(out: Path) -> None:
    """Every row that an update is given is noted: the hash of its label and mixed pixels, and the update's number."""
    forward = TrainStep._forward

    def noting(self, batch, *cache):
        if batch.images.unique().numel() > 1:  # This is no warm-up.
            rows = zip(mix_pixels(batch).numpy(), batch.labels.tolist(), strict=True)
            digests = [hashlib.sha256(pixels.tobytes() + bytes([label])).hexdigest() for pixels, label in rows]
            with open(out.with_suffix(".rows.jsonl"), "a") as file:
                file.write(json.dumps([batch.position // GLOBAL_BATCH, digests]) + "\n")
        return forward(self, batch, *cache)

    TrainStep._forward = noting


def run(root: Path, out: Path, ranks: int, stop: int, *more: str) -> None:
    """Start or resume a run on `ranks` ranks until `stop`."""
    if not os.fork():
        noting_batches(out)
        arguments = [*runs.SETTINGS, *LENGTH, *more, "--data.root", str(root), "--run.out", str(out)]
        codes = runs.wait(runs.start([*arguments, "--run.stop_after_steps", str(stop)], out.with_suffix(".log"), ranks))
        os._exit(any(codes))
    if os.wait()[1]:
        sys.exit(out.with_suffix(".log").read_text())


def copy_checkpoint(source: Path, step: int, out: Path) -> None:
    """Copy what a run needs to resume there, from one that went further."""
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(path_of(source / "checkpoints", step), out / "checkpoints")


def main() -> None:
    folder, number = Path(sys.argv[1]), sys.argv[2]
    root = runs.make_dataset(folder)
    run(root, folder / "steady", 2, 20)
    copy_checkpoint(folder / "steady", 10, folder / "changing")
    for ranks, stop in CHANGES[number]:
        run(root, folder / "changing", ranks, stop)
    for ranks in ONE_UPDATE[number]:
        run(root, folder / f"ranks-{ranks}", ranks, 1, *NO_BATCH_NORM)
    for name, ranks, stop, *more in (("four", 4, 3), ("own-statistics", 2, 5, "--run.batch_norm", "none")):
        run(root, folder / name, ranks, stop, *more)
        copy_checkpoint(folder / name, stop - 2, folder / f"{name}-resumed")
        run(root, folder / f"{name}-resumed", ranks, stop, *more)


if __name__ == "__main__":
    main()
