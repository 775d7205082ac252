"""The largest micro-batch that fits, found by trying."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator

import torch

from pipelines.common.errors import UserError
from pipelines.plan.plan import TrainPlan
from trainer.cluster.memory import is_out_of_memory
from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.feed import Pipelines, batches_of, rank_plans
from trainer.state.train_state import TrainState
from trainer.update.step import TrainStep


def choose_micro_batch(
    config: Config,
    plan: TrainPlan,
    state: TrainState,
    pipelines: Pipelines,
    world: World,
    make_step: Callable[[World, int], TrainStep],
    evaluate_one_batch: Callable[[], object] | None,
) -> str:
    """Set `state.micro_batch` where the configuration leaves it open. Returns a sentence about the choice.

    A run that is resumed keeps its own if it still divides a rank's slice, because BatchNorm depends on it. A GPU gets
    the largest that fits; a CPU gets one group, because more would not be faster.

    Args:
      make_step: (world, micro-batch) -> the update. It is not compiled, which would take long and no more memory.
      evaluate_one_batch: evaluates the first validation images on this rank alone; None without a validation set.
    Raises:
      UserError: an evaluation does not fit, or not even one group.
    """
    rank_batch = config.run.global_batch // world.size
    if state.micro_batch and rank_batch % state.micro_batch == 0:
        return f"run.micro_batch auto: {state.micro_batch}, as before"
    if world.device.type != "cuda":
        state.micro_batch = config.augment.mix_group
        return f"run.micro_batch auto: {state.micro_batch}, one group, on a CPU"
    evaluate = evaluate_one_batch or (lambda: None)
    if not on_every_rank(memory_suffices(evaluate, pipelines), world):
        raise UserError(
            f"run.eval_batch is {config.run.eval_batch}: an evaluation does not fit into the GPU's memory. Lower it, "
            "data.eval_image_size or data.prefetch"
        )

    def update_fits(micro_batch: int) -> bool:
        step = make_step(world.by_itself(), micro_batch)  # One rank may fail alone, so the ranks must not communicate.
        warm_up = functools.partial(warm_up_updates, config, plan, pipelines, world, step, micro_batch, evaluate)
        return memory_suffices(warm_up, pipelines)

    state.micro_batch = largest_micro_batch(config, world, update_fits)
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
        if rank_batch % micro_batch == 0 and on_every_rank(fits(micro_batch), world):
            return micro_batch
    raise UserError(
        f"run.micro_batch auto: not even one group of {group} images fits into the GPU's memory. Lower "
        "augment.mix_group, data.image_size or data.prefetch, or use a smaller model; a smaller run.eval_batch leaves "
        "more room, too"
    )


def on_every_rank(fits: bool, world: World) -> bool:
    """Whether it is true on all ranks. Every rank must call it."""
    return world.all_reduce_sum(torch.tensor(int(not fits), device=world.device)).item() == 0


def memory_suffices(attempt: Callable[[], object], pipelines: Pipelines) -> bool:
    """Whether `attempt` ends without running out of memory. Everything that it allocated is freed."""
    try:
        attempt()
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


def warm_up_updates(
    config: Config,
    plan: TrainPlan,
    pipelines: Pipelines,
    world: World,
    step: TrainStep,
    micro_batch: int,
    evaluate: Callable[[], object],
) -> None:
    """Allocate the most memory that a run ever needs: two updates where images become largest, an evaluation between.

    DALI allocates beside PyTorch. At that point it holds the graphs of both image sizes, and from the first evaluation
    on that of the validation images.
    """
    epochs = range(config.schedule.total_epochs)
    start = plan.steps_per_epoch * max(epochs, key=plan.image_size_at)
    before = list(rank_plans(plan, max(start - 1, 0), max(start, 1), world, micro_batch))[-1:]
    plans = itertools.chain(before, rank_plans(plan, start, start + 1 + config.data.prefetch, world, micro_batch))
    with contextlib.closing(batches_of(pipelines.of["train"], plans)) as batches:
        step.warm_up(next(batches), then=evaluate)
        step.warm_up(next(batches))


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
