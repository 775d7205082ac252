"""The largest micro-batch that fits, found by trying."""

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterator

import torch

from pipelines.errors import UserError
from pipelines.plan import TrainPlan
from trainer.checkpoint import TrainState
from trainer.config import Config
from trainer.data import Pipelines, rank_plans
from trainer.distributed import World
from trainer.memory import is_out_of_memory
from trainer.step import TrainStep


def choose_micro_batch(
    config: Config,
    plan: TrainPlan,
    state: TrainState,
    pipelines: Pipelines,
    world: World,
    make_step: Callable[[World, int], TrainStep],
    evaluation: Callable[..., object] | None,
) -> str:
    """Set `state.micro_batch` where the configuration leaves it open. Returns what was chosen, in words.

    A run that goes on keeps the one it has, where the ranks can still share it: what BatchNorm does depends on it. A
    GPU gets the largest; a CPU one group, since more would not be faster.

    Args:
      make_step: (world, micro-batch) -> the update, not compiled: that takes no more memory, and long.
      evaluation: trainer.validation.evaluate with all but its `world` and `interrupted`; None without a validation set.
    """
    share = config.run.global_batch // world.size
    if state.micro_batch and share % state.micro_batch == 0:
        return f"run.micro_batch auto: {state.micro_batch}, as before"
    if world.device.type != "cuda":
        state.micro_batch = config.augment.mix_group
        return f"run.micro_batch auto: {state.micro_batch}, one group, on a CPU"
    alone = dataclasses.replace(world, rank=0, size=1)  # nothing is sent between the ranks, one may fail alone

    def fits(micro_batch: int) -> bool:
        return rehearsal_fits(config, plan, pipelines, world, make_step(alone, micro_batch), micro_batch, first_images)

    def first_images() -> None:
        if evaluation is not None:
            asked = itertools.count()
            evaluation(world=alone, interrupted=lambda: next(asked) > 0)

    state.micro_batch = largest_micro_batch(config, world, fits)
    return f"run.micro_batch auto: {state.micro_batch}, the largest that fits of a rank's {share} images"


def largest_micro_batch(config: Config, world: World, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch in whole groups that divides a rank's share and fits on every rank.

    Args:
      fits: tries one on this rank. Called from the largest down, on all ranks alike.
    Raises:
      UserError: not even one group fits.
    """
    group, share = config.augment.mix_group, config.run.global_batch // world.size
    for micro_batch in range(share, 0, -group):
        if share % micro_batch:
            continue
        failed = torch.tensor(int(not fits(micro_batch)), device=world.device)
        if world.sum(failed).item() == 0:
            return micro_batch
    raise UserError(
        f"run.micro_batch auto: not even one group of {group} images fits into the GPU's memory beside "
        "an evaluation. Lower augment.mix_group, run.eval_batch, data.image_size or data.prefetch, or use a smaller "
        "model"
    )


def rehearsal_fits(
    config: Config,
    plan: TrainPlan,
    pipelines: Pipelines,
    world: World,
    step: TrainStep,
    micro_batch: int,
    evaluate_first: Callable[[], None],
) -> bool:
    """Whether an update fits beside the pipelines and the batches that are ready, where images are largest.

    Args:
      evaluate_first: evaluates a validation batch. DALI allocates outside of PyTorch, and once it has built its graph
        for the validation images it keeps it: updates must fit beside it.
    """
    epochs = range(config.schedule.total_epochs)
    start = plan.steps_per_epoch * max(epochs, key=plan.image_size_at)
    plans = rank_plans(plan, start, start + 1 + config.data.prefetch, world, micro_batch)
    try:
        with contextlib.closing(pipelines.of["train"].batches(plans)) as batches:
            batch = next(batches)
            evaluate_first()
            step.rehearse(batch)
            return True
    except (RuntimeError, UserError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # before DALI gives back what is free
        for pipeline in pipelines.of.values():
            pipeline.forget()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def full_memory_is_told() -> Iterator[None]:
    """Inside, too little memory, on a GPU above all, is a UserError."""
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
