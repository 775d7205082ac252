"""The report on one run or several: a page that needs no other file, and its pictures beside it.

Everything is read from the runs' folders, so a run may be in progress, or have been killed.
"""

import base64
import dataclasses
import datetime
import functools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import numpy as np

from pipelines.common.errors import UserError, clipped, with_escaped_bytes, write_error_line
from pipelines.common.files import split_json_lines, write_synced
from pipelines.shards.quarantine import QUARANTINE, is_quarantine_line
from trainer.config.cli import read_yaml
from trainer.config.recipe import AuditRow, audit
from trainer.config.sections import parse
from trainer.monitor.report.charts import CHARTS, Chart, Curve, draw
from trainer.monitor.run_files import METRICS, SUMMARY, is_reportable, read_summary
from trainer.monitor.sample_grid import SAMPLES
from trainer.monitor.sinks import scalars

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
      unusable: the files of which something is left out because it cannot be used.
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
    def steps_per_epoch(self) -> int | None:
        """None where the log does not say it."""
        return next((line["steps_per_epoch"] for line in self.of("session") if line.get("steps_per_epoch")), None)

    @functools.cached_property
    def deviations(self) -> list[AuditRow] | None:
        """The settings that differ from the recipe, as from `audit`; None where this version cannot read them."""
        if self.summary:
            return self.summary["deviations"]
        try:
            return audit(parse(["--config", str(self.folder / "config.yaml")]))
        except UserError:  # Another version has written it.
            return None


def read_run(folder: Path, name: str) -> RunRecord:
    """Read a run's folder. Raises a UserError if it is not one."""
    config, metrics = folder / "config.yaml", folder / METRICS
    if not (config.is_file() or metrics.is_file()):
        raise UserError(f"{folder}: not the folder of a run, it has no config.yaml. Give what --run.out was")
    lines, other_lines = split_json_lines(metrics, is_reportable)
    damaged, other_damaged = split_json_lines(folder / QUARANTINE, is_quarantine_line)
    summary = read_summary(folder / SUMMARY)
    try:
        settings = read_yaml(config) if config.is_file() else {}
    except UserError:
        settings = None
    sections = {key: value for key, value in (settings or {}).items() if isinstance(value, dict)}
    is_unusable = {
        METRICS: other_lines,
        QUARANTINE: other_damaged,
        SUMMARY: not summary and (folder / SUMMARY).exists(),
        "config.yaml": sections != settings,
    }
    if lines and summary and summary["step"] < lines[-1]["step"]:
        summary = {}  # It is an earlier session's.
    unusable = [file for file, is_partly in is_unusable.items() if is_partly]
    return RunRecord(folder, name, sections, lines, summary, len(damaged), unusable)


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write PAGE and the pictures to `out`, over those that are there. Returns the page's path.

    Raises:
      UserError: a folder is none of a run, or `out` cannot be made.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, with_escaped_bytes(name)) for folder, name in zip(folders, names, strict=True)]
    for run in runs:
        if run.unusable:
            write_error_line(f"note: {run.folder}: what cannot be used of {', '.join(run.unusable)} is left out")
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


def charts(runs: Sequence[RunRecord], kinds: Sequence[Chart] = CHARTS) -> list[Chart]:
    """The pictures of these kinds for which there are numbers; runs of one name have one color."""
    in_epochs = all(run.steps_per_epoch for run in runs)
    marks, curves = [], {chart.name: [] for chart in kinds}
    names = [*dict.fromkeys(run.name for run in runs)]
    for run in runs:
        scale = run.steps_per_epoch if in_epochs and run.steps_per_epoch else 1
        color = None if len(runs) == 1 else names.index(run.name)
        marks += [(line["kind"], color, line["step"] / scale) for line in run.of("session")[1:] + run.of("rollback")]
        for chart in kinds:
            curves[chart.name] += _curves(chart, run, color, scale)
    x_label = "epoch" if in_epochs else "step"
    return [
        dataclasses.replace(chart, x_label=x_label, curves=curves[chart.name], marks=marks)
        for chart in kinds
        if curves[chart.name]
    ]


def _curves(chart: Chart, run: RunRecord, color: int | None, scale: int) -> Iterator[Curve]:
    """A run's curves in a chart; without a color of the run each curve gets its own."""
    for i, (label, key) in enumerate(chart.series.items()):
        values = [(line["step"] / scale, dict(scalars(line)).get(key)) for line in run.lines]
        points = [(x, y) for x, y in values if y is not None and abs(y) < _MOST_DRAWN]
        if points:
            x, y = np.array(points).T
            name = label if color is None else ", ".join(filter(None, (run.name, label)))
            yield Curve(name, i if color is None else color, x, y, is_dashed=i > 0)


def numbers(run: RunRecord) -> dict[str, str]:
    """The results of a run in words, in the order of the page."""
    train, evals, sessions = run.of("train"), run.of("eval"), run.of("session")
    total = next((each["total_steps"] for each in (run.summary, *sessions[-1:]) if "total_steps" in each), None)
    step = run.lines[-1]["step"] if run.lines else 0
    state = f"not finished; last line {_clock(run.lines[-1].get('time'))}" if run.lines else "not finished"
    if run.summary:
        state = "finished" if run.summary["finished"] else f"stopped after step {step:,}"
    last = evals[-1] if evals else {}
    speeds, waits = ([line[key] for line in train] for key in ("images_per_s", "input_wait"))
    best = max(((e[w]["top1"], w, e["epoch"]) for e in evals for w in ("ema", "raw") if w in e), default=None)
    section = {name: run.config.get(name, {}) for name in ("student", "teacher")}
    return {
        "state": state,
        "student": section["student"].get("name", _NONE),
        "teacher": _teacher(section["teacher"]),
        "steps done": f"{step:,} of {total:,}" if total else f"{step:,}",
        "top-1, EMA weights": f"{last['ema']['top1']:.2f} %" if "ema" in last else _NONE,
        "top-1, raw weights": f"{last['raw']['top1']:.2f} %" if "raw" in last else _NONE,
        "best top-1": f"{best[0]:.2f} % ({best[1]}, epoch {best[2]})" if best else _NONE,
        "training loss, last line": f"{train[-1]['loss']:.4f}" if train else _NONE,
        "images/s, median": f"{statistics.median(speeds):,.0f}" if speeds else _NONE,
        "waiting for input, mean": f"{100 * statistics.mean(waits):.1f} %" if waits else _NONE,
        "from the first line to the last": _duration(run.lines),
        "restarts": str(max(0, len(sessions) - 1)),
        "went back to a checkpoint": str(len(run.of("rollback"))),
        "ranks, latest session": _ranks(sessions[-1]) if sessions else _NONE,
        "damaged images": str(run.num_damaged),
        "settings other than the USI recipe's": _NONE if run.deviations is None else str(len(run.deviations)),
    }


def _teacher(section: dict) -> str:
    name = section.get("name") or "none, labels alone"
    return f"{name}, recorded in {section['store']}" if section.get("store") else name


def _ranks(session: dict) -> str:
    return f"{session.get('ranks', '?')} x {session.get('device', '?')}"


def _clock(unix_s: float | None) -> str:
    if unix_s is None:
        return _NONE
    return f"{datetime.datetime.fromtimestamp(unix_s, datetime.timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _duration(lines: list[dict]) -> str:
    times = [line["time"] for line in lines if "time" in line]
    return str(datetime.timedelta(seconds=round(max(times) - min(times)))) if times else _NONE


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
    return template(Path(__file__).with_name("page.html")).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=runs,
        numbers={key: [column[key] for column in columns] for key in columns[0]},
        differing=differing_settings(runs),
        pictures={title: embedded(content) for title, content in pictures.values()},
        strips={name: embedded(content) for name, content in strips.items()},
        summaries={run.name: text(run.summary, indent=1) for run in runs if run.summary},
        written=_clock(datetime.datetime.now().timestamp()),
    )


@functools.cache
def template(path: Path) -> jinja2.Template:
    """A page in HTML, which may extend the base.html that lies here."""
    loader = jinja2.FileSystemLoader([path.parent, Path(__file__).parent])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters |= {"clock": _clock, "setting": text, "ranks": _ranks}
    return environment.get_template(path.name)


def text(value: object, indent: int | None = None) -> str:
    """A setting as the command line takes it: JSON, also of values that JSON has not, such as a date."""
    try:
        return value if isinstance(value, str) else json.dumps(value, indent=indent, default=str)
    except (TypeError, ValueError, RecursionError):  # A key is not text, or a list contains itself.
        return clipped(value)


def embedded(png: bytes) -> str:
    """A picture as the address of itself, for a page that needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
