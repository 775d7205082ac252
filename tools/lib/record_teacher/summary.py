"""What a teacher store holds, as a table."""

import contextlib
from pathlib import Path

from pipelines.common.errors import clipped, counted, named
from pipelines.common.files import is_leftover
from tools.lib.common.units import human_bytes
from trainer.targets.header import HEADER_FILE
from trainer.targets.pieces import find_pieces, steps_text
from trainer.targets.store import TeacherStore

_MADE_WITH = ("pipeline", "decode", "device", "threads", "forward_batch", "torch")
_PLAN = ("seed", "global_batch", "image_size", "fill")  # The other fields of a plan are in the header.


def summarize(folder: Path) -> dict[str, str]:
    """Describe a store in a few lines: label -> text. Pieces are counted by their names and not read.

    Raises:
      UserError: it is no store, or its header is damaged.
    """
    store = TeacherStore(folder)
    header, teacher = store.header, store.header.teacher
    size = f"{teacher.image_size} px" if teacher.image_size else "the plan's image size"
    kwargs = [f"{name} {value}" for name, value in teacher.kwargs.items()]
    partial = [path for path in folder.iterdir() if is_leftover(path.name)]
    advice = "; remove *.partial when no recorder runs" if partial else ""
    found = {
        "teacher": f"{', '.join([teacher.name, *kwargs])}, at {size}, in {header.precision}",
        "its weights": f"sha256 {teacher.weights}",
        "dataset": f"{header.plan.get('dataset')}, {header.num_classes:,} classes",
        "plan": _listed(header.plan, _PLAN),
        "made with": _listed(header.made_with, _MADE_WITH),
        "codec": f"{header.facts['codec']}, {store.codec.row_bytes:,} bytes a position",
        "steps, by the names of files": recorded_steps(store),
        "size": _size([folder / piece.name for piece in find_pieces(folder, header)], "piece"),
        "unfinished": f"{_size(partial, 'file')}{advice}",
        "damaged images": f"{store.num_quarantined():,}",
        "identity": header.identity,
        "all else": str(folder / HEADER_FILE),
    }
    return {name: clipped(value, 120) for name, value in found.items()}


def _listed(facts: dict[str, object], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)


def _size(files: list[Path], called: str) -> str:
    sizes = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # A recorder has renamed it since the folder was listed.
            sizes.append(path.stat().st_size)
    return f"{human_bytes(sum(sizes))} in {counted(len(sizes), called)}"


def recorded_steps(store: TeacherStore) -> str:
    """How many steps are recorded, how many epochs these are, and the first step that is missing among them."""
    complete = store.coverage.complete
    recorded = sum(stop - first for first, stop in complete)
    text = f"{recorded:,} recorded"
    per_epoch = store.header.made_with.get("steps_per_epoch")
    if isinstance(per_epoch, int) and per_epoch > 0:
        text += f": {counted(recorded / per_epoch, 'epoch')} of {counted(per_epoch, 'step')} each"
    last = complete[-1][1] if complete else 0
    missing = store.coverage.first_missing(0, last)
    return text if missing is None else f"{text}; of the first {last:,} the first missing one is {missing:,}"


def hole(store: TeacherStore) -> str:
    """A sentence about the steps that are missing in front of recorded ones, "" if there are none."""
    if not (holes := store.coverage.holes):
        return ""
    missing = named((steps_text(*each) for each in holes), 3)
    return f"{store.folder}: lacks {missing}, and has later ones. To fill the gap, {store.header.how_to_add('them')}"
