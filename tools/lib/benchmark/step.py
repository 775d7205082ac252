"""One update on synthetic images: ours, a step written from timm's own pieces, and the models alone.

What makes the rows of a table comparable:

- They make the same number of updates in turn, each until the device has finished, after updates that do not count:
  kernels are chosen and models compiled by then.
- All see the same uint8 images, which lie on the device already, and train the same models with the same weights of the
  teacher, loss, optimizer and decay of the EMA.
- "ours" is the update of a run that was built like any other, with its mixing and its EMA, fed by the plan through the
  synthetic pipeline. "ours, whole loop" is the same run's loop with its log, progress and questions to the ranks,
  between two checkpoints: the rate is its own log's.
- "timm-style" is what timm's training script does with its own parts: PrefetchLoader normalises on the device, a task
  gives the loss (LogitDistillationTask, or ClassificationTask without a teacher), create_optimizer_v2 the optimizer,
  ModelEmaV3 the EMA, task.compile() compiles. With --channels-last, cuDNN's search on and automatic mixed
  precision. What favours it: its batches are mixed already, since FastCollateMixup does that in the loader's workers,
  the teacher is channels-last, too, and the loss is never read.
- "models alone" is the forward pass of the student (and the teacher), loss, backward pass and the optimizer's step, of
  the same modules as ours, on pixels that are normalised already. "overhead" is the fraction of a row's time beyond
  that.
- Memory is the peak of what a row allocates besides the others' models, after its updates are under way; the GPU's
  alone is measured.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from pipelines.batch import Batch
from pipelines.common.errors import UserError
from pipelines.common.files import read_json_lines
from tools.lib.benchmark.results import Measured, Row
from tools.lib.benchmark.runs import (
    CLASSES,
    LAST,
    Setting,
    compiled_or_not,
    open_run,
    random_weights,
    release_memory,
    resolve,
    teacher_or_none,
    updates_per_timed_run,
)
from tools.lib.common.hardware import first_device
from tools.lib.common.terminal import one_line
from tools.lib.common.timing import interleaved, ratio, speeds, timed_on_device
from trainer import loop
from trainer.builder import Run
from trainer.feed import batches_of, rank_plans
from trainer.models.factory import create_model
from trainer.models.files.weights import read_weights
from trainer.models.preprocessing import preprocessing
from trainer.monitor.run_files import METRICS
from trainer.state.writer import Writer
from trainer.update.compiler import compiled, uncompiled
from trainer.update.loss import usi_loss
from trainer.update.mixing import partners

if TYPE_CHECKING:  # A timm without tasks is a row that says so.
    from timm.task import TrainingTask

COLUMNS = {
    "what": "what",
    "images_per_s": "images/s",
    "min": "min",
    "max": "max",
    "ms": "ms an update",
    "peak_mib": "MiB",
    "ratio": "ratio",
    "of": "of",
    "overhead": "overhead",
}
OURS, LOOP, TIMM, ALONE = "ours", "ours, whole loop", "timm-style", "models alone"
_WARM_UP = 3  # Nothing is compiled or chosen any more after this many updates.


def step(
    models: tuple[str, ...],
    teacher: str,
    batch: int,
    size: int,
    precision: str,
    compile: str,
    repeats: int,
    seconds: float,
) -> Iterator[Row]:
    """The rows: each model from the teacher and alone, compiled and then not, as far as `compile` asks for it.

    Args:
      teacher: of all models; null measures the models only alone.
      precision: auto, bf16 or fp32.
      compile: no, yes or both.
      seconds: about how long a timed run takes.
    Raises:
      UserError: unknown words, or models that cannot be built.
    """
    precision = resolve(precision, first_device())
    if batch % 2:
        raise UserError(f"--batch is {batch}: timm mixes images in pairs. Give an even number")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        name = teacher_or_none(teacher)
        weights = random_weights(name, CLASSES, size, folder) if name else None
        taught = [(name, weights), (None, None)] if name else [(None, None)]
        for is_compiled, model, (teacher_name, file) in itertools.product(compiled_or_not(compile), models, taught):
            setting = Setting(model, teacher_name, file, batch, size, precision, is_compiled)
            with tempfile.TemporaryDirectory(dir=folder) as out:
                yield from _rows(setting, Path(out), repeats, seconds)
            release_memory()


def _rows(setting: Setting, out: Path, repeats: int, seconds: float) -> list[Row]:
    """A table: the updates of all candidates in turn."""
    ours, ours_mib = _warm(lambda: Ours(setting, out))
    batch = ours.first_batch()
    updates = updates_per_timed_run(ours.update, seconds)
    rows: dict[str, Row] = {who: {"what": who, **setting.described()} for who in (OURS, LOOP, TIMM, ALONE)}
    rows[OURS]["peak_mib"] = ours_mib
    alone, _ = _warm(lambda: ModelsAlone(setting, ours.run, batch))
    candidates = {
        OURS: functools.partial(_seconds, ours.update, updates),
        LOOP: functools.partial(ours.loop_seconds, updates),
        ALONE: functools.partial(_seconds, alone.update, updates),
    }
    try:
        timm_style, timm_mib = _warm(lambda: TimmStyle(setting, ours.run, batch))
    except Exception as error:  # This timm has other tasks or none, lacks memory, or cannot compile the model.
        rows[TIMM]["note"] = f"not measured, {type(error).__name__}: {one_line(error)}"
    else:
        rows[TIMM]["peak_mib"] = timm_mib
        candidates[TIMM] = functools.partial(_seconds, timm_style.update, updates)
    seconds_of = interleaved(candidates, repeats, warm_up=False)
    for who, times in seconds_of.items():
        rows[who] = {**rows[who], **_measured(updates, setting.batch, times), **_compared(who, seconds_of)}
    return list(rows.values())


def _measured(updates: int, batch: int, times: list[float]) -> Measured:
    return {
        **speeds(updates * batch, times, 1),
        "ms": round(1000 * statistics.median(times) / updates, 2),
        "updates": updates,
    }


def _compared(who: str, seconds_of: dict[str, list[float]]) -> Measured:
    """The speed over the timm-style update's, and the fraction of the time that is not the models'."""
    found: Measured = {}
    if TIMM in seconds_of:
        found = {"ratio": ratio(seconds_of[TIMM], seconds_of[who]), "of": TIMM}
    if who != ALONE:
        neighbours = zip(seconds_of[ALONE], seconds_of[who], strict=True)
        found["overhead"] = round(statistics.median(1 - alone / own for alone, own in neighbours), 3)
    return found


class Updating(Protocol):
    """A candidate: it makes one update when asked."""

    def update(self) -> None:
        """Make one update."""
        ...


Candidate = TypeVar("Candidate", bound=Updating)


def _warm(make: Callable[[], Candidate]) -> tuple[Candidate, int | None]:
    """Make a candidate and warm it up. Returns it and its peak memory in MiB, None on a CPU.

    Memory counts from before the candidate is made, so that of the others does not.
    """
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    made = make()
    _seconds(made.update, _WARM_UP)
    if not on_gpu:
        return made, None
    torch.cuda.reset_peak_memory_stats()
    _seconds(made.update, 1)
    return made, round((torch.cuda.max_memory_allocated() - before) / 2**20)


def _seconds(update: Callable[[], object], updates: int) -> float:
    """Seconds until the device has finished this many updates."""

    def run() -> None:
        for _ in range(updates):
            update()

    return timed_on_device(run)()


# --- the candidates ---


class Ours:
    """The update and the loop of a run in `out`."""

    def __init__(self, setting: Setting, out: Path):
        self.run = open_run(setting, out)
        self._batches = self._batches_from(0)
        self._numbers = itertools.count()

    def _batches_from(self, step: int) -> Generator[Batch, None, None]:
        run = self.run
        plans = rank_plans(run.plan, step, LAST, run.world, run.state.micro_batch)
        return batches_of(run.pipelines.of["train"], plans)

    def first_batch(self) -> Batch:
        """The batch of the first update."""
        with contextlib.closing(self._batches_from(0)) as batches:
            return next(batches)

    def update(self) -> None:
        """Make one update of the run."""
        self.run.step(self._batches, next(self._numbers))

    def loop_seconds(self, updates: int) -> float:
        """Seconds for `updates` of the loop, by the second line of its log; the first line covers its start."""
        run = self.run
        changed = dataclasses.replace(run.config.run, log_every=updates, stop_after_steps=2 * updates)
        run.config = dataclasses.replace(run.config, run=changed)
        run.state.step = 0
        run.checkpoints.writer = Discarding()
        with contextlib.redirect_stdout(io.StringIO()):
            monitor = loop.make_monitor(run)
            with monitor.session():
                loop.updates(run, monitor)
        lines = [line for line in read_json_lines(run.config.run.out / METRICS) if line["kind"] == "train"]
        assert lines[-1]["step"] == 2 * updates, lines
        return updates * run.config.run.global_batch / lines[-1]["images_per_s"]


class Discarding(Writer):
    """Stands for a run's writer of checkpoints: a timed loop ends with one, which nobody measures or reads."""

    def submit(self, path: Path, content: dict, then: Callable[[], None] = lambda: None) -> None:
        """Write nothing."""

    def wait(self) -> None:
        """There is nothing to wait for."""


class ModelsAlone:
    """The models' own part of a run's update."""

    def __init__(self, setting: Setting, run: Run, batch: Batch):
        compiler = compiled if setting.compiled else uncompiled
        self._student, self._loss = compiler(run.state.student), compiler(usi_loss)
        self._teacher = run.step.teacher  # It is the run's own, folded and compiled.
        self._optimizer = run.state.optimizer
        self._autocast = _autocast(setting, run.world.device)
        centred = (batch.images.float() / 255 - 0.5) / 0.25
        self._pixels = centred.permute(0, 3, 1, 2).to(setting.dtype)  # channels-last
        self._targets = batch.labels, partners(batch.labels, batch.mix_group), batch.lam, run.config.distill

    def update(self) -> None:
        """Make one update of the student."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            teacher = self._teacher([self._pixels]) if self._teacher is not None else None
        with self._autocast():
            student = self._student(self._pixels)
        self._loss(student, teacher, *self._targets).backward()
        self._optimizer.step()


class TimmStyle:
    """An update as timm's training script makes it from timm's own parts, with the settings of one of our runs."""

    def __init__(self, setting: Setting, run: Run, batch: Batch):
        from timm.data import FastCollateMixup
        from timm.data.loader import PrefetchLoader
        from timm.optim import create_optimizer_v2

        config, device = run.config, run.world.device
        student = _placed(create_model(setting.model, setting.classes, setting.size, {}), device).train()
        self._optimizer = create_optimizer_v2(
            student, opt="adamw", lr=config.optim.lr, weight_decay=config.optim.weight_decay
        )
        self._task = _timm_task(setting, student, run).train()
        self._task.setup_ema(decay=config.ema.decay)
        if setting.compiled:
            self._task.compile()
        collate = FastCollateMixup(
            mixup_alpha=config.augment.mixup_alpha,
            cutmix_alpha=config.augment.cutmix_alpha,
            prob=config.augment.mix_prob,
            switch_prob=config.augment.cutmix_prob,
            label_smoothing=config.distill.label_smoothing,
            num_classes=setting.classes,
        )
        images = batch.images.permute(0, 3, 1, 2).cpu().numpy()
        loaded = [tensor.to(device) for tensor in collate(list(zip(images, batch.labels.tolist(), strict=True)))]
        expects = preprocessing(student)
        endless: Any = itertools.repeat(loaded)  # Of a DataLoader the prefetcher uses only the iteration.
        self._batches = iter(PrefetchLoader(endless, mean=expects.mean, std=expects.std, device=device))
        self._autocast = _autocast(setting, device)
        self._numbers = itertools.count(1)

    def update(self) -> None:
        """Make one update in timm's order of calls."""
        pixels, targets = next(self._batches)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            loss = self._task(pixels, targets)["loss"]
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._task.update_ema(step=next(self._numbers))


def _timm_task(setting: Setting, student: nn.Module, run: Run) -> "TrainingTask":
    """Timm's own loss for the student, with the teacher if there is one."""
    from timm.loss import SoftTargetCrossEntropy
    from timm.task import ClassificationTask, LogitDistillationTask

    device, distill = run.world.device, run.config.distill
    criterion = SoftTargetCrossEntropy()
    if setting.teacher is None or setting.weights is None:
        return ClassificationTask(student, criterion, device=device, verbose=False)
    weights = read_weights(setting.weights)
    teacher = create_model(setting.teacher, setting.classes, setting.size, {}, weights, setting.weights)
    return LogitDistillationTask(
        student,
        _placed(teacher, device),
        criterion,
        task_loss_weight=distill.label_weight,
        distill_loss_weight=distill.weight,
        temperature=distill.temperature,
        device=device,
        verbose=False,
    )


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (It lacks this overload.)


def _autocast(setting: Setting, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    if setting.dtype == torch.float32:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, setting.dtype)
