"""The card of an exported model: README.md as people and Hugging Face's hub read it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import jinja2
from timm.data import ImageNetInfo

from pipelines.common.errors import UserError
from pipelines.common.machine import package_versions
from tools.lib.common.evaluation import Report, read_report
from tools.lib.export.formats import FORMATS
from trainer.evaluation.trained import TrainedModel
from trainer.models.preprocessing import preprocessing
from trainer.state.checkpoint_settings import check_settings

MODEL_CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md")
_KINDS = {"ema": "EMA of the weights", "raw": "raw weights, not averaged"}
_COLUMNS = {"top1": "top-1 %", "top5": "top-5 %", "loss": "loss", "ece": "ECE %"}

# A sentence about the images that were evaluated, and the metrics as text by their titles; {} for none.
Measured = tuple[str, dict[str, str]]


def card(trained: TrainedModel, files: dict[str, str], measured: Measured) -> str:
    """The card's text, Markdown.

    Args:
      files: descriptions of the folder's files by name.
      measured: as `read_measured` returns it.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "code": _code}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    formats = [FORMATS[name] for name in files if name in FORMATS]
    differ = _differ(trained)
    return template.render(
        trained=trained,
        transform=trained.transform,
        expects=preprocessing(trained.module),
        parameters=f"{sum(p.numel() for p in trained.module.parameters()) / 1e6:.2f}",
        is_imagenet=not trained.classes_guessed and {*(trained.classes or ())} == {*ImageNetInfo().label_names()},
        files=files,
        formats=formats,
        recipe=_recipe(trained),
        audit=[row for row in trained.origin.get("audit") or () if row["key"] not in differ],
        differ=sorted(differ - {"run.out", "plan.dataset"}),
        source=PurePath(trained.source).name,
        measured=measured[0],
        metrics=measured[1],
        trained_with=trained.origin.get("software") or {},
        exported_with=package_versions() | {each.package: version(each.package) for each in formats if each.package},
    )


def read_measured(trained: TrainedModel, evaluation: Path | None) -> Measured:
    """What is known about the accuracy.

    Args:
      evaluation: file that tools/evaluate.py --run.json wrote; without it best.pt's accuracy in the run counts.
    Raises:
      UserError: the file cannot be read, is something else, or is about other weights.
    """
    if evaluation is not None:
        digest, sentence, numbers = read_report(
            evaluation, lambda report: (report["weights_digest"], _shown(report), _metrics(report))
        )
        if digest != trained.digest():
            raise UserError(
                f"--evaluation {evaluation}: is of other weights than {trained.source}. Evaluate this model"
            )
        return sentence, numbers
    if not (metrics := trained.origin.get("metrics")):
        return "", {}
    sentence = f"On the {metrics['images']:,} validation images of the run, in training, when it was best:"
    return sentence, _metrics(metrics)


def _shown(report: Report) -> str:
    transform, classes = report["view"], len(report["classes"])
    among = (
        "" if classes == report["outputs"] else f"told apart among {classes:,} of its {report['outputs']:,} classes, "
    )
    return (
        f"On the {report['images']:,} images of split {_code(report['split'])} of "
        f"{_cell(PurePath(report['dataset']).name)} (digest of that split {_code(report['digest'][:12])}), {among}"
        f"{_cell(transform['image_size'])} px, {_cell(transform['crop_mode'])} crop {transform['crop_pct']:g}, "
        f"{_cell(transform['interpolation'])}, in {_cell(report['precision'])} on {_cell(report['device'])}, "
        "each image once:"
    )


def _metrics(numbers: Mapping[str, Any]) -> dict[str, str]:
    """The metrics as text by their titles."""
    found = {title: numbers[key] for key, title in _COLUMNS.items() if key in numbers}
    if real := numbers.get("real"):
        found["ReaL top-1 %"] = real["top1"]
    return {title: f"{value:.4f}" if title == "loss" else f"{value:.2f}" for title, value in found.items()}


def _recipe(trained: TrainedModel) -> dict[str, str]:
    """The facts that hold for all runs that the weights come from; {} for weights that are not of a run."""
    if not trained.origin:
        return {}
    check_settings(trained.source, trained.origin["config"], ("teacher.name", "teacher.others"))
    config, plan, differ = trained.origin["config"], trained.origin.get("plan", {}), _differ(trained)
    members = [config["teacher"], *(config["teacher"].get("others") or ())]
    names = [_code(each["name"]) + (" (recorded)" if each.get("store") else "") for each in members if each["name"]]
    teachers = " and ".join(names) or "none: labels alone"
    epochs = f"{_cell(config['schedule']['epochs'])} + {_cell(config['schedule']['cooldown_epochs'])}"
    facts = [  # a title, its text, and the settings that it is made of
        ("student", _code(config["student"]["name"]), {"student.name"}),
        ("teacher", teachers, {"teacher.name", "teacher.others"}),
        ("epochs + cool-down", epochs, {"schedule.epochs", "schedule.cooldown_epochs"}),
        ("image size", _cell(config["data"]["image_size"]), {"data.image_size"}),
        ("global batch", _cell(config["run"]["global_batch"]), {"run.global_batch"}),
        ("seed", _seed(config), {"run.seed", "student.seed", "run.out"}),
        ("dataset's digest", _code(str(plan.get("dataset", "not known"))[:12]), {"plan.dataset"}),
    ]
    return {title: text for title, text, keys in facts if not keys & differ} | {"weights": _weights(trained)}


def _seed(config: dict) -> str:
    """The seed of the plan, and that of the student where it has one of its own."""
    own = config["student"].get("seed")  # Files from before the setting existed lack it.
    return _cell(config["run"]["seed"]) + ("" if own is None else f" (student: {_cell(own)})")


def _differ(trained: TrainedModel) -> set[str]:
    """Settings that the averaged files do not share, run.out for files of several runs; empty where all are shared."""
    average = trained.origin.get("average")
    return set(average.get("differ", ("run.out",))) if average else set()  # earlier files do not say it


def _weights(trained: TrainedModel) -> str:
    """Words for the kind of the weights, and for the checkpoints of which they are the average."""
    average, kind = trained.origin.get("average"), _KINDS.get(trained.weights, "kind not known")
    if not average:
        return f"{kind}, after step {trained.origin['step']:,}"
    rows = [row for row in average["of"] if row.get("kept", True)]
    decay = f" with decay {_cell(average['decay'])}" if "decay" in average else ""
    how = f"{kind}; {_cell(average['how'])} average{decay} of {len(rows)} checkpoints"
    if "run.out" in _differ(trained):
        return f"{how} of several runs"
    return f"{how}: steps {', '.join(f'{step:,}' for step in sorted({row['step'] for row in rows}))}"


# Characters that Markdown, or the HTML in it, would take for more than text.
_MARKS = str.maketrans({mark: f"&#{ord(mark)};" for mark in "&<>|`*[]\\"})


def _cell(value: object) -> str:
    """A value as text for a cell of a table, on one line; whatever is in it stays text."""
    return " ".join(str(_without_folders(value)).split()).translate(_MARKS)


def _code(value: object) -> str:
    """A value between backticks for a cell of a table, on one line."""
    return "`" + " ".join(str(_without_folders(value)).replace("`", "'").replace("|", "\\|").split()) + "`"


def _without_folders(value: object) -> object:
    """The value without the folders of paths in it, since others need not know where a machine keeps its files."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(each) for each in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value
