"""What a teacher store holds, as a table."""

import itertools
from pathlib import Path
from typing import Any

from pipelines.common.errors import clipped
from pipelines.common.files import is_leftover
from tools.lib.common.units import human_bytes
from trainer.targets.pieces import find_pieces
from trainer.targets.store import TeacherStore

_SHOWN_BEFORE = ("dataset", "seed", "image_size", "global_batch", "fill")  # The most important of a plan's fields.


def summarize(folder: Path) -> dict[str, str]:
    """What a store holds: label -> text. Pieces are counted by their names and not read.

    Raises:
      UserError: it is no store, or its header is damaged.
    """
    store = TeacherStore(folder)
    header, plan = store.header, store.header.plan
    pieces = find_pieces(folder, header)
    num_bytes = sum((folder / piece.name).stat().st_size for piece in pieces)
    teacher = header.teacher
    found: dict[str, Any] = {
        "identity": header.identity,
        "teacher": teacher.name,
        "its arguments": teacher.kwargs or "none",
        "its image size": f"{teacher.image_size} px" if teacher.image_size else "the plan's",
        "its weights": f"sha256 {teacher.weights}",
        "its file": f"sha256 {teacher.checkpoint}" if teacher.checkpoint else "timm's own weights",
        "its classes": "in the dataset's order" if teacher.order is None else f"reordered (sha256 {teacher.order})",
        "classes": f"{header.num_classes:,}",
        "codec": header.codecs,
        "precision": header.precision,
        **{f"plan: {name}": plan[name] for name in _SHOWN_BEFORE if name in plan},
        **{f"plan: {name}": value for name, value in plan.items() if name not in _SHOWN_BEFORE},
        **{f"made with {name}": value for name, value in header.made_with.items()},
        "steps, by the names of files": _steps(store),
        "size": f"{human_bytes(num_bytes)} in {len(pieces):,} pieces, {store.codec.row_bytes:,} bytes a position",
        "unfinished files": _unfinished(folder),
        "damaged images": f"{store.num_quarantined():,}",
    }
    return {name: clipped(value, 120) for name, value in found.items()}


def _unfinished(folder: Path) -> str:
    """How many files recorders that were killed have left, or are writing, and their bytes."""
    sizes = [path.stat().st_size for path in folder.iterdir() if is_leftover(path.name)]
    if not sizes:
        return "none"
    return f"{len(sizes):,} with {human_bytes(sum(sizes))}; remove *.partial when no recorder runs"


def _steps(store: TeacherStore) -> str:
    """How many steps are recorded, how many epochs these are, and the first step that is missing among them."""
    pieces = find_pieces(store.folder, store.header)
    # Between two neighbouring bounds every step is recorded, or none is. A forged name may have any numbers.
    bounds = sorted({0, *(step for piece in pieces for step in (piece.first_step, piece.stop_step))})
    spans = [span for span in itertools.pairwise(bounds) if store.coverage.first_missing(*span) is None]
    recorded = sum(stop - first for first, stop in spans)
    text = f"{recorded:,} recorded"
    per_epoch = store.header.made_with.get("steps_per_epoch")
    if isinstance(per_epoch, int) and per_epoch > 0:
        text += f": {recorded / per_epoch:.4g} epochs of {per_epoch:,} steps each"
    missing = store.coverage.first_missing(0, bounds[-1])
    return text if missing is None else f"{text}; of the first {bounds[-1]:,} the first missing one is {missing:,}"
