"""The images of a run: which rank sees what, the splits, and the pipelines over them."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import torch

from pipelines import Pipeline, open_pipeline, resolve_pipeline
from pipelines.batch import Batch
from pipelines.common.errors import UserError, naming_settings
from pipelines.common.files import read_json
from pipelines.common.machine import num_cores
from pipelines.dali_probe import probe_dataset
from pipelines.plan.plan import BatchPlan, TrainPlan, size_schedule
from pipelines.shards.index import ShardIndex, read_index, synthetic_index
from pipelines.shards.manifest import read_manifest
from trainer.cluster.world import World
from trainer.config.sections import Config, DataConfig, ImagesConfig
from trainer.monitor.clock import InputWait
from trainer.monitor.quarantine import QUARANTINE, Quarantine
from trainer.monitor.sample_grid import keep_samples
from trainer.update.compiler import COMPILE_PATIENCE_S

DECODE = "decode.json"


def rank_plans(plan: TrainPlan, step: int, stop: int, world: World, micro_batch: int) -> Iterator[BatchPlan]:
    """This rank's slice of the global batches [step, stop), `micro_batch` rows at a time."""
    return plan.batches(step, stop, rank=world.rank, ranks=world.size, micro_batch=micro_batch)


def batches_of(pipeline: Pipeline, plans: Iterable[BatchPlan]) -> Generator[Batch, None, None]:
    """The batch of each plan, in order; closing the generator stops the pipeline."""
    yield from pipeline.batches(plans)


class Feed(Iterator[Batch]):
    """This rank's batches of the updates [start, stop); close it to stop early.

    Each batch is reported to the watchdog, and the time that the device waits for it is measured.

    Attributes:
      wait: measures the waits.

    Args:
      micro_batch: images of a batch.
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
        preview: Path | None = None,
    ):
        self._plan = plan
        self._start = start
        self._per_update = plan.global_batch // world.size // micro_batch
        self._num_given = 0
        self._heartbeat = world.heartbeat
        self._closing = contextlib.ExitStack()
        plans = rank_plans(plan, start, stop, world, micro_batch)
        batches = self._closing.enter_context(contextlib.closing(batches_of(pipeline, plans)))
        shown = keep_samples(batches, preview) if preview is not None else batches
        self.wait = InputWait(shown, world.device)

    def __next__(self) -> Batch:
        where, patience_s = self._update()
        self._heartbeat(f"{where}: input")
        batch = next(self.wait)
        self._heartbeat(f"{where}: update", patience_s)
        self._num_given += 1
        return batch

    def close(self) -> None:
        """Stop what prepares further batches."""
        self._closing.close()

    def _update(self) -> tuple[str, float]:
        """The name of the update that the next batch is for, and how long the watchdog waits for it at least.

        A compiled model is compiled again when the image size changes, at the start of an epoch.
        """
        step = self._start + self._num_given // self._per_update
        epoch, within = divmod(step, self._plan.steps_per_epoch)
        is_new_size = (
            within == 0 and epoch > 0 and self._plan.image_size_at(epoch) != self._plan.image_size_at(epoch - 1)
        )
        return f"step {step + 1}", COMPILE_PATIENCE_S if is_new_size else 0


def resolve_micro_batch(config: Config, world: World) -> int:
    """The micro-batch, after checking that ranks and micro-batches divide the global batch into whole groups.

    It is one group where the configuration leaves it open; micro_batch.py may then find a larger one.
    """
    group, total = config.augment.mix_group, config.run.global_batch
    if total % group:
        raise UserError(
            f"run.global_batch is {total}; it must be a multiple of augment.mix_group, {group}: change one of them"
        )
    if total % (group * world.size):
        raise UserError(
            f"run.global_batch is {total}: {world.size} ranks cannot divide its {total // group} groups of {group} "
            "equally. Use a number of ranks that divides the groups, or change run.global_batch or augment.mix_group"
        )
    if config.run.micro_batch == "auto":
        return group
    micro_batch = config.run.micro_batch or group
    if micro_batch % group or (total // world.size) % micro_batch:
        raise UserError(
            f"run.micro_batch is {micro_batch}: it must be a multiple of augment.mix_group, {group}, and divide a "
            f"rank's slice of the global batch, {total // world.size}"
        )
    return micro_batch


def check_sizes_are_reached(config: Config) -> None:
    """Raise a UserError if the run ends before the last image size begins."""
    epoch, size = size_schedule(config.data.image_size)[-1]
    if epoch >= config.schedule.total_epochs:
        raise UserError(
            f"data.image_size: {size} px begin with epoch {epoch}, but the run ends after "
            f"{config.schedule.total_epochs} epochs: let them begin earlier, or raise schedule.epochs"
        )


def open_indices(config: DataConfig) -> tuple[ShardIndex, ShardIndex | None]:
    """The indices of the training set and, if there is one, of the validation set."""
    if config.root is None:
        if config.pipeline != "synthetic":
            raise UserError(
                "--data.root is missing: give the dataset folder that tools/shard_imagenet.py made, "
                "or use --data.pipeline synthetic"
            )
        return synthetic_index(config.synthetic_samples, config.synthetic_classes), None
    index = read_index(config.root, "train")
    val = read_index(config.root, "val") if "val" in read_manifest(config.root)["splits"] else None
    return index, val


def dataset_classes(config: DataConfig) -> list[str] | None:
    """The ids of the dataset's classes in the order of their labels; None for the synthetic one, which has none."""
    return None if config.root is None else list(read_manifest(config.root)["classes"])


def train_plan(config: Config, index: ShardIndex, fill: tuple[int, int, int]) -> TrainPlan:
    """The plan of the configuration; `fill` as for TrainPlan."""
    with naming_settings(global_batch="run.global_batch", image_size="data.image_size"):
        return TrainPlan(
            index=index,
            augment=config.augment,
            seed=config.run.seed,
            global_batch=config.run.global_batch,
            image_size=config.data.image_size,
            fill=fill,
            window_shards=config.data.window_shards if config.data.shuffle == "window" else 0,
        )


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


def open_pipelines(config: Config, indices: dict[str, ShardIndex], world: World) -> Pipelines:
    """The configured pipeline over each split."""
    quarantine = Quarantine(config.run.out / QUARANTINE, indices, config.data.max_bad_fraction, world)
    decode = choose_decode(config, indices["train"], world)
    of = {
        split: open_configured_pipeline(
            config.data, index, world=world, decode=decode["decode"], on_bad=quarantine.collector(split)
        )
        for split, index in indices.items()
    }
    return Pipelines(of, quarantine, decode)


def choose_decode(config: Config, index: ShardIndex, world: World) -> dict[str, str]:
    """DALI's decode path as `tried_decode`; the run's folder keeps the result of an earlier session."""
    return tried_decode(config.data, index, world, read_json(config.run.out / DECODE) if world.is_main else {})


def tried_decode(config: ImagesConfig, index: ShardIndex, world: World, remembered: dict) -> dict[str, str]:
    """DALI's decode path: the configured one, or the one that works on this GPU, which is tried once.

    Args:
      remembered: what an earlier call returned; it is used as long as GPU, DALI and the decoder's setting are the same.
    Returns:
      {"decode": roi or full}; after a trial also "why", and with which GPU, DALI and setting it was made.
    """
    if config.decode != "auto":
        return {"decode": config.decode}
    if world.device.type != "cuda" or resolve_pipeline(config.pipeline, world.device) != "dali":
        return {"decode": "roi"}
    try:
        import nvidia.dali as dali
    except ImportError:  # Opening the pipeline will say what to do about it.
        return {"decode": "roi"}
    load = config.hw_decoder_load
    tried_with = {"device": torch.cuda.get_device_name(world.device), "dali": dali.__version__, "hw_decoder_load": load}
    if world.is_main and not tried_with.items() <= remembered.items():
        decode, why = probe_dataset(index, str(world.device), config)
        remembered = {"decode": decode, "why": why, **tried_with}
    return world.broadcast_object(remembered)


def rank_threads(config: ImagesConfig, world: World) -> int:
    """The number of host threads that decode for this rank."""
    return config.threads or max(1, num_cores() // world.local_size)


def open_configured_pipeline(
    config: ImagesConfig, index: ShardIndex, *, world: World, decode: str, on_bad: Callable[[int, str], None]
) -> Pipeline:
    """The configured pipeline over one split."""
    config = dataclasses.replace(config, decode=decode, threads=rank_threads(config, world))
    return open_pipeline(index, config, device=world.device, on_damage=on_bad)
