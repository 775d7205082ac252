"""One update: mix, both forward passes, loss, backward, clipping, AdamW, averages. No I/O, no clock, no host sync."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch
from pipelines.plan import rng
from trainer.cluster.world import World
from trainer.config.sections import DistillConfig
from trainer.models.teacher import Teachers, agreement, model_inputs
from trainer.update.compiler import Compiler, uncompiled
from trainer.update.loss import usi_loss
from trainer.update.mixing import Normalize, partners
from trainer.update.optimizer import ModelEma, batch_norms, running_statistics


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What an update tells, on the device: nobody has waited for it yet.

    Attributes:
      loss: float32 scalar, mean over this rank's images.
      bad: bool [images of this rank], in the order of their positions: where a model's output is not finite.
      bad_gradients: bool scalar, whether the gradient is not finite; False where a GradScaler looks after that.
      teacher_top1, agreement: float32 scalars, shares of this rank's images where the teacher's best class is the
        label, and where it is the student's best (trainer/models/teacher.py); 0 without a teacher.
      teacher_pairs: int32 [2, images of this rank], of each image the label and the teacher's best class; [2, 0]
        without a teacher.
    """

    loss: torch.Tensor
    bad: torch.Tensor
    bad_gradients: torch.Tensor
    teacher_top1: torch.Tensor
    agreement: torch.Tensor
    teacher_pairs: torch.Tensor


class TrainStep:
    """The update of a student, `step(batches, number)`, made once a run.

    Attributes:
      inputs: gives what the student sees of a Batch, and the list of what each teacher sees.
      teacher: from that list to logits, as compiled; None without one.

    Args:
      student: the unwrapped model on its device.
      teacher: trainer/models/teacher.py; None trains on the labels alone.
      normalize: the student's own, from uint8 pixels.
      optimizer: over the student's parameters.
      scaler: a GradScaler, enabled for fp16 alone.
      clip: clips the student's gradients in place, or None.
      ema: the average that follows the student, or None.
      ema_decay: the average's decay, from the number of the update.
      distill: the loss.
      precision: of the forward passes.
      seed: of dropout and the like.
      micro_batches: forward passes an update on this rank.
      batch_norm: which running statistics an update ends with, as run.batch_norm.
      world: the ranks.
      compiler: of both models and of what is computed from their outputs (trainer/update/compiler.py).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teachers | None,
        *,
        normalize: Normalize,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip: Callable[[], object] | None,
        ema: ModelEma | None,
        ema_decay: Callable[[int], float],
        distill: DistillConfig,
        precision: torch.dtype,
        seed: int,
        micro_batches: int,
        batch_norm: str,
        world: World,
        compiler: Compiler = uncompiled,
    ):
        self._student = student
        self._parameters = list(student.parameters())
        self._model = compiler(student)
        self._device = world.device
        if world.size > 1:
            # Statistics are averaged below instead of broadcast; newer PyTorch has another name for that.
            named = inspect.signature(DistributedDataParallel).parameters
            no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
            # No find_unused_parameters: in timm 1.0.31 no classifier as it comes has a parameter without a gradient in
            # training (635 models tried, of all 98 files). A few arguments make one: reg_tokens for a distilled DeiT.
            self._model = DistributedDataParallel(self._model, gradient_as_bucket_view=True, **{no_broadcast: False})
        self._statistics = StatisticsAverage(student, micro_batches, batch_norm, world)
        self._local = []
        if batch_norm == "none" and world.size > 1:
            self._local = running_statistics(student) + (running_statistics(ema.module) if ema else [])
        self.inputs = functools.partial(model_inputs, normalize=normalize, teachers=teacher)
        self.teacher = compiler(teacher) if teacher is not None else None
        self._loss_and_agreement = compiler(functools.partial(loss_and_agreement, config=distill))
        self._optimizer = optimizer
        self._scaler = scaler
        self._clip = clip
        self._ema = ema
        self._ema_decay = ema_decay
        self._precision = precision
        self._seed = seed
        self._micro_batches = micro_batches

    def __call__(self, batches: Iterator[Batch], number: int) -> StepMetrics:
        """Update `number` (the run's first is 0) from the next `micro_batches` batches."""
        self._optimizer.zero_grad(set_to_none=True)
        total, bad, agreed = torch.zeros((), device=self._device), [], torch.zeros(2, device=self._device)
        pairs = []
        self._statistics.begin()
        for micro_batch in range(self._micro_batches):
            batch = next(batches)
            # Dropout depends on the position, not on the rank or on what was drawn before.
            self._seed_models(batch.position)
            last = micro_batch == self._micro_batches - 1
            with self._no_sync(not last):
                loss, bad_rows, shares, teacher_pairs = self._loss(batch)
                loss = loss / self._micro_batches
                self._scaler.scale(loss).backward()
            self._statistics.collect()
            total += loss.detach()
            bad.append(bad_rows)
            agreed += shares / self._micro_batches
            pairs.append(teacher_pairs)
        self._statistics.end()
        bad_gradients = self._bad_gradients()
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)
            self._clip()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update(self._ema_decay(number))
        return StepMetrics(total, torch.cat(bad), bad_gradients, *agreed.unbind(), torch.cat(pairs, 1))

    @property
    def micro_batches(self) -> int:
        """Forward passes an update on this rank."""
        return self._micro_batches

    def _seed_models(self, position: int) -> None:
        """Set PyTorch's generators of the host and of this device; torch.manual_seed sets all there are, in 0.2 ms."""
        seed = int(rng.words(self._seed, rng.Stream.MODEL, position, position + 1, 4)[0, 0])
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _bad_gradients(self) -> torch.Tensor:
        """Whether a gradient is not finite: bool scalar on the device."""
        if self._scaler.is_enabled():  # leaves such an update out, and tries a smaller scale
            return torch.zeros((), dtype=torch.bool, device=self._device)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()

    def local_statistics(self) -> list[torch.Tensor] | None:
        """This rank's running statistics where ranks differ (run.batch_norm none, several ranks), else None.

        Returns:
          copies on the device: the student's, then those of its average if there is one. A checkpoint must hold every
          rank's, for the student's own state is that of one rank.
        """
        return [values.clone() for values in self._local] or None

    @torch.no_grad()
    def set_local_statistics(self, statistics: list[torch.Tensor]) -> None:
        """Go on from what `local_statistics` gave on this rank.

        To be called after this step was made (DDP gives all ranks the buffers of rank 0 then), and where
        `local_statistics` is not None. An average that has been switched on since begins with the student's.
        """
        # [student, average], or the student's alone, on either side
        for ours, theirs in zip(self._local, statistics * 2, strict=False):
            ours.copy_(theirs)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `loss_and_agreement`."""
        with torch.no_grad():
            inputs, teachers_inputs = self.inputs(batch)
            # before the student, so that their activations are gone when the student's must be kept
            teacher = self.teacher(teachers_inputs) if self.teacher is not None else None
            del teachers_inputs  # the memory is the student's, too
        with torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32):
            student = self._model(inputs)
        return self._loss_and_agreement(student, teacher, batch.labels, batch.lam, batch.mix_group)

    def warm_up(self, batch: Batch, then: Callable[[], object] = lambda: None) -> None:
        """Forward and backward passes of a batch, with the memory of an update, that leave no trace. On every rank.

        Args:
          then: called while moments and gradients are still held, as between two updates.
        Raises:
          torch.OutOfMemoryError: it does not fit.
        """
        buffers = list(self._student.buffers())
        before = [buffer.clone() for buffer in buffers]
        held = [] if self._optimizer.state else [torch.empty_like(p) for p in self._parameters for _ in "mv"]
        # the gradients of earlier micro-batches; DDP holds them in its buckets
        if self._micro_batches > 1 and not isinstance(self._model, DistributedDataParallel):
            held += [torch.empty_like(p) for p in self._parameters]
        try:
            self._scaler.scale(self._loss(batch)[0]).backward()
            then()
        finally:
            del held
            self._optimizer.zero_grad(set_to_none=True)
            for buffer, saved in zip(buffers, before, strict=True):
                buffer.copy_(saved)

    def _no_sync(self, skip: bool) -> contextlib.AbstractContextManager:
        if skip and isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return contextlib.nullcontext()


def loss_and_agreement(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    lam: torch.Tensor,
    mix_group: int,
    config: DistillConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of logits [B, C]; bad rows, the two shares of agreement and the teacher's pairs as in StepMetrics."""
    targets = labels, partners(labels, mix_group), lam
    loss = usi_loss(student, teacher, *targets, config)
    bad, agreed = ~_finite_rows(student.detach()), torch.zeros(2, device=student.device)
    pairs = torch.zeros(2, 0, dtype=torch.int32, device=student.device)
    if teacher is not None:
        bad = bad | ~_finite_rows(teacher)
        agreed, pairs = agreement(student.detach(), teacher, *targets)
    return loss, bad, agreed, pairs


def gray_batch(num_images: int, size: int, mix_group: int, device: torch.device) -> Batch:
    """Images without content, to warm up with: uint8 [num_images, size, size, 3], in groups as a real batch is."""
    return Batch(
        images=torch.full((num_images, size, size, 3), 128, dtype=torch.uint8, device=device),
        labels=torch.zeros(num_images, dtype=torch.int64, device=device),
        lam=torch.ones(num_images, device=device),
        box=torch.zeros(num_images, 4, dtype=torch.int32, device=device),
        valid=torch.ones(num_images, dtype=torch.bool, device=device),
        position=0,
        mix_group=mix_group,
    )


def _finite_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits.isfinite().all(1)


class StatisticsAverage:
    """BatchNorm's running statistics after an update: those of all its micro-batches, on whatever rank they ran.

    Each micro-batch starts from the statistics before the update, and the results are averaged on each rank. Then the
    ranks come to an agreement, by the mode:
      reduce: the mean over the ranks. So all ranks always hold the same statistics, and they do not depend on how the
        global batch was split over ranks and micro-batches.
      broadcast: those of rank 0's images, as DDP's own broadcast has it.
      none: there is none, each rank keeps its own.
      sync: nothing to do, for the layers themselves saw the images of all ranks.

    Args:
      model: the unwrapped model.
      micro_batches: an update, on this rank.
      mode: reduce, broadcast, none or sync.
      world: the ranks.
    """

    def __init__(self, model: nn.Module, micro_batches: int, mode: str, world: World):
        self._statistics = running_statistics(model)
        self._counters = [norm.num_batches_tracked for norm in batch_norms(model)]
        self._micro_batches = micro_batches
        self._split = bool(self._statistics) and micro_batches > 1
        self._shared = bool(self._statistics) and world.size > 1 and mode in ("reduce", "broadcast")
        self._mode = mode
        self._world = world

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first forward pass of an update."""
        if self._split:
            self._before = [buffer.clone() for buffer in self._statistics]
            self._total = [torch.zeros_like(buffer) for buffer in self._statistics]

    @torch.no_grad()
    def collect(self) -> None:
        """After each forward and backward pass."""
        if self._split:
            torch._foreach_add_(self._total, self._statistics)
            torch._foreach_copy_(self._statistics, self._before)

    @torch.no_grad()
    def end(self) -> None:
        """After the last pass."""
        if self._split:
            # an update counts as one batch, however it was split
            torch._foreach_sub_(self._counters, self._micro_batches - 1)
            torch._foreach_div_(self._total, self._micro_batches)
            torch._foreach_copy_(self._statistics, self._total)
        if self._shared:
            flat = torch.cat(self._statistics)
            flat = (
                self._world.all_reduce_sum(flat) / self._world.size
                if self._mode == "reduce"
                else self._world.broadcast(flat)
            )
            torch._foreach_copy_(self._statistics, list(flat.split([len(buffer) for buffer in self._statistics])))
