"""What a teacher store holds, as a table."""

from pathlib import Path
from typing import Any

from pipelines.common.errors import clipped
from pipelines.common.files import is_leftover
from tools.lib.common.units import human_bytes
from trainer.targets.pieces import find_pieces
from trainer.targets.store import TeacherStore

_FIRST = ("dataset", "seed", "image_size", "global_batch", "fill")  # The most important of a plan's fields.


def summarize(folder: Path) -> dict[str, str]:
    """What a store holds: label -> text. Pieces are counted by their names and not read.

    Raises:
      UserError: it is no store, or its header is damaged.
    """
    store = TeacherStore(folder)
    header, teacher = store.header, store.header.teacher
    plan = {**{name: header.plan[name] for name in _FIRST if name in header.plan}, **header.plan}
    sizes = [(folder / piece.name).stat().st_size for piece in find_pieces(folder, header)]
    partial = [path.stat().st_size for path in folder.iterdir() if is_leftover(path.name)]
    unfinished = f"{len(partial):,} with {human_bytes(sum(partial))}; remove *.partial when no recorder runs"
    found: dict[str, Any] = {
        "identity": header.identity,
        "teacher": teacher.name,
        "its arguments": teacher.kwargs or "none",
        "its image size": f"{teacher.image_size} px" if teacher.image_size else "the plan's",
        "its weights": f"sha256 {teacher.weights}",
        "its file": f"sha256 {teacher.checkpoint}" if teacher.checkpoint else "timm's own weights",
        "its classes": "in the dataset's order" if teacher.order is None else f"reordered (sha256 {teacher.order})",
        "classes": f"{header.num_classes:,}",
        "codec": header.facts["codec"],
        "precision": header.precision,
        **{f"plan: {name}": value for name, value in plan.items()},
        **{f"made with {name}": value for name, value in header.made_with.items()},
        "steps, by the names of files": _steps(store),
        "size": f"{human_bytes(sum(sizes))} in {len(sizes):,} pieces, {store.codec.row_bytes:,} bytes a position",
        "unfinished files": unfinished if partial else "none",
        "damaged images": f"{store.num_quarantined():,}",
    }
    return {name: clipped(value, 120) for name, value in found.items()}


def _steps(store: TeacherStore) -> str:
    """How many steps are recorded, how many epochs these are, and the first step that is missing among them."""
    complete = store.coverage.complete
    recorded = sum(stop - first for first, stop in complete)
    text = f"{recorded:,} recorded"
    per_epoch = store.header.made_with.get("steps_per_epoch")
    if isinstance(per_epoch, int) and per_epoch > 0:
        text += f": {recorded / per_epoch:.4g} epochs of {per_epoch:,} steps each"
    last = complete[-1][1] if complete else 0
    missing = store.coverage.first_missing(0, last)
    return text if missing is None else f"{text}; of the first {last:,} the first missing one is {missing:,}"
