"""Describes a dataset for people: its content, and notes about its classes."""

from pathlib import Path

import numpy as np

from pipelines.common.errors import clipped, named
from pipelines.shards.manifest import ClassList, class_order, class_order_doubt, read_manifest
from tools.lib.common.units import human_bytes


def class_notes(manifest: ClassList) -> list[str]:
    """Say what is worth knowing about classes, in sentences; [] where there is nothing."""
    notes = []
    if doubt := class_order_doubt(manifest):
        notes.append(
            f"{doubt}. State it with 'build --class-order text' or 'numeric', or name the outputs of weights in a file "
            "(--student.classes FILE)"
        )
    if len(manifest["classes"]) == 1:
        notes.append(
            f"there is a single class, '{clipped(manifest['classes'][0], 30)}': are the classes folders inside it?"
        )
    return notes


def summarize(root: Path) -> dict[str, str]:
    """Describe the content of a dataset folder: label -> text, in the order to be shown."""
    manifest = read_manifest(root)
    audit = manifest["audit"]
    lines = {
        "dataset": str(root),
        "source": f"{manifest['source']['kind']}: {manifest['source']['name']}",
        "options": ", ".join(f"{key} {value}" for key, value in manifest["options"].items()),
        "classes": f"{len(manifest['classes']):,}, order {class_order(manifest)}",
    }
    lines |= {f"note {number}": note for number, note in enumerate(class_notes(manifest), 1)}
    for split, entry in manifest["splits"].items():
        counts = np.array(entry["class_counts"])
        lines[split] = (
            f"{entry['samples']:,} images in {len(entry['shards']):,} shards, {human_bytes(entry['bytes'])}; "
            f"{counts.min():,} to {counts.max():,} a class"
        )
        if empty := [manifest["classes"][i] for i in np.flatnonzero(counts == 0)]:
            lines[f"{split}: empty classes"] = named(empty)
        lines[f"{split}: digest"] = entry["digest"][:16]
    counts = audit["counts"]
    leaks = sum(len({key.partition("/")[0] for key in group}) > 1 for group in audit["duplicates"])
    for kind in ("repaired", "rejected"):
        first = "; ".join(f"{item['sample']} ({item['reason']})" for item in audit[kind][:3])
        lines[kind] = f"{counts[kind]:,}" + (f": {first}" if first else "") + (" ..." if counts[kind] > 3 else "")
    lines["duplicates"] = f"{counts['duplicates']:,} groups, {leaks:,} across splits"
    if left_out := counts.get("left_out", 0):
        items = [f"{item['source']} ({item['reason']})" for item in audit.get("left_out", [])[:3]]
        lines["left out"] = f"{left_out:,}: {'; '.join(items)}{' ...' if left_out > 3 else ''}"
    lines["hidden, passed over"] = f"{counts.get('hidden', 0):,}"
    lines["tiny, oriented, resized"] = f"{counts['tiny']:,}, {counts['oriented']:,}, {counts['resized']:,}"
    return lines
