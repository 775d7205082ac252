"""A stage of a study: one command with a folder of its own, whose state is what is on the disk.

The folder's name ends with a fingerprint of all that the result depends on. So a changed setting gets another folder,
nothing is overwritten, and the earlier setting finds its earlier result.
"""

import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from pipelines.common.files import read_json, sha256_of, write_synced
from pipelines.shards.manifest import MANIFEST
from trainer.monitor.run_files import SUMMARY

DONE, FAILED, CLOCK, LOG, SETTINGS = "done.json", "failed.json", "clock.json", "log.txt", "settings.yaml"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
      study: folder of the study.
      kind: what it does; subject: with which student, "" for stages of the whole study.
      slug: what its folder's name begins with.
      facts: all that its result depends on besides `needs`, as plain values by name.
      needs: the stages whose products it reads.
      product_name: the name in its folder of what it makes; the folder itself where it is empty.
      command: words behind `python`; paths are absolute, and the program's is the repository's.
      settings: content of SETTINGS, which the command reads; "" where it reads none.
      group: stages of one group can be carried out by one command; "" is alone.
    """

    study: Path
    kind: str
    subject: str
    slug: str
    facts: dict[str, Any]
    needs: tuple["Stage", ...] = ()
    product_name: str = ""
    command: list[str] = dataclasses.field(default_factory=list)
    settings: str = ""
    group: str = ""

    @property
    def name(self) -> str:
        """What people call it; no two stages of a study have the same name."""
        return f"{self.kind} {self.subject}".strip()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of all that its result depends on."""
        content = [self.kind, self.facts, [need.fingerprint for need in self.needs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.study / self.kind.split()[0] / f"{self.slug}-{self.fingerprint[:8]}"

    @property
    def product(self) -> Path:
        """What it makes."""
        return self.folder / self.product_name

    def with_command(self, *words: object, settings: str = "") -> "Stage":
        """The same stage with its command, which may name its own folder."""
        return dataclasses.replace(self, command=[str(word) for word in words], settings=settings)

    @property
    def is_done(self) -> bool:
        """Whether its result is there and complete."""
        return read_json(self.folder / DONE).get("fingerprint") == self.fingerprint and self.product.exists()

    @property
    def is_blocked(self) -> bool:
        """Whether something that it needs is not there."""
        return not all(need.is_done for need in self.needs)

    @property
    def failure(self) -> str:
        """Why its latest start failed; "" where it did not."""
        return "" if self.is_done else str(read_json(self.folder / FAILED).get("reason", ""))

    @property
    def seconds(self) -> float:
        """How long it has taken over all its starts."""
        return float(read_json(self.folder / DONE).get("seconds", 0.0))

    @property
    def command_run(self) -> list[str]:
        """The command that made its result, or that is going to."""
        return read_json(self.folder / DONE).get("command", self.command)

    @property
    def has_ended_well(self) -> bool:
        """Whether its command has made everything, as far as the product itself says so.

        A process that is killed before it writes DONE leaves this behind, and so does one student of several that are
        trained together when another one has failed.
        """
        if self.kind in ("train", "teacher"):
            return read_json(self.product / SUMMARY).get("finished") is True
        return self.kind == "export" and (self.product / "config.json").is_file()

    def begin(self) -> None:
        """Write what the command reads, and note the time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.settings:
            write_synced(self.folder / SETTINGS, self.settings.encode())
        (self.folder / FAILED).unlink(missing_ok=True)
        self._write(CLOCK, {"seconds": self._seconds_before(), "started": time.time()})

    def finish(self, command: list[str], seconds: float) -> None:
        """Note that the stage is done. This is written last.

        Args:
          seconds: that the latest start took, of this stage's own.
        """
        before = read_json(self.folder / CLOCK).get("seconds", 0.0)
        total = round(before + seconds, 1)
        content = {"fingerprint": self.fingerprint, "command": command, "seconds": total, "facts": self.facts}
        self._write(DONE, {**content, "needs": {need.name: need.fingerprint for need in self.needs}})

    def fail(self, reason: str, log: Path) -> None:
        """Note why the command failed."""
        self._write(FAILED, {"reason": reason, "log": str(log)})

    def _seconds_before(self) -> float:
        """Seconds of earlier starts; one that was killed lasted until it last wrote to its log."""
        clock, log = read_json(self.folder / CLOCK), self.folder / LOG
        if not clock or not log.is_file():
            return 0.0
        return clock["seconds"] + max(0.0, log.stat().st_mtime - clock["started"])

    def _write(self, name: str, content: dict) -> None:
        write_synced(self.folder / name, (json.dumps(content, indent=1) + "\n").encode())

    def reason_to_redo(self) -> str:
        """Which setting has changed since the newest earlier result, and where that lies; "" if there is none."""
        earlier = [path for path in self.folder.parent.glob(f"{self.slug}-*/{DONE}") if path.parent != self.folder]
        if self.is_done or not earlier:
            return ""
        newest = max(earlier, key=lambda path: path.stat().st_mtime)
        before = read_json(newest)
        old, now = before.get("facts", {}), self.facts
        changed = [
            f"{key} {old.get(key, 'default')} -> {now.get(key, 'default')}"
            for key in sorted({*old, *now})
            if old.get(key) != now.get(key)
        ]
        needed = before.get("needs", {})
        changed += [f"another {need.name}" for need in self.needs if needed.get(need.name) != need.fingerprint]
        changed += [f"no {name}" for name in needed if name not in {need.name for need in self.needs}]
        return f"{', '.join(changed)}; the earlier result is {newest.parent.relative_to(self.study)}"


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
