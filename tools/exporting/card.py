"""The card of an exported model: README.md as people and Hugging Face's hub read it."""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath

import jinja2
from timm.data import ImageNetInfo

from pipelines.errors import UserError
from tools.exporting.onnx_file import OPSET, PACKAGES
from tools.exporting.timm_folder import OLDEST_TIMM
from trainer.inference import Trained
from trainer.models import preprocessing
from trainer.versions import package_versions

CARD, ONNX, PROGRAM = "README.md", "model.onnx", "model.pt2"
_TEMPLATE = Path(__file__).with_name("card.md")
_KINDS = {"ema": "running average of the weights", "raw": "weights as trained, not averaged", "": "as they were found"}
_COLUMNS = {"top1": "top-1 %", "top5": "top-5 %", "loss": "loss", "ece": "ECE %"}


def card(trained: Trained, files: dict[str, str], evaluation: dict | None) -> str:
    """The card's text, Markdown.

    Args:
      files: what each of the folder's files is.
      evaluation: as `read_evaluation` gives it; without it the accuracy is the one that best.pt was kept for.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    measured, metrics = _accuracy(trained, evaluation)
    return template.render(
        name=trained.name,
        parameters=f"{sum(p.numel() for p in trained.model.parameters()) / 1e6:.2f}",
        outputs=trained.num_outputs,
        outputs_named=_outputs_named(trained),
        dataset_id="imagenet-1k" if _is_imagenet(trained) else None,
        files=files,
        recipe=_recipe(trained),
        audit=[
            {**row, "usi": _cell(row["usi"]), "here": _cell(row["here"])} for row in trained.origin.get("audit", [])
        ],
        source=_without_folders(trained.source),
        measured=measured,
        metrics=metrics,
        **_pixels(trained),
        oldest_timm=".".join(map(str, OLDEST_TIMM)),
        opset=OPSET,
        onnx_file=ONNX,
        program_file=PROGRAM,
        trained_with=_listed(trained.origin.get("software", {})),
        exported_with=_listed({**package_versions(), **dict(_versions(PACKAGES if ONNX in files else ()))}),
    )


def read_evaluation(path: Path, trained: Trained) -> dict:
    """What `python -m trainer.evaluate --run.json FILE` wrote about this model.

    Raises:
      UserError: the file cannot be read, is something else, or is about other weights.
    """
    again = "Write it with python -m trainer.evaluate --run.json FILE"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        model, digest = report["model"], report["weights_digest"]
        _metrics(report), _shown(report)
    except OSError as error:
        raise UserError(f"--evaluation {path}: cannot be read ({error.strerror}). {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else type(error).__name__
        raise UserError(f"--evaluation {path}: not an evaluation ({reason}). {again}") from error
    if digest != trained.digest():
        kind = f", {report['weights']} weights" if report.get("weights") else ""
        raise UserError(
            f"--evaluation {path}: is of other weights ({model} from {report.get('source')}{kind}) than "
            f"{trained.source}. Evaluate this model"
        )
    return report


def _accuracy(trained: Trained, evaluation: dict | None) -> tuple[str, dict[str, str]]:
    """A sentence that says on what it was measured, and the numbers by name; {} without any."""
    if evaluation is not None:
        return _shown(evaluation), _metrics(evaluation)
    metrics = trained.origin.get("metrics")
    if not metrics:
        return "", {}
    return f"On the {metrics['images']:,} validation images of the run, in training, when it was best:", _metrics(
        metrics
    )


def _shown(report: dict) -> str:
    view = report["view"]
    return (
        f"On the {report['images']:,} images of split `{report['split']}` of {_without_folders(report['dataset'])} "
        f"(digest `{report['digest'][:12]}`), {view['image_size']} px, {view['crop_mode']} crop {view['crop_pct']:g}, "
        f"{view['interpolation']}, in {report['precision']} on {report['device']}, each image once:"
    )


def _metrics(numbers: dict) -> dict[str, str]:
    found = {title: numbers[key] for key, title in _COLUMNS.items() if key in numbers}
    if real := numbers.get("real"):
        found["ReaL top-1 %"] = real["top1"]
    return {title: f"{value:.4f}" if title == "loss" else f"{value:.2f}" for title, value in found.items()}


def _recipe(trained: Trained) -> dict[str, str]:
    """The facts about a run that one asks first; {} for weights that are not of a run."""
    if not trained.origin:
        return {}
    config, plan = trained.origin["config"], trained.origin["plan"]
    names = [config["teacher"]["name"], *(other["name"] for other in config["teacher"].get("others", ()))]
    return {
        "student": f"`{config['student']['name']}`",
        "teacher": " and ".join(f"`{name}`" for name in names if name) or "none: labels alone",
        "epochs + cool-down": f"{config['schedule']['epochs']} + {config['schedule']['cooldown_epochs']}",
        "image size": _cell(config["data"]["image_size"]),
        "global batch": f"{config['run']['global_batch']}",
        "seed": f"{config['run']['seed']}",
        "dataset's digest": f"`{plan['dataset'][:12]}`",
        "weights": f"{_KINDS[trained.weights]}, after step {trained.origin['step']:,}",
    }


def _pixels(trained: Trained) -> dict:
    view, expects = trained.view, preprocessing(trained.model)
    resize = int(view.image_size / view.crop_pct)
    side = "Both sides are" if view.crop_mode == "squash" else "The short side is"
    return {
        "view": view,
        "size": view.image_size,
        "resize": resize,
        "resized": f"{side} resized to {resize} pixels",
        "mean": list(expects.mean),
        "std": list(expects.std),
    }


def _outputs_named(trained: Trained) -> str:
    if trained.classes is None:
        return "Nothing names its outputs."
    if trained.classes_guessed:
        return "Nothing names its outputs; there are as many as ImageNet has classes, and timm takes them to be these."
    return "`label_names` in `config.json` names them in their order."


def _is_imagenet(trained: Trained) -> bool:
    known = trained.classes is not None and not trained.classes_guessed
    return known and set(trained.classes) == set(ImageNetInfo().label_names())


def _cell(value: object) -> str:
    """A value for a cell of a table, on one line."""
    return " ".join(str(_without_folders(value)).replace("|", "\\|").split())


def _without_folders(value: object) -> object:
    """The same without the folders of paths in it: where a machine keeps its files is nobody's business."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(each) for each in value]
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def _versions(packages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:  # installed under another name, as onnxruntime-gpu
            continue


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
