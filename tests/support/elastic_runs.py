"""Started by tests/trainer/state/test_preemption.py: runs whose number of ranks changes, with a note of all that each
step was given.

python tests/support/elastic_runs.py FOLDER: the runs below, beside each what its steps were given.
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
from trainer.update.step import TrainStep  # noqa: E402

LENGTH = ["--run.checkpoint_every", "1", "--run.keep_checkpoints", "100"]


def noting_batches(out: Path) -> None:
    """Every group of images that a step is given is noted, as the hash of pixels and mixing, with its position."""
    forward = TrainStep._forward

    def noting(self, batch):
        if len(batch.labels) > 2:  # This is no warm-up.
            columns = (batch.images, batch.labels, batch.lam, batch.box)
            digest = hashlib.sha256(b"".join(column.contiguous().numpy().tobytes() for column in columns)).hexdigest()
            with open(out.with_suffix(".positions.jsonl"), "a") as file:
                file.write(json.dumps([batch.position, len(batch.labels), digest]) + "\n")
        return forward(self, batch)

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
    folder = Path(sys.argv[1])
    root = runs.make_dataset(folder)
    run(root, folder / "steady", 2, 20)
    copy_checkpoint(folder / "steady", 10, folder / "changing")
    for ranks, stop in ((4, 13), (1, 20)):
        run(root, folder / "changing", ranks, stop)
    run(root, folder / "alone", 1, 1)
    for name, ranks, *more in (("four", 4), ("own-statistics", 2, "--run.batch_norm", "none")):
        run(root, folder / name, ranks, 5, *more)
        copy_checkpoint(folder / name, 3, folder / f"{name}-resumed")
        run(root, folder / f"{name}-resumed", ranks, 5, *more)


if __name__ == "__main__":
    main()
