"""Started by tests/test_preemption.py: runs whose number of ranks changes, with a note of all that each step was given.

python tests/elastic_runs.py FOLDER: the runs below, beside each what its steps were given.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools import chaos  # noqa: E402
from trainer.step import TrainStep  # noqa: E402

LENGTH = ["--schedule.epochs", "4", "--run.checkpoint_every", "1000"]
OWN = ("--run.batch_norm", "none")


def noting_batches(out: Path) -> None:
    """Every group of images that a step is given is noted, as the hash of pixels and mixing, with its position."""
    loss = TrainStep._loss

    def noting(self, batch):
        if len(batch.labels) > 2:  # no rehearsal
            columns = (batch.images, batch.labels, batch.lam, batch.box)
            digest = hashlib.sha256(b"".join(column.contiguous().numpy().tobytes() for column in columns)).hexdigest()
            with open(out.with_suffix(".positions.jsonl"), "a") as file:
                file.write(json.dumps([batch.position, len(batch.labels), digest]) + "\n")
        return loss(self, batch)

    TrainStep._loss = noting


def run(root: Path, out: Path, ranks: int, stop: int, *more: str) -> None:
    """Go on until `stop` with so many ranks."""
    if not os.fork():
        noting_batches(out)
        arguments = [*chaos.SETTINGS, *LENGTH, *more, "--data.root", str(root), "--run.out", str(out)]
        codes = chaos.wait(
            chaos.start([*arguments, "--run.stop_after_steps", str(stop)], out.with_suffix(".log"), ranks)
        )
        os._exit(any(codes))
    if os.wait()[1]:
        sys.exit(out.with_suffix(".log").read_text())


def main() -> None:
    folder = Path(sys.argv[1])
    root = chaos.make_dataset(folder)
    for name, parts in {
        "steady": [(2, 20)],
        "changing": [(2, 10), (4, 15), (1, 20)],
        "four": [(4, 8)],
        "four-stopped": [(4, 3), (4, 8)],
        **{f"one-update-{ranks}": [(ranks, 1)] for ranks in (1, 2, 4)},
        "own-statistics": [(2, 8, *OWN)],
        "own-statistics-stopped": [(2, 3, *OWN), (2, 8, *OWN)],
    }.items():
        for part in parts:
            run(root, folder / name, *part)


if __name__ == "__main__":
    main()
