"""One update: mix, both forward passes, loss, backward, clipping, AdamW, EMA. No I/O, no clock, no host sync."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch
from pipelines.plan import rng
from pipelines.plan.pairs import Division
from trainer.cluster.world import World
from trainer.config.sections import Config, DistillConfig
from trainer.models.checkpoint_format import OPTIMIZER_TENSORS
from trainer.models.normalize import Normalize
from trainer.models.teacher import Teachers, agreement
from trainer.state.train_state import TrainState
from trainer.update.batch_norm import StatisticsAverage
from trainer.update.compiler import Compiler, uncompiled
from trainer.update.inputs import model_inputs, student_input
from trainer.update.loss import usi_loss
from trainer.update.mixing import partners
from trainer.update.optimizer import gradient_clipping
from trainer.update.precision import resolve_precision
from trainer.update.schedule import ema_decay


class StepMetrics(NamedTuple):
    """What is known of B images after a forward pass or an update, on the device: nobody has waited for it yet.

    Attributes:
      loss: float32 scalar, mean over the images; nan after an update whose gradient is not finite, unless a GradScaler
        handles that.
      agreement: float32 [2], fractions of the images where the teacher's best class is the label, and where it is the
        student's best class (trainer/models/teacher.py); zeros without a teacher.
      bad: bool [B] in the order of the batches' rows, True where a model's logits are not finite.
    """

    loss: torch.Tensor
    agreement: torch.Tensor
    bad: torch.Tensor


class TrainStep:
    """The update of a student, `step(batches, number)`.

    Attributes:
      inputs: Batch -> ModelInputs, what the models see of it.
      teachers: what the student learns from, compiled if the student is: it maps ModelInputs.teachers to logits [B, C];
        None without a teacher. Where teachers were recorded, each batch has their targets.
      logits_cache: the teachers' logits of micro-batches by their positions, where several students learn from the same
        teachers and batches; None elsewhere.
      division: of the global batch among ranks and micro-batches.
      num_micro_batches: forward passes an update on this rank.

    Args:
      state: the student on its device, its optimizer, GradScaler and EMA; an update changes them in place.
      normalize: the student's own.
      world: the ranks; with several of them the gradients are averaged by DistributedDataParallel.
      micro_batch: the most images of a forward pass.
      compiler: compiles both models and what is computed from their outputs (trainer/update/compiler.py).
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        normalize: Normalize,
        teachers: Teachers | None,
        world: World,
        *,
        micro_batch: int,
        compiler: Compiler = uncompiled,
    ):
        self._student_input = functools.partial(student_input, normalize)
        self.inputs = functools.partial(model_inputs, normalize, teachers)
        self.teachers = compiler(teachers) if teachers is not None else None
        self.logits_cache: MutableMapping[int, torch.Tensor] | None = None
        self.division = Division(config.run.global_batch, config.augment.mix_group, world.size, micro_batch)
        self._sizes = self.division.sizes(world.rank)
        self.num_micro_batches = len(self._sizes)
        self._config = config
        self._device = world.device
        self._precision = resolve_precision(config.run.precision, world.device)
        self._student = state.student
        self._model = compiler(state.student)
        if world.size > 1:
            self._model = data_parallel(self._model)
        self._parameters = list(state.student.parameters())
        self._optimizer = state.optimizer
        self._scaler = state.scaler
        self._ema = state.ema
        self._clip = gradient_clipping(state.student, config.optim)
        # DDP averages over the ranks, as if each had as many images. A micro-batch's loss is weighted by its images.
        self._images_per_rank = config.run.global_batch / world.size
        rank_weight = sum(self._sizes) / self._images_per_rank
        sizes = self._sizes
        if config.run.batch_norm == "sync":  # Its layers see the images of all ranks.
            of_ranks = (self.division.sizes(rank) for rank in range(world.size))
            sizes = [sum(each) for each in zip(*of_ranks, strict=True)]
        self._statistics = StatisticsAverage(state.student, sizes, rank_weight, config.run.batch_norm, world)
        self._loss_and_agreement = compiler(functools.partial(loss_and_agreement, config=config.distill))

    def __call__(self, batches: Iterator[Batch], number: int) -> StepMetrics:
        """Make update `number` (the run's first is 0) from the next `num_micro_batches` batches."""
        self._optimizer.zero_grad(set_to_none=True)
        done: list[StepMetrics] = []
        # Where the input of a later micro-batch fails, the forward passes before it must leave no trace.
        several = self.num_micro_batches > 1
        undone = restored_buffers(self._student, only_after_errors=True) if several else contextlib.nullcontext()
        with undone, self._statistics.one_update():
            for micro_batch, size in enumerate(self._sizes):
                batch = next(batches)
                # Dropout depends on the position, not on the rank or on what was drawn before.
                seed_dropout(self._config.student_seed, batch.position, self._device)
                # DDP averages the gradients over the ranks with the last micro-batch only.
                is_last = micro_batch == self.num_micro_batches - 1
                waits = isinstance(self._model, DistributedDataParallel) and not is_last
                with self._model.no_sync() if waits else contextlib.nullcontext():
                    metrics = self._forward(batch, self.logits_cache)
                    self._scaler.scale(metrics.loss / (self._images_per_rank / size)).backward()
                self._statistics.end_micro_batch()
                done.append(metrics._replace(loss=metrics.loss.detach()))
        metrics = merged(done)
        if not self._scaler.is_enabled():  # A GradScaler skips an update that is not finite, and lowers its scale.
            metrics = metrics._replace(loss=torch.where(self._is_gradient_finite(), metrics.loss, torch.nan))
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)
            self._clip()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update(ema_decay(number, self._config.ema))
        return metrics

    def _forward(self, batch: Batch, logits_cache: MutableMapping[int, torch.Tensor] | None = None) -> StepMetrics:
        """Both forward passes and the loss of a micro-batch."""
        # The teachers go first, so that their activations are gone when the student's must be kept. The student's can
        # use the memory of the teachers' images, too.
        seen, teacher_logits = self._input_and_targets(batch, logits_cache)
        with torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32):
            student_logits = self._model(seen)
        return self._loss_and_agreement(student_logits, teacher_logits, batch.labels, batch.lam, batch.mix_group)

    @torch.no_grad()
    def _input_and_targets(
        self, batch: Batch, logits_cache: MutableMapping[int, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The student's images and the teachers' logits, which are computed only if the cache lacks them."""
        if self.teachers is None:
            return self._student_input(batch), None
        if logits_cache is not None and batch.position in logits_cache:
            return self._student_input(batch), logits_cache[batch.position]
        inputs = self.inputs(batch)
        logits = self.teachers(inputs.teachers)
        if logits_cache is not None:
            logits_cache[batch.position] = logits
        return inputs.student, logits

    def _is_gradient_finite(self) -> torch.Tensor:
        """Bool scalar on the device."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).isfinite().all()

    def with_blank_targets(self, batch: Batch) -> Batch:
        """The batch with meaningless outputs of recorded teachers: it is no batch of the plan."""
        recorded = self.teachers.recorded if self.teachers is not None else []
        blanks = (teacher.blank(len(batch.labels), self._device) for teacher in recorded)
        return dataclasses.replace(batch, targets=tuple(blanks))

    def warm_up(self, batch: Batch, then: Callable[[], object] = lambda: None) -> None:
        """Run forward and backward passes with the memory of an update, leaving no trace. Every rank must call it.

        Args:
          then: called while moments and gradients are still held, as between two updates.
        Raises:
          torch.OutOfMemoryError: it does not fit.
        """
        held = []
        if not self._optimizer.state:  # The optimizer allocates its tensors in the first update.
            for _ in OPTIMIZER_TENSORS:
                held += [torch.empty_like(parameter) for parameter in self._parameters]
        # The gradients of earlier micro-batches are held, too, unless DDP holds them in its buckets.
        if self.num_micro_batches > 1 and not isinstance(self._model, DistributedDataParallel):
            held += [torch.empty_like(parameter) for parameter in self._parameters]
        try:
            with restored_buffers(self._student):
                self._scaler.scale(self._forward(self.with_blank_targets(batch)).loss).backward()
                then()
        finally:
            del held
            self._optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def restored_buffers(model: torch.nn.Module, *, only_after_errors: bool = False) -> Iterator[None]:
    """Inside, forward passes may change the model's buffers, such as BatchNorm's; afterwards they are as before.

    Args:
      only_after_errors: changes are kept unless an error ends the block.
    """
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    is_kept = False
    try:
        yield
        is_kept = only_after_errors
    finally:
        if not is_kept:
            for buffer, saved in zip(buffers, before, strict=True):
                buffer.copy_(saved)


def merged(micro_batches: list[StepMetrics]) -> StepMetrics:
    """The metrics of an update with these micro-batches."""
    loss, agreement = torch.zeros_like(micro_batches[0].loss), torch.zeros_like(micro_batches[0].agreement)
    bad = torch.cat([metrics.bad for metrics in micro_batches])
    for metrics in micro_batches:
        part = len(bad) / len(metrics.bad)
        loss += metrics.loss / part
        agreement += metrics.agreement / part
    return StepMetrics(loss, agreement, bad)


def data_parallel(model: torch.nn.Module) -> DistributedDataParallel:
    """The model with its gradients averaged over the ranks.

    It has no find_unused_parameters: in timm 1.0.31 no classifier with its default arguments has a parameter without a
    gradient in training (635 models tried, of all 98 files). A few arguments make one: reg_tokens for a distilled DeiT.
    """
    # StatisticsAverage averages the buffers, so DDP must not broadcast them. Newer PyTorch has another name for that.
    parameters = inspect.signature(DistributedDataParallel).parameters
    no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, no_broadcast: False}
    return DistributedDataParallel(model, **options)


def seed_dropout(seed: int, position: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the host and of this device for the micro-batch that begins at `position`.

    torch.manual_seed would seed the generators of all devices, which takes 0.2 ms.
    """
    drawn = int(rng.words(seed, rng.Stream.MODEL, position, position + 1, 4)[0, 0])
    torch.default_generator.manual_seed(drawn)
    if device.type == "cuda":
        torch.cuda.manual_seed(drawn)


def loss_and_agreement(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    lam: torch.Tensor,
    mix_group: int,
    config: DistillConfig,
) -> StepMetrics:
    """The loss of logits [B, C], and how the student and the teacher agree."""
    partner_labels = partners(labels, mix_group)
    loss = usi_loss(student, teacher, labels, partner_labels, lam, config)
    bad = ~student.detach().isfinite().all(1)
    if teacher is None:
        return StepMetrics(loss, torch.zeros(2, device=student.device), bad)
    fractions = agreement(student.detach(), teacher, labels, partner_labels, lam)
    return StepMetrics(loss, fractions, bad | ~teacher.isfinite().all(1))


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
