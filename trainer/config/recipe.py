"""What differs from the published recipe: every setting that the USI scheme fixes, beside the one in use."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from docstring_parser import parse as parse_docstring
from typing_extensions import TypedDict

from trainer.config.natures import flat, section_types, setting_natures
from trainer.config.paper import paper_arguments
from trainer.config.sections import Config

_BATCH_NORM = """on purpose, run.batch_norm is reduce:
      the authors' code keeps the statistics of rank 0's images (broadcast); the mean over all ranks has the same \
expectation and less variance, and does not depend on their number"""


class AuditRow(TypedDict):
    """A setting that differs: `key` is SECTION.NAME, `usi` its value in the recipe, `here` the one in use."""

    key: str
    usi: Any
    here: Any
    meaning: str


def audit(
    config: Config, batch_norm_sizes: Sequence[int] = (), recorded: Mapping[str, str] = MappingProxyType({})
) -> list[AuditRow]:
    """The settings that differ from USI, in the order of the configuration.

    Args:
      batch_norm_sizes: over how many images the student's BatchNorm normalises, if it is not a mixing group. The
        setting of it, run.micro_batch, then comes last with these numbers, because ranks and memory decide them, too.
      recorded: how the outputs of recorded teachers were computed and stored, by the teacher's key, where it is known.
    Returns:
      [] for the recipe itself, which is what all defaults are (docs/recipe.md).
    """
    usi, natures = flat(Config()), setting_natures()
    # What the authors have and the defaults have not; the paper's model may need arguments in the installed timm.
    authors = {"student.kwargs": paper_arguments(config.student.name), "run.batch_norm": "broadcast"}
    rows: list[AuditRow] = []
    for key, here in flat(config).items():
        if natures[key].recipe and here not in (usi[key], authors.get(key, usi[key])):
            rows.append(_row(key, usi[key], here, key.split(".")[0]))
    known = []  # What is known of a run says more than the settings do, and replaces their rows.
    if batch_norm_sizes:
        usi_sizes = f"BatchNorm over a mixing group, {usi['augment.mix_group']} images"
        here = f"BatchNorm over {' or '.join(map(str, batch_norm_sizes))} images"
        known.append(_row("run.micro_batch", usi_sizes, here, "run"))
    known += [_row(f"{key}.store", "a live teacher", here, "teacher") for key, here in recorded.items()]
    return [*(row for row in rows if row["key"] not in {each["key"] for each in known}), *known]


def _row(key: str, usi: Any, here: Any, section: str) -> AuditRow:
    meaning = _meaning(section_types()[section], key.rpartition(".")[2])
    return {"key": key, "usi": usi, "here": here, "meaning": meaning}


def _meaning(section: type, name: str) -> str:
    """What the documentation of a section, or of the dataclass that it extends, says of a setting."""
    params = [param for kind in section.__mro__ for param in parse_docstring(kind.__doc__ or "").params]
    return next(" ".join((param.description or "").split()) for param in params if param.arg_name == name)


def audit_table(config: Config, recorded: Mapping[str, str] = MappingProxyType({})) -> str:
    """The settings that differ from USI, and the one that this project chose otherwise, as lines for people.

    Args:
      recorded: as for `audit`.
    """
    deviations = audit(config, recorded=recorded)
    lines = [f"{len(deviations)} settings differ from the USI recipe:"]
    lines += [f"  {row['key']}: USI {row['usi']}, here {row['here']}\n      {row['meaning']}" for row in deviations]
    if not deviations:
        lines = ["every setting is the one of the USI recipe"]
    return "\n".join([*lines, *([_BATCH_NORM] if config.run.batch_norm == "reduce" else [])])
