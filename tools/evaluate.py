"""Evaluates a trained model on a dataset: accuracy, calibration, classes. Plainly, or with torchrun on several ranks.

python tools/evaluate.py --data.root OUT --student.checkpoint CKPT-OR-RUN
python tools/evaluate.py --data.root OUT --student.name resnet50          # timm's pretrained weights

Each image counts exactly once. Size, crop and filter of the images are the model's own where no option changes them.
"""

import dataclasses
import sys
from pathlib import Path

if not __package__:  # A script finds the packages of its own repository, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pipelines  # noqa: F401  (Before torch, because it sets how OpenMP's threads wait.)

import numpy as np

from pipelines import resolve_pipeline
from pipelines.common.errors import UserError, exit_on_user_error
from pipelines.common.files import replacing
from pipelines.common.machine import package_versions
from pipelines.shards.index import ShardIndex, read_index
from pipelines.shards.manifest import read_manifest
from tools.lib.common.evaluation import EvalConfig, Origin, Report, predict_split
from tools.lib.evaluate.real_labels import read_real_labels
from tools.lib.evaluate.report import class_rows, write_and_show
from trainer.cluster.code_version import code_version
from trainer.cluster.world import World, join_world
from trainer.config.cli import parse_settings
from trainer.evaluation import metrics
from trainer.evaluation.metrics import Predictions
from trainer.evaluation.trained import TrainedModel, load
from trainer.models.class_names import order_doubt
from trainer.update.precision import resolve_precision


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
