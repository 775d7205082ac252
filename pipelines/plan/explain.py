"""A row of a plan in words, for people who ask what happened to an image."""

import numpy as np

from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.draws import Op
from pipelines.shards.index import ShardIndex


def explain(rows: BatchPlan, index: ShardIndex) -> list[str]:
    """The lines that say what an executor makes of one row: image, crop, flip, operations with arguments, erased box.

    An operation's argument has the unit that `Op` says.
    """
    sample = int(rows.sample[0])
    found = index.samples[sample]
    top, left, height, width = rows.crop[0].tolist()
    resized = "{} x {} px".format(*rows.resize[0])
    pairs = zip(rows.ops[0].tolist(), rows.args[0].tolist(), strict=True)
    operations = [_operation(Op(op), arg) for op, arg in pairs if op != Op.NONE]
    return [
        f"position {rows.position}: {_image(index, sample)}, class {found['label']}, "
        f"{found['height']} x {found['width']} px",
        f"  crop: {height} x {width} px at row {top}, column {left}; resized to {resized} ({rows.interpolation})",
        f"  flip: {'yes' if rows.flip[0] else 'no'}",
        f"  operations: {', then '.join(operations) or 'none'}",
        *([f"  erased: {_box(rows.erase[0])}"] if rows.erase[0].any() else []),
    ]


def explain_mix(rows: BatchPlan, index: ShardIndex, partner: int) -> str:
    """The line that says how the only row of a part of a group is mixed with its partner, at position `partner`."""
    if rows.partners is None or (rows.lam[0] == 1 and not rows.box[0].any()):
        return "  mixing: none"
    lam, other = float(rows.lam[0]), f"position {partner} ({_image(index, int(rows.partners.sample[0]))})"
    if rows.box[0].any():
        return f"  mixing: CutMix, lam {lam:.3f}: {_box(rows.box[0])} come from {other}"
    return f"  mixing: mixup, lam {lam:.3f}: {lam:.3f} of this image and {1 - lam:.3f} of {other}"


def _operation(op: Op, arg: float) -> str:
    name = op.name.lower().replace("_", "-")
    return name if op in (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT) else f"{name} {arg:.3g}"


def _image(index: ShardIndex, sample: int) -> str:
    return f"image {index.samples['key'][sample].decode(errors='backslashreplace') or sample}"


def _box(box: np.ndarray) -> str:
    top, left, height, width = box.tolist()
    return f"{height} x {width} px at row {top}, column {left}"
