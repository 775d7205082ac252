"""One update: mix, student and teacher forward, loss, backward, AdamW, averages. No I/O, no clock, no host sync."""

import contextlib
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
from trainer.optim import ModelEma


class TrainStep:
    """The update of a student, `step(batches)`, made once a run.

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
        if world.size > 1:
            # Buffers are averaged below instead of broadcast.
            self._model = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._buffers = BufferAverage(student, micro_batches, world)
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

    def __call__(self, batches: Iterator[Batch]) -> torch.Tensor:
        """One update from the next `micro_batches` batches.

        Returns:
          The loss, mean over this rank's images: float32 scalar on the device.
        """
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._buffers.device)
        self._buffers.begin()
        for micro_batch in range(self._micro_batches):
            batch = next(batches)
            # Dropout depends on the position, not on the rank or on what was drawn before.
            torch.manual_seed(int(rng.words(self._seed, rng.Stream.MODEL, batch.position, batch.position + 1, 4)[0, 0]))
            last = micro_batch == self._micro_batches - 1
            with self._no_sync(not last):
                loss = self._loss(batch) / self._micro_batches
                self._scaler.scale(loss).backward()
            self._buffers.collect()
            total += loss.detach()
        self._buffers.end()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update()
        return total

    def _loss(self, batch: Batch) -> torch.Tensor:
        pixels = mix_pixels(batch)
        with torch.autocast(pixels.device.type, self._precision, enabled=self._precision != torch.float32):
            student = self._model(self._normalize_student(pixels))
            teacher = None
            if self._teacher is not None:
                with torch.no_grad():
                    teacher = self._teacher(self._normalize_teacher(pixels))
        labels = batch.labels
        return usi_loss(student, teacher, labels, partners(labels, batch.mix_group), batch.lam, self._distill)

    def _no_sync(self, skip: bool) -> contextlib.AbstractContextManager:
        if skip and isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return contextlib.nullcontext()


class BufferAverage:
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
        self.device = next(model.parameters()).device
        self._floating = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._others = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
        self._count = micro_batches * world.size
        self._micro_batches = micro_batches
        self._world = world
        self._active = self._count > 1 and bool(self._floating)

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first forward pass of an update."""
        if self._active and self._micro_batches > 1:
            self._before = [buffer.clone() for buffer in self._floating]
            self._others_before = [buffer.clone() for buffer in self._others]
            self._total = [torch.zeros_like(buffer) for buffer in self._floating]

    @torch.no_grad()
    def collect(self) -> None:
        """After each forward and backward pass."""
        if self._active and self._micro_batches > 1:
            torch._foreach_add_(self._total, self._floating)
            torch._foreach_copy_(self._floating, self._before)
            self._others_after = [buffer.clone() for buffer in self._others]
            for buffer, before in zip(self._others, self._others_before, strict=True):
                buffer.copy_(before)

    @torch.no_grad()
    def end(self) -> None:
        """After the last pass: every rank holds the mean."""
        if not self._active:
            return
        if self._micro_batches > 1:
            for buffer, after in zip(self._others, self._others_after, strict=True):
                buffer.copy_(after)
        total = self._total if self._micro_batches > 1 else self._floating
        flat = self._world.sum(torch.cat([buffer.flatten() for buffer in total])) / self._count
        parts = flat.split([buffer.numel() for buffer in self._floating])
        torch._foreach_copy_(self._floating, [p.view_as(b) for p, b in zip(parts, self._floating, strict=True)])
