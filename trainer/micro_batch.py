"""The micro-batch: whether the configured one divides the global batch, and the largest that fits, found by trying."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator

import torch

from pipelines.common.errors import UserError
from pipelines.plan.pairs import Division
from pipelines.plan.plan import BatchPlan, TrainPlan
from trainer.cluster.memory import is_out_of_memory
from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.feed import Pipelines, batches_of, rank_plans
from trainer.state.train_state import TrainState
from trainer.update.step import TrainStep


def resolve_micro_batch(config: Config, world: World) -> int:
    """The micro-batch, after checking that the global batch can be divided.

    It is one group where the configuration leaves it open; `choose_micro_batch` may then find a larger one.
    """
    group, total, wanted = config.augment.mix_group, config.run.global_batch, config.run.micro_batch
    if total % group:
        raise UserError(
            f"run.global_batch is {total}; it must be a multiple of augment.mix_group, {group}. Change one of them"
        )
    is_whole = Division(total, group, world.size).has_whole_groups
    default = group if is_whole else max(2, group - group % 2)
    micro_batch = default if wanted in ("auto", 0) else int(wanted)
    if micro_batch % 2 and (micro_batch % group or not is_whole):
        raise UserError(f"run.micro_batch is {wanted}; give an even number, because images are mixed in pairs")
    division = Division(total, group, world.size, micro_batch)
    if config.run.batch_norm == "sync" and len({len(division.sizes(rank)) for rank in range(world.size)}) > 1:
        raise UserError(
            f"run.micro_batch is {micro_batch}, too small for run.batch_norm sync with this number of ranks, which "
            "would make different numbers of forward passes. Give 4 or more"
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
    """Set `state.micro_batch`. Returns a sentence about the choice where the configuration leaves it open, else "".

    A run that is resumed keeps its own, because BatchNorm depends on it. A GPU gets the largest that fits; a CPU gets
    one group, because more would not be faster.

    Args:
      make_step: makes the update of a world and a `micro_batch`, not compiled: that takes long and no more memory.
      evaluate: evaluates the first validation images, if there are any, on this rank alone.
    Raises:
      UserError: not even one pair of images fits.
    """
    if config.run.micro_batch != "auto":
        state.micro_batch = resolve_micro_batch(config, world)
        return ""
    if state.micro_batch:
        return f"run.micro_batch auto: {state.micro_batch}, as before"
    if world.device.type != "cuda":
        state.micro_batch = resolve_micro_batch(config, world)
        return f"run.micro_batch auto: {state.micro_batch}, one group, on a CPU"
    rank_batch = max(plan.division(world.size).all_sizes)

    def fits(micro_batch: int) -> bool:
        # One rank may fail alone, so the ranks must not communicate.
        step = make_step(world.by_itself(), micro_batch=micro_batch)
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

    state.micro_batch = largest_micro_batch(rank_batch, world, fits)
    return f"run.micro_batch auto: {state.micro_batch}, the largest that fits of a rank's {rank_batch} images"


def largest_micro_batch(rank_batch: int, world: World, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits on every rank, of those that divide a rank's images into equal ones.

    The number of micro-batches is doubled until they fit, then bisected.

    Args:
      rank_batch: the most images of a rank in an update.
      fits: tries one on this rank, which takes seconds. It is called for the same sizes on all ranks.
    Raises:
      UserError: not even one pair of images fits.
    """

    def size(number: int) -> int:
        return 2 * -(-rank_batch // (2 * number))

    @functools.cache
    def all_fit(micro_batch: int) -> bool:
        lacking = torch.tensor(int(not fits(micro_batch)), device=world.device)
        return not world.all_reduce_sum(lacking).item()

    number = 1
    while not all_fit(size(number)):
        if size(number) == 2:
            raise UserError(
                "run.micro_batch auto: not even two images fit into the GPU's memory. Lower run.eval_batch, "
                "data.image_size or data.prefetch, or use a smaller model"
            )
        number *= 2
    too_few = number // 2
    while number - too_few > 1:
        between = (number + too_few) // 2
        if all_fit(size(between)):
            number = between
        else:
            too_few = between
    return size(number)


def largest_plans(config: Config, plan: TrainPlan, world: World, micro_batch: int) -> Iterator[BatchPlan]:
    """The micro-batches that need the most memory of a run: where images become largest, and the one before.

    DALI allocates beside PyTorch. At that point it holds the graphs of both image sizes, and from the first evaluation
    on that of the validation images.
    """
    start = plan.steps_per_epoch * max(range(config.schedule.total_epochs), key=plan.image_size_at)
    before = list(rank_plans(plan, max(start - 1, 0), max(start, 1), world, micro_batch))[-1:]
    return itertools.chain(before, rank_plans(plan, start, start + 1 + config.data.prefetch, world, micro_batch))


@contextlib.contextmanager
def reporting_out_of_memory(
    advice: str = "Lower run.micro_batch, or run.eval_batch in an evaluation, as far as that goes; else data.prefetch "
    "or data.image_size, or use a smaller model",
) -> Iterator[None]:
    """Inside, too little memory is a UserError, which ends with the advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{reason}. {advice}") from error
