"""Other settings for a run that tools/doctor.py tries: which, and how fast the whole is with each."""

import contextlib
import dataclasses
import json
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipelines.common.errors import UserError
from pipelines.common.machine import num_cores
from pipelines.shards.index import ShardIndex
from pipelines.shards.reader import ShardReader
from tools.lib.doctor.input_stages import Feed, feed_of, plans_of_size, rounds
from tools.lib.doctor.stages import NOTHING, Rate, Stage, rates
from tools.lib.doctor.step_stages import WholeRun
from tools.lib.shards.images import CheckedImage, ImageOptions, check_image
from trainer.builder import Run, build
from trainer.cluster.memory import is_out_of_memory
from trainer.config.sections import Config
from trainer.feed import open_pipelines

REPEATS = 5  # A gain must show in every one of these timed runs.
_UNCHANGED = "unchanged"
_LOADS = (0.0, 0.5, 0.65, 0.9, 1.0)
_MUCH_LARGER = 2  # Images are shrunken if their short side is longer than that of the training image times this.
Changes = dict[str, object]  # "section.key" -> value


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
      override: as on the command line, or a sentence about what to do.
      rate: the speed of the run with them; now: its speed unchanged, measured in turn with the other.
      gain: how much faster it is by the medians: 0.1 is 10 %.
      faster: whether every timed run with the settings was faster than every one without.
    """

    override: str
    rate: Rate
    now: Rate
    gain: float
    faster: bool


def input_candidates(config: Config, feed: Feed, cores: int) -> list[Changes]:
    """Other settings of the pipeline; `cores` are those of this rank."""
    on_gpu = feed.device.type == "cuda"
    found: list[Changes] = []
    for threads in sorted({max(1, cores // 2), cores, 2 * cores} - {feed.threads}):
        found.append({"data.threads": threads})
    found.append({"data.prefetch": 2 * config.data.prefetch})
    found.append({"data.pipeline": "torchvision" if feed.name == "dali" else "dali"})
    if on_gpu and feed.name == "dali":
        found.append({"data.decode": "full" if feed.decode == "roi" else "roi"})
        for load in _LOADS:
            if load != feed.hw_decoder_load:
                found.append({"data.hw_decoder_load": load})
    return found


def step_candidates(run: Run) -> list[Changes]:
    """Other settings of the step."""
    group, rank_batch = run.config.augment.mix_group, run.plan.global_batch // run.world.size
    now = run.state.micro_batch
    larger = run.world.size == 1  # A rank without the memory for it would leave the others waiting.
    sizes = [size for size in (now // 2, 2 * now) if size and size % group == 0 and rank_batch % size == 0]
    found: list[Changes] = [{"run.micro_batch": size} for size in sizes if size < now or larger]
    if run.world.device.type == "cuda":
        found.append({"run.compile": run.config.run.compile is False})
    return found


def with_changes(config: Config, changes: Changes) -> Config:
    """The configuration with other values."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def override(changes: Changes) -> str:
    """As on the command line."""
    return " ".join(f"--{key} {json.dumps(value).strip(chr(34))}" for key, value in changes.items())


def try_all(run: Run, size: int, candidates: list[Changes], seconds: float) -> list[Trial]:
    """Try each of the settings in turn with the unchanged run, then all together that were faster.

    Settings for which this machine lacks memory or DALI are left out.

    Args:
      size: of the images, pixels.
      seconds: how long the timed runs of each take together.
    """
    runs = {}
    for changes in candidates:
        with contextlib.suppress(UserError), _left_out_without_memory():
            runs[override(changes)] = changed(run, changes)
    trials = _tried(run, runs, size, seconds)
    best = best_of_each_key(trials, candidates)
    if len(best) > 1:
        trials += _tried(run, {override(best): changed(run, best)}, size, seconds)
    return trials


def changed(run: Run, changes: Changes) -> Run:
    """The run with other settings; it has new weights where they concern the step."""
    config = with_changes(run.config, changes)
    if "data.decode" not in changes and "data.pipeline" not in changes:  # Otherwise the decoder is probed for each.
        config = with_changes(config, {"data.decode": run.pipelines.decode["decode"]})
    if any(key.startswith("run.") for key in changes):
        elsewhere = {"run.out": config.run.out / NOTHING, "run.micro_batch": run.state.micro_batch}
        return build(with_changes(with_changes(config, elsewhere), changes), run.world)
    return dataclasses.replace(
        run, config=config, pipelines=open_pipelines(config, {"train": run.plan.index}, run.world)
    )


def best_of_each_key(trials: list[Trial], candidates: list[Changes]) -> Changes:
    """The fastest setting of each key that was faster than the unchanged run."""
    gains = {trial.override: trial.gain for trial in trials if trial.faster}
    best: Changes = {}
    for changes in sorted(candidates, key=lambda changes: gains.get(override(changes), 0.0)):
        if override(changes) in gains:
            best |= changes
    return best


def _tried(run: Run, runs: dict[str, Run], size: int, seconds: float) -> list[Trial]:
    measured = {_UNCHANGED: _whole_stage(run, size)}
    for name, other in runs.items():
        with _left_out_without_memory():
            whole = _whole_stage(other, size)
            whole(1)
            measured[name] = whole
    found = rates(measured, run.plan.global_batch, seconds, run.world, REPEATS)
    now = found.pop(_UNCHANGED)
    return [trial(name, rate, now) for name, rate in found.items()]


def trial(name: str, rate: Rate, now: Rate) -> Trial:
    """Compare a measurement with that of the unchanged run."""
    return Trial(name, rate, now, rate.images_per_s / now.images_per_s - 1, rate.min > now.max)


def _whole_stage(run: Run, size: int) -> Stage:
    whole = WholeRun(run, feed_of(run, plans_of_size(run, size)))

    def stage(count: int) -> float:
        try:
            return whole(count)
        finally:
            run.pipelines.of["train"].forget()  # A GPU's memory need not hold the graphs of all at once.

    return stage


@contextlib.contextmanager
def _left_out_without_memory() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, UserError) as error:
        if not is_out_of_memory(error):
            raise


# --- smaller images ---


def shrinking_helps(index: ShardIndex, size: int) -> int:
    """The short side in pixels to which a dataset should be shrunken; 0 where its images are not much larger.

    With twice the side of the training image, the recipe's smallest crops (8 % of the area) still have half of it.
    """
    rows = index.samples[:: max(1, len(index) // 10_000)]
    short = np.minimum(rows["height"], rows["width"])
    return _MUCH_LARGER * size if np.median(short) > _MUCH_LARGER * size else 0


def try_shrunken(run: Run, size: int, short: int, seconds: float) -> Trial:
    """Try the run with images shrunken to a short side of `short` px, in turn with the unchanged images."""
    plans = next(rounds(plans_of_size(run, size)(sys.maxsize)))  # All timed runs go through these.
    samples = np.unique(np.concatenate([plan.sample for plan in plans]))
    with TemporaryDirectory() as scratch:
        index = shrunken(run.plan.index, samples, short, Path(scratch))
        plan = dataclasses.replace(run.plan, index=index)
        other = dataclasses.replace(run, plan=plan, pipelines=open_pipelines(run.config, {"train": index}, run.world))
        (found,) = _tried(run, {"": other}, size, seconds)
    build_command = f"tools/shard_imagenet.py build SRC OUT --resize-short {short}, then --data.root OUT"
    return dataclasses.replace(found, override=build_command)


def shrunken(index: ShardIndex, samples: np.ndarray, short: int, folder: Path) -> ShardIndex:
    """The index with some of its samples shrunken to a short side of `short` px, which are written into `folder`."""
    path, reader, rows = folder / "shrunken", ShardReader(index), np.array(index.samples)
    options = ImageOptions(audit=False, resize_short=short)

    def shrink(sample: int) -> CheckedImage:
        (content,) = reader.read(np.array([sample]))
        return check_image(content.tobytes(), options)

    offset = 0
    with open(path, "wb") as file, ThreadPoolExecutor(num_cores()) as pool:
        for sample, image in zip(samples.tolist(), pool.map(shrink, samples.tolist()), strict=True):
            place = {"shard": len(index.paths), "offset": offset, "nbytes": len(image.jpeg)}
            what = {"height": image.height, "width": image.width, "crc32": zlib.crc32(image.jpeg)}
            for name, value in {**place, **what}.items():
                rows[name][sample] = value
            offset += file.write(image.jpeg)
    return dataclasses.replace(index, paths=(*index.paths, path), samples=rows)
