"""A stage of a study: one command with a folder of its own, whose state is what is on the disk.

The folder's name ends with a fingerprint of all that the result depends on. So a changed setting gets another folder,
nothing is overwritten, and the earlier setting finds its earlier result.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.common.files import read_json, write_synced
from tools.lib.common.units import human_seconds
from trainer.config.sections import Config, to_yaml
from trainer.monitor.run_files import SUMMARY
from trainer.state.checkpoint import checkpoints, checkpoints_folder, step_of

STATE, LOG, SETTINGS = "stage.json", "log.txt", "settings.yaml"  # In the folder of a stage.
TRAININGS = ("teacher", "train")  # Kinds of stages.
REPOSITORY = Path(__file__).resolve().parents[3]
_STUDENT_PREFIX = re.compile(r"/train/([^/]+)/run: ")  # trainer/together.py begins messages about one student so.


@dataclasses.dataclass(eq=False)
class Stage:
    """A stage.

    Attributes:
      out: folder of the study.
      kind: what it does; subject: with which student, "" for stages of the whole study.
      prefix: the beginning of its folder's name.
      inputs: all that its result depends on besides `needs`, as plain values by name.
      needs: the stages whose products it reads.
      product_name: what it makes, in its folder.
      config: the command reads it from SETTINGS; None where it reads none.
      epochs: that a recording must hold at least, 0 for other stages. It is no input: a recording can be lengthened.
      command: all its words, which a user can paste; paths are absolute.
    """

    out: Path
    kind: str
    subject: str
    prefix: str
    inputs: dict[str, Any]
    needs: tuple["Stage", ...]
    product_name: str
    config: Config | None = None
    epochs: int = 0
    command: list[str] = dataclasses.field(default_factory=list)

    def by(self, program: str | Path, *words: object) -> "Stage":
        """The stage itself, with the command of a program of the repository."""
        self.command = command_of(program, *words)
        return self

    @property
    def name(self) -> str:
        """What people call it; no two stages of a study have the same name."""
        return f"{self.kind} {self.subject}".strip()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of all that its result depends on."""
        content = [self.kind, self.inputs, [need.fingerprint for need in self.needs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.out / slug_of(self.kind) / f"{slug_of(self.prefix)}-{self.fingerprint[:8]}"

    @property
    def product(self) -> Path:
        """What it makes."""
        return self.folder / self.product_name

    @property
    def noted(self) -> dict[str, Any]:
        """What `note` has written, {} before its first start."""
        noted = read_json(self.folder / STATE)
        return noted if noted.get("fingerprint") == self.fingerprint else {}

    @property
    def is_done(self) -> bool:
        """Whether its result is there and complete.

        A training says that itself: its process may end well before its last step, or fail because of another student
        that it trains. So does an exported model, because a process that is killed leaves no note.
        """
        if not (noted := self.noted) or not self.product.exists():
            return False
        if self.kind in TRAININGS:
            return read_json(self.product / SUMMARY).get("finished") is True
        is_noted = noted.get("done") and noted.get("epochs", 0) >= self.epochs
        return is_noted or (self.kind == "export" and (self.product / "config.json").is_file())

    @property
    def failure(self) -> str:
        """Why its latest start failed; "" where it did not."""
        return "" if self.is_done else self.noted.get("failure", "")

    @property
    def seconds(self) -> float:
        """How long it has taken over all its starts; of one that was killed with the study, to its last note."""
        return self.noted.get("seconds", 0.0)

    @property
    def state(self) -> str:
        """How far it is, in a few words."""
        if self.is_done:
            return f"done in {human_seconds(self.seconds)}"
        if self.failure:
            return "failed"
        if self.noted.get("done") and self.product.exists() and self.kind == "store":
            return f"to be lengthened to {self.epochs} epochs"
        if self.num_steps_saved:
            return f"to be resumed after step {self.num_steps_saved}"
        return "to be resumed" if self.folder.exists() else "to do"

    @property
    def missing(self) -> str:
        """The names of the stages that it needs and that are not done."""
        return ", ".join(need.name for need in self.needs if not need.is_done)

    @property
    def num_steps_saved(self) -> int:
        """The number of updates in the newest checkpoint of a training, 0 without one."""
        return max(map(step_of, checkpoints(checkpoints_folder(self.product))), default=0)

    @property
    def log(self) -> Path:
        """The file with the output of its latest command; students that are trained together have one for all."""
        return self.out / self.noted.get("log", self.folder.relative_to(self.out) / LOG)

    @property
    def warnings(self) -> list[str]:
        """The warnings in its logs, from lines with `warning:`, each once, without those of other students."""
        found = []
        for log in dict.fromkeys([self.folder / LOG, self.log]):
            for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
                student, warning = _STUDENT_PREFIX.search(line), line.partition("warning: ")[2]
                if warning and (student is None or student[1] == self.folder.name):
                    found.append(warning)
        return [*dict.fromkeys(found)]

    def write_settings(self) -> None:
        """Write the settings that its command reads, if it reads any."""
        if self.config is not None:
            write_synced(self.folder / SETTINGS, to_yaml(self.config).encode())

    def note(self, **changed: object) -> None:
        """Write down how far it is, where it has changed since the last note.

        Args:
          changed: command: list of words; log: as the property, from the folder of the study on; done: bool;
            failure: why the latest start failed; seconds: over all starts.
        """
        same = {"name": self.name, "fingerprint": self.fingerprint, "epochs": self.epochs, "inputs": self.inputs}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_synced(self.folder / STATE, (json.dumps({**self.noted, **same, **changed}, indent=1) + "\n").encode())


def command_of(program: str | Path, *words: object) -> list[str]:
    """The words of a command line that runs a program of the repository, from any folder."""
    return [sys.executable, str(REPOSITORY / program), *map(str, words)]


def as_options(values: Mapping[str, object]) -> list[object]:
    """Values as words of a command line; those that are None are left out."""
    words: list[object] = []
    for name, value in values.items():
        if value is not None:
            many = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name}", *many]
    return words


def slug_of(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^\w.-]+", "_", name)
