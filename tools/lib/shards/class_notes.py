"""Notes about the classes of a dataset, for people who bring weights of another origin."""

import collections

from pipelines.common.errors import clipped, named
from pipelines.shards.manifest import class_order_doubt


def class_notes(manifest: dict) -> list[str]:
    """Sentences for people, [] where there is nothing to know.

    Args:
      manifest: of a dataset, or the description of a conversion; source, classes and class_order count.
    """
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
    places: dict[str, list[int]] = collections.defaultdict(list)
    for label, name in enumerate(manifest["classes"]):
        places[name].append(label)
    if twice := [f"'{clipped(name, 30)}' (labels {named(labels, 3)})" for name, labels in places.items() if labels[1:]]:
        notes.append(
            f"classes of one name: {named(twice, 5)}. A model is matched with them by place, so its list of classes "
            "must equal the dataset's"
        )
    return notes
