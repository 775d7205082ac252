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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    open_run,
    settings,
    updates_per_timed_run,
)
from tools.lib.common.terminal import one_line
from tools.lib.common.timing import interleaved, ratio, speeds, timed_on_device
from trainer.builder import Run
from trainer.feed import rank_plans
from trainer.loop import train
from trainer.models.factory import create_model
from trainer.models.files.weights import read_weights
from trainer.models.preprocessing import preprocessing
from trainer.monitor.run_files import METRICS
from trainer.update.compiler import compiled, uncompiled
from trainer.update.loss import usi_loss
from trainer.update.mixing import partners

if TYPE_CHECKING:  # A timm without tasks is a row that says so.
    from timm.task import TrainingTask

OURS, LOOP, TIMM, ALONE = "ours", "ours, whole loop", "timm-style", "models alone"
_WARM_UP = 3  # Nothing is compiled or chosen any more after this many updates.


def step(
    models: list[str],
    teacher: str,
    batch: int,
    size: int,
    precision: str,
    compile: str,
    repeats: int,
    seconds: float,
) -> Iterator[Row]:
    """The rows: each model from the teacher, if it is not null, and alone.

    Args:
      precision: auto, bf16 or fp32.
      compile: no, yes or both.
      seconds: about how long a timed run takes.
    Raises:
      UserError: an odd batch, or models that cannot be built.
    """
    if batch % 2:
        raise UserError(f"--batch is {batch}: timm mixes images in pairs. Give an even number")
    chosen = {"batch": batch, "size": size, "precision": precision, "compile": compile}
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings(models, dict.fromkeys([teacher, "null"]), Path(folder), **chosen):
            yield from _rows(setting, Path(folder), repeats, seconds)


def _rows(setting: Setting, folder: Path, repeats: int, seconds: float) -> list[Row]:
    """A table: the updates of all candidates in turn."""
    rows: dict[str, Row] = {who: {"what": who, "setting": setting.title} for who in (OURS, LOOP, TIMM, ALONE)}
    before = torch.cuda.memory_allocated()
    ours = Ours(setting, folder)
    rows[OURS] = {**rows[OURS], **_warm_up(ours.update, before)}
    updates = updates_per_timed_run(ours.update, seconds)
    batch = next(ours.batches())
    alone = models_alone(setting, ours.run, batch)
    _warm_up(alone)
    candidates = {
        OURS: functools.partial(_seconds, ours.update, updates),
        LOOP: functools.partial(ours.loop_seconds, updates),
        ALONE: functools.partial(_seconds, alone, updates),
    }
    before = torch.cuda.memory_allocated()
    try:
        timm_style = TimmStyle(setting, ours.run, batch)
        rows[TIMM] = {**rows[TIMM], **_warm_up(timm_style.update, before)}
        candidates[TIMM] = functools.partial(_seconds, timm_style.update, updates)
    except Exception as error:  # This timm has other tasks or none, lacks memory, or cannot compile the model.
        rows[TIMM]["note"] = f"not measured, {type(error).__name__}: {one_line(error)}"
    seconds_of = interleaved(candidates, repeats, warm_up=False)
    for who, times in seconds_of.items():
        ms = round(statistics.median(times) / updates * 1000, 2)
        rows[who] = {**rows[who], **speeds(updates * setting.batch, times, 1), "ms": ms}
        if TIMM in seconds_of:
            rows[who] = {**rows[who], "ratio": ratio(seconds_of[TIMM], times), "of": TIMM}
        if who != ALONE:
            neighbours = zip(seconds_of[ALONE], times, strict=True)
            rows[who]["overhead"] = round(statistics.median(1 - alone_s / own_s for alone_s, own_s in neighbours), 3)
    return list(rows.values())


def _warm_up(update: Callable[[], None], before: int = 0) -> Measured:
    """Make some updates. On a GPU, returns the peak of what is allocated besides `before`, bytes."""
    _seconds(update, _WARM_UP)
    if not torch.cuda.is_available():
        return {}
    torch.cuda.reset_peak_memory_stats()
    _seconds(update, 1)
    return {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20)}


def _seconds(update: Callable[[], object], updates: int) -> float:
    """Seconds until the device has finished this many updates."""

    def run() -> None:
        for _ in range(updates):
            update()

    return timed_on_device(run)()


# --- the candidates ---


class Ours:
    """The update and the loop of a run."""

    def __init__(self, setting: Setting, folder: Path):
        self.run = open_run(setting, folder)
        self._batches = self.batches()
        self._numbers = itertools.count()

    def batches(self) -> Iterator[Batch]:
        """The batches of the run from its first update on."""
        plans = rank_plans(self.run.plan, 0, LAST, self.run.world, self.run.state.micro_batch)
        return self.run.pipelines.of["train"].batches(plans)

    def update(self) -> None:
        """Make one update of the run."""
        self.run.step(self._batches, next(self._numbers))

    def loop_seconds(self, updates: int) -> float:
        """Seconds for `updates` of the loop, by the second line of its log; the first line covers its start."""
        run = self.run
        stop = run.state.step + 2 * updates
        changed = dataclasses.replace(run.config.run, log_every=updates, stop_after_steps=stop)
        run.config = dataclasses.replace(run.config, run=changed)
        with contextlib.redirect_stdout(io.StringIO()):
            train(run)
        lines = [line for line in read_json_lines(run.config.run.out / METRICS) if line["kind"] == "train"]
        assert lines[-1]["step"] == stop, lines
        return updates * run.config.run.global_batch / lines[-1]["images_per_s"]


def models_alone(setting: Setting, run: Run, batch: Batch) -> Callable[[], None]:
    """The models' own part of a run's update."""
    compiler = compiled if setting.compiled else uncompiled
    student, loss = compiler(run.state.student), compiler(usi_loss)
    teacher = run.step.teachers  # It is the run's own, folded and compiled.
    autocast = _autocast(run)
    centred = (batch.images.float() / 255 - 0.5) / 0.25
    pixels = centred.permute(0, 3, 1, 2).to(run.precision)  # channels-last
    targets = batch.labels, partners(batch.labels, batch.mix_group), batch.lam, run.config.distill

    def update() -> None:
        run.state.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            taught = teacher([pixels]) if teacher is not None else None
        with autocast():
            logits = student(pixels)
        loss(logits, taught, *targets).backward()
        run.state.optimizer.step()

    return update


class TimmStyle:
    """An update as timm's training script makes it from timm's own parts, with the settings of one of our runs."""

    def __init__(self, setting: Setting, run: Run, batch: Batch):
        from timm.data import FastCollateMixup
        from timm.data.loader import PrefetchLoader
        from timm.optim import create_optimizer_v2

        config, device = run.config, run.world.device
        student = _placed(create_model(setting.model, CLASSES, setting.size, {}), device).train()
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
            num_classes=CLASSES,
        )
        images = batch.images.permute(0, 3, 1, 2).cpu().numpy()
        loaded = [tensor.to(device) for tensor in collate(list(zip(images, batch.labels.tolist(), strict=True)))]
        expects = preprocessing(student)
        endless: Any = itertools.repeat(loaded)  # Of a DataLoader the prefetcher uses only the iteration.
        self._batches = iter(PrefetchLoader(endless, mean=expects.mean, std=expects.std, device=device))
        self._autocast = _autocast(run)
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
    if setting.weights is None:
        return ClassificationTask(student, criterion, device=device, verbose=False)
    weights = read_weights(setting.weights)
    teacher = create_model(setting.teacher, CLASSES, setting.size, {}, weights, setting.weights)
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


def _autocast(run: Run) -> Callable[[], contextlib.AbstractContextManager]:
    if run.precision == torch.float32:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, run.world.device.type, run.precision)
