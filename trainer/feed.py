"""The images of a run: the splits, the pipelines over them, and this rank's batches."""

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

from pipelines import Pipeline, open_dataset, open_pipeline, resolve_pipeline
from pipelines.batch import Batch
from pipelines.common.errors import UserError
from pipelines.common.files import read_json, write_synced
from pipelines.common.machine import num_cores
from pipelines.dali_probe import DECODE, probe_dataset
from pipelines.plan.plan import BatchPlan, TrainPlan
from pipelines.shards.index import ShardIndex, synthetic_index
from pipelines.shards.quarantine import QUARANTINE
from trainer.cluster.world import World
from trainer.config.sections import Config, DataConfig, ImagesConfig
from trainer.monitor.clock import InputWait
from trainer.monitor.quarantine import Quarantine
from trainer.monitor.sample_grid import keep_samples
from trainer.targets.replay import Replay
from trainer.update.compiler import COMPILE_PATIENCE_S


def rank_plans(plan: TrainPlan, step: int, stop: int, world: World, micro_batch: int) -> Iterator[BatchPlan]:
    """This rank's slice of the global batches [step, stop), at most `micro_batch` rows at a time."""
    return plan.batches(step, stop, rank=world.rank, ranks=world.size, micro_batch=micro_batch)


def batches_of(
    pipeline: Pipeline, plans: Iterable[BatchPlan], replay: Replay | None = None
) -> Generator[Batch, None, None]:
    """The batch of each plan, in order, with the targets of recorded teachers; closing the generator stops the work."""
    yield from pipeline.batches(plans) if replay is None else replay.batches(pipeline, plans)


class Feed(Iterator[Batch]):
    """This rank's batches of the updates [start, stop); close it to stop early.

    Each update is reported to the watchdog, and the time that the device waits for it is measured.

    Attributes:
      wait: measures the waits.

    Args:
      micro_batch: the most images of a batch.
      replay: gives each batch the targets of recorded teachers.
      preview: the file that gets a picture of the first batch, if it is not there; None makes none.
    """

    def __init__(
        self,
        plan: TrainPlan,
        pipeline: Pipeline,
        world: World,
        *,
        micro_batch: int,
        start: int,
        stop: int,
        replay: Replay | None = None,
        preview: Path | None = None,
    ):
        self._plan = plan
        self._heartbeat = world.heartbeat
        self._per_update = len(plan.division(world.size, micro_batch).sizes(world.rank))
        self._next = start * self._per_update  # The number of the next batch since the run began.
        self._batches = batches_of(pipeline, rank_plans(plan, start, stop, world, micro_batch), replay)
        shown = self._batches if preview is None else keep_samples(self._batches, preview)
        self.wait = InputWait(shown, world.device)

    def __next__(self) -> Batch:
        step, within = divmod(self._next, self._per_update)
        self._next += 1
        if within > 0:  # An update is reported once, because ranks may have different numbers of micro-batches.
            return next(self.wait)
        self._heartbeat(f"step {step + 1}: input")
        batch = next(self.wait)
        # A compiled model is compiled again when the image size changes, at the start of an epoch.
        epochs = (each // self._plan.steps_per_epoch for each in (max(step - 1, 0), step))
        before, now = map(self._plan.image_size_at, epochs)
        self._heartbeat(f"step {step + 1}: update", COMPILE_PATIENCE_S if now != before else 0)
        return batch

    def close(self) -> None:
        """Stop what prepares further batches."""
        self._batches.close()


def open_splits(config: DataConfig) -> tuple[dict[str, ShardIndex], list[str] | None]:
    """The index of train and, if there is one, of val; and the ids of the classes in the order of their labels.

    The synthetic dataset has no ids.
    """
    if config.root is None:
        if config.pipeline != "synthetic":
            raise UserError(
                "--data.root is missing: give the dataset folder that tools/shard_imagenet.py made, "
                "or use --data.pipeline synthetic"
            )
        return {"train": synthetic_index(config.synthetic_samples, config.synthetic_classes)}, None
    dataset = open_dataset(config.root)
    splits = {"train": dataset.train, "val": dataset.val}
    return {split: index for split, index in splits.items() if index is not None}, list(dataset.classes)


@dataclasses.dataclass(frozen=True)
class Pipelines:
    """A run's pipelines and what they have in common.

    Attributes:
      of: the pipeline of each split.
      quarantine: collects the damaged samples that they find.
      decode: DALI's decode path, and how it was chosen.
    """

    of: dict[str, Pipeline]
    quarantine: Quarantine
    decode: dict[str, str]

    def keep_decode(self, folder: Path) -> None:
        """Write what a trial on this GPU found into the folder that `open_pipelines` looks in at the next start."""
        if "device" in self.decode:
            write_synced(folder / DECODE, (json.dumps(self.decode) + "\n").encode())


def open_pipelines(
    config: Config, indices: dict[str, ShardIndex], world: World, decode: dict[str, str] | None = None
) -> Pipelines:
    """The configured pipeline over each split.

    Args:
      decode: as Pipelines.decode, where it was chosen before; None chooses it.
    """
    quarantine = Quarantine(config.run.out / QUARANTINE, indices, config.data.max_bad_fraction, world)
    decode = decode or choose_decode(config.data, indices["train"], world, config.run.out / DECODE)
    of = {
        split: open_configured_pipeline(
            config.data, index, world=world, decode=decode["decode"], on_bad=quarantine.collector(split)
        )
        for split, index in indices.items()
    }
    return Pipelines(of, quarantine, decode)


def choose_decode(config: ImagesConfig, index: ShardIndex, world: World, path: Path | None = None) -> dict[str, str]:
    """DALI's decode path: the configured one, or the one that works on this GPU, which rank 0 tries once.

    Args:
      path: the file that keeps the result of an earlier call, which holds as long as GPU, DALI and the decoder's
        setting are the same.
    Returns:
      {"decode": roi or full}; after a trial also "why", and with which GPU, DALI and setting it was made.
    """
    if config.decode != "auto":
        return {"decode": config.decode}
    dali = _dali_version() if world.device.type == "cuda" else ""
    if not dali or resolve_pipeline(config.pipeline, world.device) != "dali":
        return {"decode": "roi"}  # Where DALI is missing, opening the pipeline says what to do.
    tried_with = {"device": world.device_name, "dali": dali, "hw_decoder_load": config.hw_decoder_load}
    found = read_json(path) if path is not None and world.is_main else {}
    if world.is_main and not tried_with.items() <= found.items():
        decode, why = probe_dataset(index, str(world.device), config)
        found = {"decode": decode, "why": why, **tried_with}
    return world.broadcast_object(found)


def _dali_version() -> str:
    """DALI's version; "unknown" where it can be imported and no package says so, "" where it is missing.

    The package has another name for each version of CUDA.
    """
    with contextlib.suppress(ModuleNotFoundError):  # `nvidia` itself may be missing.
        if importlib.util.find_spec("nvidia.dali"):
            found = (each.version for each in distributions() if str(each.name).startswith("nvidia-dali-"))
            return next(found, "unknown")
    return ""


def rank_threads(config: ImagesConfig, world: World) -> int:
    """The number of host threads that decode for this rank."""
    return config.threads or max(1, num_cores() // world.local_size)


def open_configured_pipeline(
    config: ImagesConfig, index: ShardIndex, *, world: World, decode: str, on_bad: Callable[[int, str], None]
) -> Pipeline:
    """The configured pipeline over one split."""
    config = dataclasses.replace(config, decode=decode, threads=rank_threads(config, world))
    return open_pipeline(index, config, device=world.device, on_damage=on_bad)
