"""Collects the settings and files on which the result of a stage depends, besides the stages that it needs."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.common.files import read_json, sha256_of
from pipelines.shards.manifest import MANIFEST
from tools.lib.study.stage import Stage
from trainer.config.natures import flat, setting_natures
from trainer.config.sections import Config
from trainer.models.files.model_folders import model_contents, source_name
from trainer.state.checkpoint import BEST, checkpoints_folder

# Settings that name files. Of one that is not there the path counts, so that its result is no other file's.
_FILES = {"data.root", *(f"{of}.{name}" for of in ("student", "teacher") for name in ("checkpoint", "classes"))}


def inputs_of(config: Config, needs: Iterable[Stage], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings that a result depends on, where they are not the default, and the content of what they name.

    Args:
      needs: stages before this one; a path to what they write, as dataset or teacher, is not counted as an input.
      also: settings that count here, though they change no other result.
    """
    natures, defaults, found = setting_natures(), flat(Config()), {}
    made = {*_made_by(needs)}
    for key, value in flat(config).items():
        nature = natures[key]
        changes_results = nature.recipe or nature.on_resume != "ignored" or key in also
        if key in _FILES:
            if value is not None and (str(value) not in made or key.startswith("student.")):
                found[key] = content_of(value)
        elif value != defaults[key] and not nature.per_machine and changes_results:
            found[key] = value
    unused = set() if config.teacher.members else {"distill.weight", "distill.temperature"}
    unused |= {"data.window_shards"} if config.data.shuffle == "global" else set()
    return {key: value for key, value in found.items() if key not in unused} | _contents_of_folders(config)


def _made_by(stages: Iterable[Stage]) -> Iterator[str]:
    """Paths of the datasets, models and checkpoints that stages, and those that they need, write."""
    for stage in stages:
        yield from (str(stage.product), str(checkpoints_folder(stage.product) / BEST))
        yield from _made_by(stage.needs)


def _contents_of_folders(config: Config) -> dict[str, Any]:
    """Digests of what a training reads of models that are folders of this machine, such as "student.name (weights)"."""
    names = [source_name(str(name)) for name in (config.student.name, config.teacher.name)]
    contents = model_contents(config) if any(name.startswith("local-dir:") for name in names) else {}
    return {key.removeprefix("content of "): digest for key, digest in contents.items() if ".name (" in key}


def content_of(value: object) -> object:
    """A setting's value, or what is in the file or dataset that it names, as a digest."""
    if isinstance(value, str) and Path(value).is_file():
        return _digest(value, Path(value).stat().st_mtime_ns)
    if isinstance(value, str) and (manifest := Path(value) / MANIFEST).is_file():
        return {name: split["digest"] for name, split in read_json(manifest)["splits"].items()}
    return value


@functools.cache
def _digest(path: str, _: int) -> str:
    return sha256_of(Path(path))
