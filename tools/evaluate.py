"""Evaluates a trained model on a dataset: accuracy, calibration, classes. Plainly, or with torchrun on several ranks.

python tools/evaluate.py --data.root OUT --student.checkpoint CKPT-OR-RUN
python tools/evaluate.py --data.root OUT --student.name resnet50          # timm's pretrained weights

Each image counts exactly once. Size, crop and filter of the images are the model's own where no option changes them.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

import numpy as np

from pipelines import resolve_pipeline
from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import check_parent_folder, replacing
from pipelines.common.machine import package_versions
from pipelines.common.settings import Section, setting
from pipelines.plan.plan import LARGEST_SIDE
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.manifest import read_manifest
from tools.lib.common.evaluation import ForwardConfig, Origin, Report, predict_split
from tools.lib.evaluate.real_labels import read_real_labels
from tools.lib.evaluate.report import class_rows, write_and_show
from trainer.cluster.code_version import code_version
from trainer.cluster.world import World, join_world
from trainer.config.cli import parse_settings
from trainer.config.model_arguments import Kwargs, check_kwargs
from trainer.config.sections import ImagesConfig
from trainer.evaluation import metrics
from trainer.evaluation.metrics import Predictions
from trainer.evaluation.trained import TrainedModel, load
from trainer.models.class_names import order_doubt
from trainer.update.precision import resolve_precision


@dataclasses.dataclass(frozen=True)
class EvalDataConfig(ImagesConfig):
    """The images.

    Attributes:
      root: dataset folder made by tools/shard_imagenet.py.
      pipeline: auto, dali or torchvision; auto is DALI with a GPU, torchvision without.
      split: of the dataset.
      image_size: side of the image, pixels; 0 is the model's own.
      crop_pct: the image is resized to floor(image_size / crop_pct) before the crop; 0 is the model's own.
      crop_mode: center resizes the short side, squash both; empty is the model's own.
      interpolation: bicubic or bilinear; empty is the model's own.
      real_labels: JSON file with several labels for each image, or none: ImageNet-ReaL's real.json, or an object
        {key: [classes]}; the word imagenet takes the copy of ReaL's that timm ships.
    """

    root: Path | None = None
    pipeline: Literal["auto", "dali", "torchvision"] = "auto"
    split: str = "val"
    image_size: int = setting(0, at_least=0, at_most=LARGEST_SIDE)
    crop_pct: float = setting(0.0, at_least=0)  # EvalTransform has the upper bound, and says why.
    crop_mode: Literal["", "center", "squash"] = setting("", may_be_empty=True)
    interpolation: Literal["", "bicubic", "bilinear"] = setting("", may_be_empty=True)
    real_labels: Path | None = None

    @property
    def transform(self) -> dict[str, Any]:
        """The fields of EvalTransform that are not to be the model's own."""
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
class EvalRunConfig(ForwardConfig):
    """How it is computed.

    Attributes:
      json: file for the whole report.
      predictions: file, NAME.npz, for what the model says of each image, in the order of the split: arrays of NumPy
        sample and label (int64 [N]), top (int64 [N, K], the best classes, best first), confidence and loss (float32
        [N]).
      ready_s: seconds within which all ranks must have come.
    """

    json: Path | None = None
    predictions: Path | None = None
    ready_s: float = setting(60, above=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("json", "predictions"):
            if (path := getattr(self, name)) is not None:
                check_parent_folder(path, f"run.{name} is {path}")


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
            description = (__doc__ or "").split("\n\n")[0]
            config = parse_settings(EvalConfig, arguments, prog="tools/evaluate.py", description=description)
            with join_world(config.run.device, lambda _: code_version(), config.run.ready_s) as world:
                report = evaluate_dataset(config, world)
                if world.is_main:
                    write_and_show(report, config.run.json)
    except KeyboardInterrupt:
        sys.exit(130)


def evaluate_dataset(config: EvalConfig, world: World) -> Report:
    """Load, go through the split, and describe the result, on every rank. Every rank must call it.

    Raises:
      UserError: model and dataset do not fit each other, or one of them cannot be had.
    """
    data, student = config.data, config.student
    if data.root is None:
        raise UserError("--data.root is missing: give the dataset folder that tools/shard_imagenet.py made")
    index = read_index(data.root, data.split)
    names = list(read_manifest(data.root)["classes"])
    real = read_real_labels(data.real_labels, index, names) if data.real_labels else None
    trained = load(
        student.name,
        student.checkpoint,
        weights=student.weights,
        kwargs=student.kwargs or None,
        classes=student.classes,
        **data.transform,
    )
    order = trained.order_of(names, order_doubt(data.root))
    facts = origin(config, trained, index, world)
    check_ranks_agree(
        world,
        {
            "the dataset's digest": index.digest[:12],
            "the hash of the weights": facts["weights_digest"][:12],
            "the order of the classes": order,
            "the transform of the images": facts["view"],
            "run.batch": config.run.batch,
            "the precision": facts["precision"],
        },
    )
    predictions, damaged = predict_split(trained, index, order, images=data, forward=config.run, world=world)
    check_finite(predictions, index)
    if config.run.predictions is not None and world.is_main:
        with replacing(config.run.predictions) as file:
            np.savez(file, **vars(predictions))
    report: Report = {
        **facts,
        **metrics.summary(predictions),
        "classes": class_rows(predictions, names),
        "damaged": damaged,
    }
    if real is not None:
        report["real"] = metrics.real_accuracy(predictions, real)
    return report


def check_ranks_agree(world: World, mine: dict[str, object]) -> None:
    """Raise a UserError, on every rank, if ranks are about to evaluate different things. Every rank must call it.

    Args:
      mine: this rank's values, which all ranks must share, by their names in the message.
    """
    of_ranks = world.all_gather([mine])
    for name in mine:
        if any(each[name] != mine[name] for each in of_ranks):
            raise UserError(
                f"{name} is not the same on all ranks: {[each[name] for each in of_ranks]}. Give all the same command "
                "and files, and no folder of a run that is still training"
            )


def check_finite(predictions: Predictions, index: ShardIndex) -> None:
    """Raise a UserError about a model whose outputs are infinite or no numbers."""
    bad = np.flatnonzero(~np.isfinite(predictions.loss))
    if len(bad):
        raise UserError(
            f"the model's outputs are not finite for {len(bad)} of {len(predictions)} images, the first is "
            f"{index.name(int(bad[0]))}. Try --run.precision fp32, or other weights"
        )


def origin(config: EvalConfig, trained: TrainedModel, index: ShardIndex, world: World) -> Origin:
    """What the numbers of a report belong to."""
    return {
        "model": trained.name,
        "source": trained.source,
        "weights": trained.weights,
        "weights_digest": trained.digest(),
        "step": trained.origin.get("step"),
        "parameters": sum(p.numel() for p in trained.module.parameters()),
        "outputs": trained.num_outputs,
        "dataset": str(config.data.root),
        "split": config.data.split,
        "digest": index.digest,
        "view": dataclasses.asdict(trained.transform),
        "pipeline": resolve_pipeline(config.data.pipeline, world.device),
        "precision": str(resolve_precision(config.run.precision, world.device)).removeprefix("torch."),
        "device": world.device_name,
        "ranks": world.size,
        "software": package_versions(),
    }


if __name__ == "__main__":
    main()
