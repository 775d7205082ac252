"""One update: mix, student and teacher forward, loss, backward, AdamW, averages. No I/O, no clock, no host sync."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines import rng
from pipelines.batch import Batch
from trainer.config import DistillConfig
from trainer.distributed import World
from trainer.losses import usi_loss
from trainer.mix import Normalize, mix_pixels, partners
from trainer.optim import ModelEma, batch_norms, running_statistics


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What an update tells, on the device: nobody has waited for it yet.

    Attributes:
      loss: float32 scalar, mean over this rank's images.
      bad: bool [images of this rank], in the order of their positions: where a model's output is not finite.
    """

    loss: torch.Tensor
    bad: torch.Tensor


class TrainStep:
    """The update of a student, `step(batches, number)`, made once a run.

    Args:
      student: the unwrapped model on its device.
      teacher: frozen, in evaluation mode; None trains on the labels alone.
      normalize_student, normalize_teacher: each model's own, from uint8 pixels.
      optimizer: over the student's parameters.
      scaler: a GradScaler, enabled for fp16 alone.
      ema: the average that follows the student, or None.
      distill: the loss.
      precision: of the forward passes.
      seed: of dropout and the like.
      micro_batches: forward passes an update on this rank.
      world: the ranks.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        normalize_student: Normalize,
        normalize_teacher: Normalize | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: ModelEma | None,
        distill: DistillConfig,
        precision: torch.dtype,
        seed: int,
        micro_batches: int,
        world: World,
    ):
        self._model = student
        self._device = world.device
        if world.size > 1:
            # Statistics are averaged below instead of broadcast; newer PyTorch has another name for that.
            named = inspect.signature(DistributedDataParallel).parameters
            no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
            # No find_unused_parameters: in timm 1.0.31 no classifier as it comes has a parameter without a gradient in
            # training (635 models tried, of all 98 files). A few arguments make one: reg_tokens for a distilled DeiT.
            self._model = DistributedDataParallel(student, gradient_as_bucket_view=True, **{no_broadcast: False})
        self._statistics = StatisticsAverage(student, micro_batches, world)
        self._teacher = teacher
        self._normalize_student = normalize_student
        self._normalize_teacher = normalize_teacher
        self._optimizer = optimizer
        self._scaler = scaler
        self._ema = ema
        self._distill = distill
        self._precision = precision
        self._seed = seed
        self._micro_batches = micro_batches

    def __call__(self, batches: Iterator[Batch], number: int) -> StepMetrics:
        """Update `number` (the run's first is 0) from the next `micro_batches` batches."""
        self._optimizer.zero_grad(set_to_none=True)
        total, bad = torch.zeros((), device=self._device), []
        self._statistics.begin()
        for micro_batch in range(self._micro_batches):
            batch = next(batches)
            # Dropout depends on the position, not on the rank or on what was drawn before.
            torch.manual_seed(int(rng.words(self._seed, rng.Stream.MODEL, batch.position, batch.position + 1, 4)[0, 0]))
            last = micro_batch == self._micro_batches - 1
            with self._no_sync(not last):
                loss, bad_rows = self._loss(batch)
                loss = loss / self._micro_batches
                self._scaler.scale(loss).backward()
            self._statistics.collect()
            total += loss.detach()
            bad.append(bad_rows)
        self._statistics.end()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update()
        return StepMetrics(total, torch.cat(bad))

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and which rows are bad."""
        pixels = mix_pixels(batch)
        with torch.autocast(pixels.device.type, self._precision, enabled=self._precision != torch.float32):
            student = self._model(self._normalize_student(pixels))
            teacher = None
            if self._teacher is not None:
                with torch.no_grad():
                    teacher = self._teacher(self._normalize_teacher(pixels))
        labels = batch.labels
        loss = usi_loss(student, teacher, labels, partners(labels, batch.mix_group), batch.lam, self._distill)
        bad = ~_finite_rows(student.detach())
        if teacher is not None:
            bad |= ~_finite_rows(teacher)
        return loss, bad

    def _no_sync(self, skip: bool) -> contextlib.AbstractContextManager:
        if skip and isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return contextlib.nullcontext()


def _finite_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits.isfinite().all(1)


class StatisticsAverage:
    """BatchNorm's running statistics after an update: the mean over all its micro-batches, on whatever rank they ran.

    Each micro-batch starts from the statistics before the update, and the results are averaged. So all ranks always
    hold the same statistics, and they do not depend on how the global batch was split over ranks and micro-batches.
    (DDP's own broadcast would keep those of rank 0's images alone.)

    Args:
      model: the unwrapped model.
      micro_batches: an update, on this rank.
      world: the ranks.
    """

    def __init__(self, model: nn.Module, micro_batches: int, world: World):
        self._statistics = running_statistics(model)
        self._counters = [norm.num_batches_tracked for norm in batch_norms(model)]
        self._micro_batches = micro_batches
        self._count = micro_batches * world.size
        self._split = bool(self._statistics) and micro_batches > 1
        self._active = bool(self._statistics) and self._count > 1
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
        """After the last pass: every rank holds the mean."""
        if not self._active:
            return
        total = self._total if self._split else self._statistics
        if self._split:  # an update counts as one batch, however it was split
            torch._foreach_sub_(self._counters, self._micro_batches - 1)
        flat = self._world.sum(torch.cat(total)) / self._count
        torch._foreach_copy_(self._statistics, list(flat.split([len(buffer) for buffer in self._statistics])))
