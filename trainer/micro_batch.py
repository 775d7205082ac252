"""The micro-batch: whether the configured one divides the global batch, and the largest that fits, found by trying."""

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator

import torch

from pipelines.common.errors import UserError
from pipelines.plan.plan import BatchPlan, TrainPlan
from trainer.cluster.memory import is_out_of_memory
from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.feed import Pipelines, batches_of, rank_plans
from trainer.state.train_state import TrainState
from trainer.update.step import TrainStep


def resolve_micro_batch(config: Config, world: World) -> int:
    """The micro-batch, after checking that ranks and micro-batches divide the global batch into whole groups.

    It is one group where the configuration leaves it open; `choose_micro_batch` may then find a larger one.
    """
    group, total = config.augment.mix_group, config.run.global_batch
    if total % (group * world.size):
        raise UserError(
            f"run.global_batch is {total}; it must be a multiple of augment.mix_group times the number of ranks, "
            f"{group} x {world.size}. Change one of the three"
        )
    micro_batch = group if config.run.micro_batch == "auto" else config.run.micro_batch or group
    if micro_batch % group or (total // world.size) % micro_batch:
        raise UserError(
            f"run.micro_batch is {micro_batch}: it must be a multiple of augment.mix_group, {group}, and divide a "
            f"rank's slice of the global batch, {total // world.size}"
        )
    return micro_batch


def choose_micro_batch(
    config: Config,
    plan: TrainPlan,
    state: TrainState,
    pipelines: Pipelines,
    world: World,
    make_step: Callable[..., TrainStep],
    evaluate: Callable[[], object],
) -> str:
    """Set `state.micro_batch` where the configuration leaves it open. Returns a sentence about the choice.

    A run that is resumed keeps its own if it still divides a rank's slice, because BatchNorm depends on it. A GPU gets
    the largest that fits; a CPU gets one group, because more would not be faster.

    Args:
      make_step: makes the update of a world and a `micro_batch`, not compiled: that takes long and no more memory.
      evaluate: evaluates the first validation images, if there are any, on this rank alone.
    Raises:
      UserError: not even one group fits.
    """
    rank_batch = config.run.global_batch // world.size
    if state.micro_batch and rank_batch % state.micro_batch == 0:
        return f"run.micro_batch auto: {state.micro_batch}, as before"
    if world.device.type != "cuda":
        state.micro_batch = config.augment.mix_group
        return f"run.micro_batch auto: {state.micro_batch}, one group, on a CPU"

    def fits(micro_batch: int) -> bool:
        step = make_step(
            world.by_itself(), micro_batch=micro_batch
        )  # One rank may fail alone, so the ranks must not communicate.
        try:
            plans = largest_plans(config, plan, world, micro_batch)
            with contextlib.closing(batches_of(pipelines.of["train"], plans)) as batches:
                step.warm_up(next(batches), then=evaluate)
                step.warm_up(next(batches))
            return True
        except (RuntimeError, UserError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            gc.collect()  # Free what Python holds first, so that DALI can release it.
            for pipeline in pipelines.of.values():
                pipeline.forget()
            torch.cuda.empty_cache()

    state.micro_batch = largest_micro_batch(config, world, fits)
    return f"run.micro_batch auto: {state.micro_batch}, the largest that fits of a rank's {rank_batch} images"


def largest_micro_batch(config: Config, world: World, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch in whole groups that divides a rank's slice of the global batch and fits on every rank.

    Args:
      fits: tries one on this rank. It is called from the largest down, on all ranks alike.
    Raises:
      UserError: not even one group fits.
    """
    group, rank_batch = config.augment.mix_group, config.run.global_batch // world.size
    for micro_batch in range(rank_batch, 0, -group):
        if rank_batch % micro_batch:
            continue
        lacking = torch.tensor(int(not fits(micro_batch)), device=world.device)
        if not world.all_reduce_sum(lacking).item():
            return micro_batch
    raise UserError(
        f"run.micro_batch auto: not even one group of {group} images fits into the GPU's memory. Lower "
        "augment.mix_group, run.eval_batch, data.image_size or data.prefetch, or use a smaller model"
    )


def largest_plans(config: Config, plan: TrainPlan, world: World, micro_batch: int) -> Iterator[BatchPlan]:
    """The micro-batches that need the most memory of a run: where images become largest, and the one before.

    DALI allocates beside PyTorch. At that point it holds the graphs of both image sizes, and from the first evaluation
    on that of the validation images.
    """
    start = plan.steps_per_epoch * max(range(config.schedule.total_epochs), key=plan.image_size_at)
    before = list(rank_plans(plan, max(start - 1, 0), max(start, 1), world, micro_batch))[-1:]
    return itertools.chain(before, rank_plans(plan, start, start + 1 + config.data.prefetch, world, micro_batch))


@contextlib.contextmanager
def reporting_out_of_memory() -> Iterator[None]:
    """Inside, too little memory is a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{reason}. Lower run.micro_batch, or run.eval_batch in an evaluation, as far as that goes; else "
            "data.prefetch or data.image_size, or use a smaller model"
        ) from error
