"""The report on one run or several: a page that needs no other file, and its pictures beside it.

Everything is read from the runs' folders, so a run may be in progress, or have been killed.
"""

import base64
import dataclasses
import datetime
import functools
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from pipelines.common.errors import UserError, clipped, with_escaped_bytes, write_error_line
from pipelines.common.files import split_json_lines, write_synced
from trainer.config.cli import read_yaml
from trainer.config.recipe import audit
from trainer.config.sections import parse
from trainer.monitor.quarantine import QUARANTINE
from trainer.monitor.report.charts import Chart, Curve, draw
from trainer.monitor.run_files import METRICS, SUMMARY, is_quarantine_line, is_reportable, read_summary
from trainer.monitor.sample_grid import SAMPLES

PAGE = "index.html"
_NONE = "–"
_MOST_DRAWN = 1e30  # Larger numbers, and those that are not finite, are left out of charts.


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds.

    Attributes:
      name: in the report.
      config: config.yaml, {} without one.
      lines: of metrics.jsonl.
      summary: of the latest session, {} unless it has ended.
      num_damaged: how many damaged images were found.
      unusable: the parts of these files that are left out because they cannot be used, in words.
    """

    folder: Path
    name: str
    config: dict
    lines: list[dict]
    summary: dict
    num_damaged: int
    unusable: list[str]

    def of(self, *kinds: str) -> list[dict]:
        """The lines of these kinds."""
        return [line for line in self.lines if line["kind"] in kinds]

    @property
    def step(self) -> int:
        """The step after which the log ends."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def steps_per_epoch(self) -> int | None:
        """None where the log does not say it."""
        return next((line["steps_per_epoch"] for line in self.of("session") if "steps_per_epoch" in line), None)

    @property
    def restarts(self) -> list[dict]:
        """The session lines but the first."""
        return self.of("session")[1:]

    @functools.cached_property
    def deviations(self) -> list[dict] | None:
        """The settings that differ from the recipe, as from `audit`; None where this version cannot read them."""
        if self.summary:
            return self.summary["deviations"]
        try:
            return audit(parse(["--config", str(self.folder / "config.yaml")]))
        except UserError:  # Another version has written it.
            return None


def read_run(folder: Path, name: str) -> RunRecord:
    """Read a run's folder. Raises a UserError if it is not one."""
    config, metrics, summary = folder / "config.yaml", folder / METRICS, folder / SUMMARY
    if not (config.is_file() or metrics.is_file()):
        raise UserError(f"{folder}: not the folder of a run, it has no config.yaml. Give what --run.out was")
    unusable = []
    lines, lost = split_json_lines(metrics, is_reportable)
    damaged, damaged_lost = split_json_lines(folder / QUARANTINE, is_quarantine_line)
    for file, others in ((METRICS, lost), (QUARANTINE, damaged_lost)):
        unusable += [f"{len(others)} {'line' if len(others) == 1 else 'lines'} of {file}"] if others else []
    ended = read_summary(summary)
    unusable += [SUMMARY] if ended is None else []
    if lines and ended and ended["step"] < lines[-1]["step"]:
        ended = {}  # It is an earlier session's.
    try:
        settings = read_yaml(config) if config.is_file() else {}
    except UserError:
        settings = {}
        unusable.append("config.yaml")
    sections = {key: value for key, value in settings.items() if isinstance(value, dict)}
    unusable += [f"section '{clipped(key)}' of config.yaml" for key in settings if key not in sections]
    return RunRecord(folder, name, sections, lines, ended or {}, len(damaged), unusable)


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write PAGE and the pictures to `out`, over those that are there. Returns the page's path.

    Raises:
      UserError: a folder is none of a run, or `out` cannot be made.
    """
    short = Counter(folder.resolve().name for folder in folders)
    names = [folder.resolve().name if short[folder.resolve().name] == 1 else str(folder) for folder in folders]
    runs = [read_run(folder, with_escaped_bytes(name)) for folder, name in zip(folders, names, strict=True)]
    for run in runs:
        if run.unusable:
            write_error_line(f"note: {run.folder}: cannot be used and is left out: {', '.join(run.unusable)}")
    pictures = {f"{chart.name}.png": (chart.title, draw(chart)) for chart in charts(runs)}
    strips = {run.name: (run.folder / SAMPLES).read_bytes() for run in runs if (run.folder / SAMPLES).is_file()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, (_, content) in pictures.items():
            write_synced(out / name, content)
        for i, content in enumerate(strips.values(), 1):
            write_synced(out / (SAMPLES if len(runs) == 1 else f"samples-{i}.png"), content)
        write_synced(out / PAGE, page(runs, pictures, strips).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Name another folder with --out") from error
    return out / PAGE


def report_or_reason(folder: Path) -> str:
    """Write the report of a run to its folder. Returns a line that names the page, or says why there is none."""
    try:
        return f"report: {write_report([folder], folder / 'report')}"
    except Exception as error:  # A picture must not make a run fail that has been trained.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"no report was drawn ({reason}); tools/report.py {folder} tries again"


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The pictures for which there are numbers."""
    in_epochs = all(run.steps_per_epoch for run in runs)
    marks = [
        (kind, None if len(runs) == 1 else i, line["step"] / (run.steps_per_epoch if in_epochs else 1))
        for i, run in enumerate(runs)
        for kind, lines in (("session", run.restarts), ("rollback", run.of("rollback")))
        for line in lines
    ]

    def chart(name: str, title: str, y_label: str, *series: tuple, **looks) -> Chart:
        curves = [curve for i, run in enumerate(runs) for curve in _curves(run, i, len(runs), in_epochs, series)]
        return Chart(name, title, "epoch" if in_epochs else "step", y_label, curves, marks, **looks)

    weights = ("eval", "ema", "top1", 1, "EMA weights"), ("eval", "raw", "top1", 1, "raw weights")
    teacher = (
        ("train", "teacher_top1", None, 1, "teacher with labels"),
        ("train", "agreement", None, 1, "student with teacher"),
    )
    all_charts = [
        chart("loss", "Training loss", "loss", ("train", "loss", None, 1, ""), noisy=True),
        chart("top1", "Validation accuracy", "top-1 (%)", *weights),
        chart("agreement", "Agreement on training images", "images (%)", *teacher, noisy=True),
        chart("lr", "Learning rate", "learning rate", ("train", "lr", None, 1, ""), from_zero=True, rims=True),
        chart(
            "throughput",
            "Throughput",
            "images/s, all ranks",
            ("train", "images_per_s", None, 1, ""),
            noisy=True,
            from_zero=True,
        ),
        chart(
            "input_wait",
            "Waiting for input",
            "fraction of the time (%)",
            ("train", "input_wait", None, 100, ""),
            noisy=True,
            from_zero=True,
        ),
    ]
    return [chart for chart in all_charts if chart.curves]


def _curves(run: RunRecord, number: int, num_runs: int, in_epochs: bool, series: Sequence[tuple]) -> list[Curve]:
    """A run's curves in a chart; `series` are (kind of line, key, key inside it or None, factor, label)."""
    curves = []
    for i, (kind, key, inner, factor, label) in enumerate(series):
        lines = [line for line in run.of(kind) if line.get(key) is not None]
        x = np.array([line["step"] for line in lines]) / (run.steps_per_epoch if in_epochs else 1)
        y = np.array([line[key][inner] if inner else line[key] for line in lines], float) * factor
        drawn = np.abs(y) < _MOST_DRAWN
        x, y = x[drawn], y[drawn]
        if not len(y):
            continue
        names = [run.name, label] if num_runs > 1 else [label]
        color = i if num_runs == 1 else number
        curves.append(Curve(", ".join(filter(None, names)), color, x, y, "dashed" if i else "solid"))
    return curves


def numbers(run: RunRecord) -> dict[str, str]:
    """The results of a run in words, in the order of the page."""
    train, evals, sessions = run.of("train"), run.of("eval"), run.of("session")
    total = run.summary.get("total_steps") or next((s["total_steps"] for s in sessions[-1:] if "total_steps" in s), "?")
    last = evals[-1] if evals else {}
    speeds, waits = (
        [line[key] for line in train if math.isfinite(line[key])] for key in ("images_per_s", "input_wait")
    )
    best = max(((e[w]["top1"], w, e["epoch"]) for e in evals for w in ("ema", "raw") if w in e), default=None)
    section = {name: run.config.get(name, {}) for name in ("student", "teacher")}
    return {
        "state": _state(run),
        "student": section["student"].get("name", _NONE),
        "teacher": section["teacher"].get("name") or "none, labels alone",
        "steps done": f"{run.step:,} of {total:,}" if total != "?" else f"{run.step:,}",
        "top-1, EMA weights": _percent(last["ema"]["top1"]) if "ema" in last else _NONE,
        "top-1, raw weights": _percent(last["raw"]["top1"]) if "raw" in last else _NONE,
        "best top-1": f"{_percent(best[0])} ({best[1]}, epoch {best[2]})" if best else _NONE,
        "training loss, last line": f"{train[-1]['loss']:.4f}" if train else _NONE,
        "images/s, median": f"{statistics.median(speeds):,.0f}" if speeds else _NONE,
        "waiting for input, mean": _percent(100 * statistics.mean(waits), 1) if waits else _NONE,
        "from the first line to the last": _duration(run.lines),
        "restarts": str(len(run.restarts)),
        "went back to a checkpoint": str(len(run.of("rollback"))),
        "ranks, latest session": _ranks(sessions[-1]) if sessions else _NONE,
        "damaged images": str(run.num_damaged),
        "settings other than the recipe's": _NONE if run.deviations is None else str(len(run.deviations)),
    }


def _percent(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f} %"


def _state(run: RunRecord) -> str:
    if run.summary:
        return "finished" if run.summary["finished"] else f"stopped after step {run.step:,}"
    if not run.of("train"):
        return "not finished; no line of training yet"
    times = [line["time"] for line in run.lines if "time" in line]
    return f"not finished; last line {_clock(times[-1])}" if times else "not finished"


def _ranks(session: dict) -> str:
    return f"{session.get('ranks', '?')} x {session.get('device', '?')}"


def _clock(unix_s: float | None) -> str:
    return (
        _NONE
        if unix_s is None
        else f"{datetime.datetime.fromtimestamp(unix_s, datetime.timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    )


def _duration(lines: list[dict]) -> str:
    times = [line["time"] for line in lines if "time" in line]
    if any(later < earlier for earlier, later in itertools.pairwise(times)):
        return f"{_NONE} (the clock was set back)"
    return str(datetime.timedelta(seconds=round(times[-1] - times[0]))) if times else _NONE


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list]:
    """The settings that are not the same in all runs, `section.key`: the value in each run; but run.out."""
    flat = [
        {f"{name}.{key}": value for name, section in run.config.items() for key, value in section.items()}
        for run in runs
    ]
    rows = {key: [settings.get(key, _NONE) for settings in flat] for settings in flat for key in settings}
    return {key: row for key, row in rows.items() if key != "run.out" and any(value != row[0] for value in row)}


def page(runs: list[RunRecord], pictures: dict[str, tuple[str, bytes]], strips: dict[str, bytes]) -> str:
    """The page as text; `pictures` are (title, PNG), `strips` the first images of runs by their names."""
    columns = [numbers(run) for run in runs]
    return _template().render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=runs,
        numbers={key: [column[key] for column in columns] for key in columns[0]},
        differing=differing_settings(runs),
        pictures={title: _embedded(content) for title, content in pictures.values()},
        strips={name: _embedded(content) for name, content in strips.items()},
        summaries={run.name: _json(run.summary, indent=1) for run in runs if run.summary},
        written=_clock(datetime.datetime.now().timestamp()),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clock": _clock, "setting": _setting, "ranks": _ranks}
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def _setting(value: object) -> str:
    """A setting as the command line takes it."""
    return value if isinstance(value, str) else _json(value)


def _json(value: object, indent: int | None = None) -> str:
    """JSON, also of values that YAML has and JSON has not, such as a date."""
    try:
        return json.dumps(value, indent=indent, default=str)
    except (TypeError, RecursionError):  # A key is not text, or a list contains itself.
        return clipped(value)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
