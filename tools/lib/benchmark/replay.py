"""One update with a live teacher, with its recorded outputs, and without a teacher; what recording costs, and reading.

What makes the rows of a table comparable:

- The runs are built like any other, with the same student, images and plan. One has the live teacher, one replays a
  store of the same teacher, and one has labels alone. Their pixels are synthetic and cost nothing, as those of the
  recording, so a row has the models' time and not the loader's.
- "targets at hand" has the loss of distillation, on rows of a codec that lie in memory. What a replay takes beyond this
  row is the store's; what this row takes beyond the student alone is paid by every student that is distilled.
- "recording" does for each batch what tools/record_teacher.py does: the mixed images, the teacher's forward pass in the
  tool's default precision, encoding, and a piece for each timed run, synced to the disk. The tool writes in a thread
  while it computes. This row does not, so it shows at least what the tool costs.
- The rows of the other table make no update. They are the run's own loader over photographs, the same with the replay
  beside it, and the reading of the store alone, checksums included.

"Of processor time" is what all threads of this process took, the median of the same timed runs. Beside other work on
the same cores it varies far less than the time that has passed. On a GPU it would be that of the host and is left out.

The store has one epoch of the photographs, which the plan repeats (augment.cycle_epochs), so it is read from the page
cache. A disk has to be compared with what is needed by arithmetic.
"""

import contextlib
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch

from pipelines import Pipeline, resolve_pipeline
from pipelines.batch import Batch
from pipelines.common.errors import UserError
from pipelines.common.files import sha256_of
from pipelines.plan.batch_plan import BatchPlan
from pipelines.synthetic import SyntheticPipeline
from tools.lib.benchmark.photographs import photograph_index
from tools.lib.benchmark.results import Row
from tools.lib.benchmark.runs import LAST, Setting, open_run, settings, updates_per_timed_run
from tools.lib.common.timing import BATCHES_IN_WORK, interleaved, ratio, speeds, timed_on_device
from trainer.builder import Run, place
from trainer.config.sections import DataConfig
from trainer.feed import batches_of, rank_plans
from trainer.models.checkpoint_format import digest_of
from trainer.models.files.weights import read_weights
from trainer.models.teacher import build_teachers
from trainer.targets.header import StoreHeader, TeacherFacts, claim
from trainer.targets.pieces import Piece, write_piece
from trainer.targets.replay import pipeline_and_versions
from trainer.update.inputs import teacher_inputs
from trainer.update.precision import PRECISIONS

ALONE, LIVE, AT_HAND, REPLAY, RECORDING = "student alone", "live teacher", "targets at hand", "replay", "recording"
LOADER, BESIDE, READING = "loader alone", "loader and replay", "reading the store alone"
_CODEC = "int8"  # This is the tool's default.
_PER_SHARD = 512  # A shard has this many photographs.
_WARM_UP = 3  # Kernels are chosen and models compiled after this many updates.
_LEAD = DataConfig().prefetch + BATCHES_IN_WORK + 1  # More batches than a loader has ready.


def replay(
    models: list[str],
    teacher: str,
    images: int,
    batch: int,
    size: int,
    precision: str,
    compile: str,
    repeats: int,
    seconds: float,
) -> Iterator[Row]:
    """The rows: two tables for each model, over `images` photographs.

    Args:
      precision: auto, bf16 or fp32.
      compile: no, yes or both.
      seconds: about how long a timed run takes.
    Raises:
      UserError: no teacher, fewer photographs than a batch, or models that cannot be built.
    """
    if teacher == "null":
        raise UserError("--teacher is null: there is nothing to record. Name a model")
    if images < batch:
        raise UserError(f"--images {images} is less than --batch {batch}: give at least as many")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        index = photograph_index(folder, images, _PER_SHARD)
        data = ["--data.root", str(folder / "data"), "--augment.cycle_epochs", "1"]
        chosen = {"batch": batch, "size": size, "precision": precision, "compile": compile}
        for setting in settings(models, [teacher], folder, **chosen, classes=index.num_classes):
            yield from _rows(setting, folder, data, repeats, seconds)


def _rows(setting: Setting, folder: Path, data: list[str], repeats: int, seconds: float) -> Iterator[Row]:
    live = open_run(setting, folder, data)
    recorder = Recorder(live, setting, Path(tempfile.mkdtemp(dir=folder)))
    store = recorder.record_epoch()
    # The labels, their smoothing and the mixing are the same without a teacher; the loss lacks the distillation.
    alone = open_run(dataclasses.replace(setting, teacher="null", weights=None), folder, data)
    at_hand, replayed = (open_run(setting, folder, [*data, "--teacher.store", str(store)]) for _ in range(2))
    with contextlib.ExitStack() as stack:
        updates = {
            what: stack.enter_context(contextlib.closing(Updates(run, batches(run))))
            for what, run, batches in (
                (ALONE, alone, _synthetic),
                (LIVE, live, _synthetic),
                (AT_HAND, at_hand, _with_targets_at_hand),
                (REPLAY, replayed, _synthetic),
            )
        }
        for each in updates.values():
            each.make(_WARM_UP)
        count = updates_per_timed_run(functools.partial(updates[ALONE].make, 1), seconds)
        candidates = {what: Timed(functools.partial(each.make, count)) for what, each in updates.items()}
        candidates[RECORDING] = Timed(functools.partial(recorder.record, count))
        yield from _table(candidates, repeats, count, setting, setting.title)
    with contextlib.ExitStack() as stack:
        loaders = {
            what: stack.enter_context(contextlib.closing(_batches(run, run.pipelines.of["train"])))
            for what, run in ((LOADER, alone), (BESIDE, replayed))
        }
        count = max(3 * _LEAD, count)  # A few batches would be those that are in work when the time begins.
        candidates = {
            what: Timed(functools.partial(_skip, each, count), functools.partial(_skip, each, _LEAD))
            for what, each in loaders.items()
        }
        candidates[READING] = Timed(functools.partial(_read, replayed, list(itertools.islice(_plans(replayed), count))))
        pipeline = resolve_pipeline(live.config.data.pipeline, live.world.device)
        title = f"{setting.title}, no updates, images from {pipeline}"
        yield from _table(candidates, repeats, count, setting, title)


class Timed:
    """A candidate for `interleaved`: it returns the seconds that a run takes, and keeps its processor time.

    Attributes:
      cpu_s: seconds of processor time of each run, in their order.
    """

    def __init__(self, run: Callable[[], None], before: Callable[[], None] = lambda: None):
        self.cpu_s: list[float] = []
        self._seconds = timed_on_device(run)
        self._before = before

    def __call__(self) -> float:
        """The seconds of a run; what `before` does is not timed."""
        self._before()
        start_s = time.process_time()
        elapsed_s = self._seconds()
        self.cpu_s.append(time.process_time() - start_s)
        return elapsed_s


def _table(candidates: dict[str, Timed], repeats: int, count: int, setting: Setting, title: str) -> Iterator[Row]:
    """Time the candidates, each of `count` batches a timed run, and give rows whose ratio is over the first one."""
    seconds_of = interleaved(candidates, repeats)
    first = next(iter(seconds_of))
    for what, times in seconds_of.items():
        row: Row = {
            "what": what,
            "setting": title,
            **speeds(count * setting.batch, times, 1),
            "ms": round(statistics.median(times) / count * 1000, 2),
            "ratio": ratio(seconds_of[first], times),
            "of": first,
        }
        if not torch.cuda.is_available():
            cpu_s = statistics.median(candidates[what].cpu_s[-repeats:])
            row["cpu_ms"] = round(cpu_s / count * 1000, 2)
        yield row


class Recorder:
    """Records a run's teacher as tools/record_teacher.py does, any number of batches at a time.

    Args:
      run: whose plan and teacher are recorded.
      store: a new folder.
    """

    def __init__(self, run: Run, setting: Setting, store: Path):
        assert setting.weights is not None
        config, device = run.config, run.world.device
        teachers = build_teachers(config, run.plan.index.num_classes, run.state.classes)
        assert teachers is not None
        place([teachers], config.run, device)
        precision = "fp16" if device.type == "cuda" else "fp32"  # This is the tool's default.
        self._teachers = teachers.to_precision(PRECISIONS[precision])
        weights = digest_of(read_weights(setting.weights))
        facts = TeacherFacts(setting.teacher, {}, 0, weights, sha256_of(setting.weights))
        num_classes, made_with = run.plan.index.num_classes, pipeline_and_versions(config, device)
        header = StoreHeader(run.plan.describe(), num_classes, facts, _CODEC, precision, made_with)
        self._run = run
        self._store, self._header = store, claim(store, header)
        self._codec = header.open_codec()
        self._batches = SyntheticPipeline(run.plan.index, device=device).batches(_plans(run))
        self._step = 0

    def record_epoch(self) -> Path:
        """Record the first epoch. Returns the store."""
        self.record(self._run.plan.steps_per_epoch)
        return self._store

    @torch.inference_mode()
    def record(self, num_steps: int) -> None:
        """Record the next steps as one piece."""
        rows, finite = [], []
        for batch in itertools.islice(self._batches, num_steps):
            logits = self._teachers(teacher_inputs(self._teachers, batch)).float()
            rows.append(self._codec.encode(logits))
            finite.append(logits.isfinite().all())
        assert torch.stack(finite).all()
        piece = Piece(self._step, self._step + num_steps, 0, self._header.global_batch)
        assert write_piece(self._store, self._header, piece, torch.stack(rows).cpu().numpy())
        self._step += num_steps


class Updates:
    """Updates of a run on these batches, which must have the targets of its store; close it at the end."""

    def __init__(self, run: Run, batches: Generator[Batch, None, None]):
        self._run, self._batches, self._number = run, batches, 0

    def make(self, count: int) -> None:
        """Make `count` updates."""
        for _ in range(count):
            self._run.step(self._batches, self._number)
            self._number += 1

    def close(self) -> None:
        """End the thread that reads the store."""
        self._batches.close()


def _plans(run: Run) -> Iterator[BatchPlan]:
    return rank_plans(run.plan, 0, LAST, run.world, run.state.micro_batch)


def _batches(run: Run, pipeline: Pipeline) -> Generator[Batch, None, None]:
    """The batches of a run from a pipeline, with the targets of its store where it has one."""
    return batches_of(pipeline, _plans(run), run.replay)


def _synthetic(run: Run) -> Generator[Batch, None, None]:
    """The batches of a run with pixels that cost nothing, with the targets of its store where it has one."""
    return _batches(run, SyntheticPipeline(run.plan.index, device=run.world.device))


def _with_targets_at_hand(run: Run) -> Generator[Batch, None, None]:
    """As `_synthetic`, but what stands for the targets is made in memory."""
    batches = batches_of(SyntheticPipeline(run.plan.index, device=run.world.device), _plans(run))
    yield from map(run.step.with_blank_targets, batches)


def _skip(batches: Iterator[Batch], count: int) -> None:
    for _ in range(count):
        next(batches)


def _read(run: Run, plans: list[BatchPlan]) -> None:
    """Read the targets of batches."""
    assert run.replay is not None
    for plan in plans:
        run.replay.read(plan)
