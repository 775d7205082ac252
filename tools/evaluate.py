"""Evaluates a trained model on a dataset: accuracy, calibration, classes. Plainly, or with torchrun on several ranks.

python tools/evaluate.py --data.root OUT --student.checkpoint CKPT-OR-RUN
python tools/evaluate.py --data.root OUT --student.name resnet50          # timm's pretrained weights

Each image counts exactly once. What the model sees of an image (size, crop, filter) is its own unless told otherwise.
"""

import dataclasses
import functools
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a script: find the packages from the repository, and not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from timm.data import ImageNetInfo

from pipelines import resolve_pipeline
from pipelines.batch import Batch
from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import check_parent_folder, write_synced
from pipelines.common.settings import Section, setting
from pipelines.common.versions import package_versions
from pipelines.plan.plan import LARGEST_SIDE
from pipelines.shards.index import ShardIndex, read_index, read_manifest
from trainer.cluster.rendezvous import code_version
from trainer.cluster.world import World, join_world
from trainer.config.cli import parse_settings
from trainer.config.model_arguments import Kwargs, check_kwargs
from trainer.config.sections import Device, ImagesConfig, Precision
from trainer.evaluation import metrics
from trainer.evaluation import trained as inference
from trainer.evaluation.metrics import Predictions
from trainer.evaluation.predict import Classifier, num_eval_batches, predict
from trainer.evaluation.trained import Trained, descriptions
from trainer.feed import open_configured_pipeline, tried_decode
from trainer.models.checks import check_logits
from trainer.models.class_names import check_order_stated, class_order, order_doubt
from trainer.models.class_order import order_warning
from trainer.update.precision import allow_tf32, resolve_precision

_WORST = 10  # classes that are shown
_TIMM_REAL = "imagenet"


@dataclasses.dataclass(frozen=True)
class EvalDataConfig(ImagesConfig):
    """The images.

    Attributes:
      split: of the dataset.
      image_size: side of the image, pixels; 0 is the model's own.
      crop_pct: the image is resized to floor(image_size / crop_pct) before the crop; 0 is the model's own.
      crop_mode: center resizes the short side, squash both; empty is the model's own.
      interpolation: bicubic or bilinear; empty is the model's own.
      real_labels: JSON file with several labels for each image, or none: ImageNet-ReaL's real.json, or an object
        {key: [classes]}; the word imagenet takes the copy of ReaL's that timm ships.
    """

    pipeline: Literal["auto", "dali", "torchvision"] = setting("auto")
    split: str = "val"
    image_size: int = setting(0, at_least=0, at_most=LARGEST_SIDE)
    crop_pct: float = setting(0.0, at_least=0)  # the upper bound is EvalTransform's, which says why
    crop_mode: Literal["", "center", "squash"] = setting("", may_be_empty=True)
    interpolation: Literal["", "bicubic", "bilinear"] = setting("", may_be_empty=True)
    real_labels: Path | None = None

    @property
    def view(self) -> dict[str, object]:
        """The fields of inference.EvalTransform that are not to be the model's own."""
        fields = ("image_size", "crop_pct", "crop_mode", "interpolation")
        return {name: getattr(self, name) for name in fields if getattr(self, name)}


@dataclasses.dataclass(frozen=True)
class EvalStudentConfig(Section):
    """The model.

    Attributes:
      name: timm's name; a checkpoint of this trainer and an exported folder say it themselves. Without a checkpoint
        timm's pretrained weights are downloaded.
      checkpoint: file of weights, a run's folder (its best weights), or a folder that tools/export.py wrote.
      weights: ema, raw, or auto: the EMA if there is one, and of a run the best.
      kwargs: passed to timm.create_model, besides or instead of what the checkpoint says.
      classes: text file that names the outputs in their order, one on a line, as the dataset's manifest names classes;
        there may be more of them than the dataset has. Without it a checkpoint of this trainer names them itself.
    """

    key = "student"
    name: str | None = None
    checkpoint: Path | None = None
    weights: Literal["auto", "ema", "raw"] = "auto"
    kwargs: Kwargs = dataclasses.field(default_factory=dict)
    classes: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        check_kwargs("student", self.kwargs)


@dataclasses.dataclass(frozen=True)
class EvalRunConfig(Section):
    """How it is computed.

    Attributes:
      device: auto, cuda or cpu.
      precision: auto, bf16, fp16 or fp32; auto is bf16 on GPUs that have it, fp16 on others, fp32 on CPUs.
      tf32: GPUs may round the factors of float32 matrix products and convolutions to TensorFloat-32.
      channels_last: memory format.
      batch: images a forward pass on one rank.
      json: file for everything that was found.
      ready_s: seconds within which all ranks must have come.
    """

    key = "run"
    device: Device = "auto"
    precision: Precision = "auto"
    tf32: bool = True
    channels_last: bool = True
    batch: int = setting(128, at_least=1)
    json: Path | None = None
    ready_s: float = setting(60, above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.json is not None:
            check_parent_folder(self.json, f"run.json is {self.json}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """All sections."""

    data: EvalDataConfig = dataclasses.field(default_factory=EvalDataConfig)
    student: EvalStudentConfig = dataclasses.field(default_factory=EvalStudentConfig)
    run: EvalRunConfig = dataclasses.field(default_factory=EvalRunConfig)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        with exit_on_user_error():
            description = __doc__.split("\n\n")[0]
            config = parse_settings(EvalConfig, arguments, prog="tools/evaluate.py", description=description)
            with join_world(config.run.device, lambda _: code_version(), config.run.ready_s) as world:
                report = evaluate_dataset(config, world)
                if world.is_main:
                    tell(report, config.run.json)
    except KeyboardInterrupt:
        sys.exit(130)


def tell(report: dict, path: Path | None) -> None:
    """Write the report to a file, if there is to be one, and show it."""
    if path is not None:
        try:
            write_synced(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            show(report)
            raise UserError(f"run.json is {path}: cannot be written ({error.strerror}). Name another file") from error
    show(report)
    if path is not None:
        print(f"written to {path}")


def evaluate_dataset(config: EvalConfig, world: World) -> dict:
    """Load, go through the split, and describe what came out, on every rank. Every rank must call it.

    Raises:
      UserError: model and dataset do not fit each other, or one of them cannot be had.
    """
    data, student = config.data, config.student
    if data.root is None:
        raise UserError("--data.root is missing: give the dataset folder that tools/shard_imagenet.py made")
    index = read_index(data.root, data.split)
    names = list(read_manifest(data.root)["classes"])
    real = read_real_labels(data.real_labels, index, names) if data.real_labels else None
    settings = {"weights": student.weights, "kwargs": student.kwargs or None, "classes": student.classes}
    trained = inference.load(student.name, student.checkpoint, **settings, **data.view)
    advice = "Change student.kwargs, or use another model"
    check_logits(trained.model, trained.name, trained.num_outputs, trained.view.image_size, advice)
    order = outputs_of(names, trained, order_doubt(data.root))
    weights_digest = trained.digest()
    check_ranks_agree(world, trained, weights_digest, index, order, config)
    damaged: dict[int, str] = {}
    predictions = predict_split(trained, index, order, config, world, damaged)
    check_finite(predictions, index)
    found = {**metrics.summary(predictions), "classes": class_rows(predictions, names)}
    pairs = predictions.label, predictions.top[:, 0]
    found["order_warning"] = order_warning(*pairs, len(names), names, "the model", "--student.classes")
    if real is not None:
        found["real"] = metrics.real_accuracy(predictions, real)
    return {
        **origin(config, trained, weights_digest, index, world),
        **found,
        "damaged": [f"{index.name(sample)}: {error}" for sample, error in sorted(damaged.items())],
    }


def check_ranks_agree(
    world: World, trained: Trained, weights_digest: str, index: ShardIndex, order: list[int] | None, config: EvalConfig
) -> None:
    """Raise a UserError, on every rank, if ranks are about to evaluate different things. Every rank must call it."""
    mine = {
        "the dataset's digest": index.digest[:12],
        "the hash of the weights": weights_digest[:12],
        "the order of the classes": order,
        "what the model sees": dataclasses.asdict(trained.view),
        "run.batch": config.run.batch,
        "the precision": str(resolve_precision(config.run.precision, world.device)),
    }
    for rank, theirs in enumerate(found := world.all_gather([mine])):
        for name, value in theirs.items():
            if value != found[0][name]:
                raise UserError(
                    f"{name} is not the same on all ranks: {found[0][name]} on rank 0, {value} on rank {rank}. Give "
                    "all the same command and files, and no folder of a run that goes on"
                )


def check_finite(predictions: Predictions, index: ShardIndex) -> None:
    """Raise a UserError about a model whose outputs are infinite or no numbers."""
    bad = np.flatnonzero(~np.isfinite(predictions.loss))
    if len(bad):
        raise UserError(
            f"the model's outputs are not finite for {len(bad)} of {len(predictions)} images, the first is "
            f"{index.name(int(bad[0]))}. Try --run.precision fp32, or other weights"
        )


def origin(config: EvalConfig, trained: Trained, weights_digest: str, index: ShardIndex, world: World) -> dict:
    """What the numbers of a report belong to."""
    return {
        "model": trained.name,
        "source": trained.source,
        "weights": trained.weights,
        "weights_digest": weights_digest,
        "step": trained.origin.get("step"),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "outputs": trained.num_outputs,
        "dataset": str(config.data.root),
        "split": config.data.split,
        "digest": index.digest,
        "view": dataclasses.asdict(trained.view),
        "pipeline": resolve_pipeline(config.data.pipeline, world.device),
        "precision": str(resolve_precision(config.run.precision, world.device)).removeprefix("torch."),
        "device": world.device_name,
        "ranks": world.size,
        "software": package_versions(),
    }


def outputs_of(names: list[str], trained: Trained, doubt: str, option: str = "--student.classes") -> list[int] | None:
    """Which output is each of the dataset's classes; None where they are in the same order.

    Args:
      names: of the dataset's classes; doubt: as trainer.models.class_names.order_doubt.
      option: the setting that names the model's outputs, as it is typed; "" where there is none.
    Raises:
      UserError: the model does not know a class, or nothing names its outputs and there are not as many, or it is in
        doubt in which order they are.
    """
    listed, classes = trained.classes, len(names)
    if not trained.has_names_for(names):
        if trained.num_outputs != classes:
            raise UserError(
                f"{trained.source}: has {trained.num_outputs} outputs, the dataset has {classes} classes. Use a model "
                f"of these classes{f', or name all its outputs with {option} FILE' if option else ''}"
            )
        check_order_stated(doubt, trained.source, option)
        return None
    return None if listed == names else class_order(names, listed, trained.source, "student")


def predict_split(
    trained: Trained,
    index: ShardIndex,
    order: list[int] | None,
    config: EvalConfig,
    world: World,
    damaged: dict[int, str],
) -> Predictions:
    """What the model says of every image of a split, the same on every rank. Every rank must call it.

    Args:
      order: as of `outputs_of`.
      damaged: gets the samples that were replaced by gray, by any rank, and what is wrong with them.
    """
    precision = resolve_precision(config.run.precision, world.device)
    if world.device.type == "cuda":
        allow_tf32(config.run.tf32)
    mine: dict[int, str] = {}
    decode = tried_decode(config.data, index, world, {})["decode"]
    pipeline = open_configured_pipeline(config.data, index, world=world, decode=decode, on_bad=mine.setdefault)
    memory_format = torch.channels_last if config.run.channels_last else torch.contiguous_format
    model = trained.model.to(world.device, memory_format=memory_format)
    found = predict(
        {"": _chosen(model, order, world.device)},
        trained.normalize(precision).to(world.device),
        pipeline,
        trained.view.plan(index),
        batch=config.run.batch,
        precision=precision,
        world=world,
        shown=functools.partial(_shown, total=num_eval_batches(len(index), config.run.batch, world), world=world),
    )
    damaged.update(world.all_gather(sorted(mine.items())))
    return found[""]


def _chosen(model: torch.nn.Module, order: list[int] | None, device: torch.device) -> Classifier:
    if order is None:
        return model
    which = torch.tensor(order, device=device)
    return lambda pixels: model(pixels).index_select(1, which)


def _shown(batches: Iterator[Batch], total: int, world: World) -> Iterator[Batch]:
    """The same batches, with a progress bar on a terminal."""
    console = Console(stderr=True, quiet=not world.is_main)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(batches, total, description="evaluating")


def class_rows(predictions: Predictions, names: list[str]) -> list[dict]:
    """For each class its id, words, images, accuracy in percent (None without images), and what it is taken for."""
    images, accuracy = metrics.per_class(predictions, len(names))
    rows = []
    for label, (name, words) in enumerate(zip(names, descriptions(names), strict=True)):
        row = {"class": name, "words": words, "images": int(images[label])}
        found = metrics.confusions(predictions, label) if images[label] else []
        taken_for = [{"class": names[other], "percent": 100 * share} for other, share in found]
        rows.append({**row, "top1": 100 * float(accuracy[label]) if images[label] else None, "taken_for": taken_for})
    return rows


def read_real_labels(path: Path, index: ShardIndex, names: list[str]) -> list[list[int]]:
    """The labels of each sample from a file as EvalDataConfig.real_labels has it.

    ReaL's list goes by the number of ImageNet's validation images, and its labels by ImageNet's 1,000 classes. An
    object goes by the samples' keys, CLASS/STEM or STEM, and names classes as the dataset does, or by their label.

    Args:
      names: of the dataset's classes.
    Raises:
      UserError: the file cannot be read, is of other classes, or says nothing of a sample.
    """
    try:
        is_timms = str(path) == _TIMM_REAL
        content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") if is_timms else path.read_bytes()
    except OSError as error:
        raise UserError(f"data.real_labels is {path}: cannot be read ({error.strerror}). Name another file") from error
    try:
        found = json.loads(content)
        by_key = found if isinstance(found, dict) else {f"{i + 1:08d}": each for i, each in enumerate(found)}
        by_key = {key: [each if isinstance(each, str) else int(each) for each in by_key[key]] for key in by_key}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a JSON list of lists of labels, nor an object with a list for each key ({error}). Give one"
        ) from error
    if isinstance(found, list) and names != ImageNetInfo().label_names():
        raise UserError(
            f"{path}: a list goes by ImageNet's 1,000 classes, and the dataset has others. Give an object "
            "{key: [classes]}"
        )
    label_of = {**{name: label for label, name in enumerate(names)}, **{label: label for label in range(len(names))}}
    keys = [key.decode() for key in index.samples["key"].tolist()]
    labels = [[label_of.get(each, each) for each in _labels_of(key, by_key, path)] for key in keys]
    for key, each in zip(keys, labels, strict=True):
        if unknown := [label for label in each if label not in label_of]:
            raise UserError(f"{path}: sample {key} has the label {unknown[0]!r}, which is no class of the dataset")
    if not any(labels):
        raise UserError(f"{path}: no sample has a label in it. Leave it out, or give another")
    return labels


def _labels_of(key: str, by_key: dict[str, list], path: Path) -> list:
    """An image's labels by its key, CLASS/STEM, by its stem, or by the number that ends ILSVRC2012_val_00000001."""
    stem = key.rpartition("/")[2]
    number = re.search(r"_val_(\d{8})$", stem)
    for each in (key, stem, number[1] if number else ""):
        if each in by_key:
            return by_key[each]
    raise UserError(f"{path}: says nothing of sample {key}. A list goes by the number in ILSVRC2012_val_00000001")


def show(report: dict) -> None:
    """The report as a table, and the classes that are found least."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=120, highlight=False)
    kind = f", {report['weights']} weights" if report["weights"] else ""
    view = report["view"]
    classes, outputs = len(report["classes"]), report["outputs"]
    among = "" if classes == outputs else f" told apart among {classes:,} of its {outputs:,} classes,"
    console.print(
        f"{report['model']} ({report['source']}{kind}) on {report['images']:,} images of {report['dataset']},{among} "
        f"{view['image_size']} px, {view['crop_mode']} crop {view['crop_pct']:g}, {view['interpolation']}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    columns = [("top-1 %", report["top1"]), ("top-5 %", report["top5"]), ("loss", report["loss"])]
    columns += [("ECE %", report["ece"])]
    if real := report.get("real"):
        columns += [(f"ReaL top-1 % ({real['images']:,} images)", real["top1"])]
    for name, _ in columns:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.4f}" if name == "loss" else f"{value:.2f}" for name, value in columns))
    console.print(table)
    console.print(worst_classes(report["classes"]))
    if report["order_warning"]:
        console.print(f"warning: {report['order_warning']}", markup=False, soft_wrap=True)
    if report["damaged"]:
        console.print(
            f"{len(report['damaged'])} damaged images were counted, in gray; the first: {report['damaged'][0]}",
            markup=False,
            soft_wrap=True,
        )


def worst_classes(rows: list[dict]) -> Table:
    """The classes with the lowest accuracy, and what their images are taken for."""
    known = sorted((row for row in rows if row["images"]), key=lambda row: row["top1"])
    table = Table(title="Classes that are found least", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("class", "", "images", "top-1 %", "taken for"):
        table.add_column(name, justify="right" if name in ("images", "top-1 %") else "left")
    for row in known[:_WORST]:
        taken_for = ", ".join(f"{other['class']} {other['percent']:.0f} %" for other in row["taken_for"])
        words = row["words"] if row["words"] != row["class"] else ""
        cells = (row["class"], words, f"{row['images']:,}", f"{row['top1']:.1f}", taken_for)
        table.add_row(*map(escape, cells))
    return table


if __name__ == "__main__":
    main()
