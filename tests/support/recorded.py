"""A teacher store that a test records from a run with a live teacher, without the command."""

from pathlib import Path

import numpy as np
import torch

from support.tiny_runs import first_batches
from trainer.builder import Run
from trainer.targets.header import StoreHeader, TeacherFacts, claim
from trainer.targets.pieces import Piece, write_piece


@torch.no_grad()
def record(run: Run, store: Path, steps: int, codec: str = "fp32", made_with: dict | None = None) -> Path:
    """Record the first steps of a run's only teacher. Returns the store."""
    _, given = run.config.teacher.members[0]
    assert given.name is not None and run.step.teachers is not None
    facts = TeacherFacts(given.name, given.kwargs, given.image_size, weights="0" * 64)
    header = claim(
        store, StoreHeader(run.plan.describe(), run.plan.index.num_classes, facts, codec, "fp32", made_with or {})
    )
    encode = header.open_codec().encode
    rows = [encode(run.step.teachers(run.step.inputs(batch).teachers)) for batch in first_batches(run, steps)]
    whole = torch.cat(rows).reshape(steps, run.plan.global_batch, -1).numpy()
    half = steps // 2
    for first, stop in ((0, half), (half, steps)):
        write_piece(
            store, header, Piece(first, stop, 0, run.plan.global_batch), np.ascontiguousarray(whole[first:stop])
        )
    return store
