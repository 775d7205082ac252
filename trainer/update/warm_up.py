"""Makes the update ready before the first step: it is compiled, and DDP's buckets have their final arrangement."""

import time
from collections.abc import Callable

from torch._dynamo.exc import TorchDynamoException

from pipelines.common.errors import UserError
from pipelines.plan.plan import TrainPlan
from trainer.cluster.world import World
from trainer.config.sections import Config
from trainer.state.train_state import TrainState
from trainer.update.compiler import COMPILE_PATIENCE_S, Compiler, uncompiled
from trainer.update.step import TrainStep, gray_batch


def warmed_up_step(
    make_step: Callable[..., TrainStep],
    config: Config,
    plan: TrainPlan,
    state: TrainState,
    world: World,
    compiler: Compiler,
) -> tuple[TrainStep, str]:
    """The update, warmed up where it needs that, and a note for the user, which may be "".

    DDP arranges its buckets again after the first backward pass. The order in which gradients are summed depends on
    them, so without a warm-up a run that is resumed would differ from one that was never stopped. A compiler compiles
    for the batches of the present epoch, before the run begins.

    Raises:
      UserError: it cannot be compiled though run.compile is true.
    """
    size, note = plan.image_size_at(state.step // plan.steps_per_epoch), ""
    if compiler is not uncompiled:
        world.heartbeat("compiling", COMPILE_PATIENCE_S)
        start_s = time.perf_counter()
        try:
            step = make_step(world, micro_batch=state.micro_batch, compiler=compiler)
            for num_images in step.division.all_sizes:  # All ranks must make the same passes.
                group = config.augment.mix_group if step.division.has_whole_groups else num_images
                step.warm_up(gray_batch(num_images, size, group, world.device))
            return step, f"compiled in {time.perf_counter() - start_s:.0f} s"
        except TorchDynamoException as error:
            reason = f"{config.student.name} or its teacher cannot be compiled ({' '.join(str(error).split())[:300]})"
            if config.run.compile != "auto":
                raise UserError(f"run.compile is true, and {reason}. Use --run.compile false") from error
        step, note = None, f"run.compile auto: not compiled, {reason}"  # Its memory, with the buckets of DDP, is freed.
    step = make_step(world, micro_batch=state.micro_batch)
    if world.size > 1:
        step.warm_up(gray_batch(2, size, 2, world.device))  # Two images are the smallest mixing group.
    return step, note
