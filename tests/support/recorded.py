"""A teacher store that a test records from a run with a live teacher, without the command."""

from pathlib import Path

import numpy as np
import torch

from support.tiny_runs import first_batches
from tools.lib.record_teacher.recording import teacher_facts
from trainer.builder import Run
from trainer.models.teacher import build_teacher
from trainer.targets.header import StoreHeader, claim
from trainer.targets.pieces import Piece, write_piece


@torch.no_grad()
def record(run: Run, store: Path, steps: int, codec: str = "fp32", made_with: dict | None = None) -> Path:
    """Record the first steps of a run's only teacher. Returns the store."""
    assert run.step.teachers is not None
    num_classes, config = run.plan.index.num_classes, run.config
    # The run's own teacher has folded weights already.
    unfolded = build_teacher(config.teacher, num_classes, config.data.train_sizes[-1], names=run.state.classes)
    facts = teacher_facts(config, unfolded)
    header = claim(store, StoreHeader(run.plan.describe(), num_classes, facts, codec, "fp32", made_with or {}))
    encode = header.open_codec().encode
    rows = [encode(run.step.teachers(run.step.inputs(batch).teachers)) for batch in first_batches(run, steps)]
    whole = torch.cat(rows).reshape(steps, run.plan.global_batch, -1).numpy()
    half = steps // 2
    for first, stop in ((0, half), (half, steps)):
        write_piece(
            store, header, Piece(first, stop, 0, run.plan.global_batch), np.ascontiguousarray(whole[first:stop])
        )
    return store
