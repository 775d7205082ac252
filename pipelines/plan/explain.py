"""A row of a plan in words, for people who ask what happened to an image."""

import numpy as np

from pipelines.plan.batch_plan import BatchPlan
from pipelines.plan.draws import Op
from pipelines.shards.index import ShardIndex

_OPERATIONS = {
    Op.AUTO_CONTRAST: "auto-contrast",
    Op.EQUALIZE: "equalize",
    Op.INVERT: "invert",
    Op.ROTATE: "rotate by {:.1f} degrees",
    Op.POSTERIZE: "posterize to {:.0f} bits",
    Op.SOLARIZE: "solarize from {:.0f} on",
    Op.SOLARIZE_ADD: "solarize-add {:.0f}",
    Op.COLOR: "color x {:.2f}",
    Op.CONTRAST: "contrast x {:.2f}",
    Op.BRIGHTNESS: "brightness x {:.2f}",
    Op.SHARPNESS: "sharpness x {:.2f}",
    Op.SHEAR_X: "shear x by {:.3f}",
    Op.SHEAR_Y: "shear y by {:.3f}",
    Op.TRANSLATE_X: "translate x by {:.3f} of the width",
    Op.TRANSLATE_Y: "translate y by {:.3f} of the height",
    Op.GAUSSIAN_BLUR: "blur with a radius of {:.2f} px",
}


def explain(rows: BatchPlan, index: ShardIndex, row: int = 0) -> list[str]:
    """The lines that say what an executor makes of a row: image, crop, flip, operations with arguments, erased box."""
    sample = int(rows.sample[row])
    found = index.samples[sample]
    top, left, height, width = rows.crop[row].tolist()
    resized = "{} x {} px".format(*rows.resize[row])
    return [
        f"position {rows.position + row}: {_image(index, sample)}, class {found['label']}, "
        f"{found['height']} x {found['width']} px",
        f"  crop: {height} x {width} px at row {top}, column {left}; resized to {resized} ({rows.interpolation})",
        f"  flip: {'yes' if rows.flip[row] else 'no'}",
        f"  operations: {operations(rows, row) or 'none'}",
        *([f"  erased: {_box(rows.erase[row])}"] if rows.erase[row].any() else []),
    ]


def explain_mix(rows: BatchPlan, index: ShardIndex, partner: int) -> str:
    """The line that says how the only row of a part of a group is mixed with its partner, at position `partner`."""
    if rows.partners is None or (rows.lam[0] == 1 and not rows.box[0].any()):
        return "  mixing: none"
    lam, other = float(rows.lam[0]), f"position {partner} ({_image(index, int(rows.partners.sample[0]))})"
    if rows.box[0].any():
        return f"  mixing: CutMix, lam {lam:.3f}: {_box(rows.box[0])} come from {other}"
    return f"  mixing: mixup, lam {lam:.3f}: {lam:.3f} of this image and {1 - lam:.3f} of {other}"


def operations(rows: BatchPlan, row: int) -> str:
    """The operations of a row with their arguments, in the order in which they are carried out."""
    pairs = zip(rows.ops[row].tolist(), rows.args[row].tolist(), strict=True)
    return ", then ".join(_OPERATIONS[Op(op)].format(arg) for op, arg in pairs if op != Op.NONE)


def _image(index: ShardIndex, sample: int) -> str:
    return f"image {index.samples['key'][sample].decode(errors='backslashreplace') or sample}"


def _box(box: np.ndarray) -> str:
    top, left, height, width = box.tolist()
    return f"{height} x {width} px at row {top}, column {left}"
