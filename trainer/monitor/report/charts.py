"""Curves of one run or several as PNGs. matplotlib is imported only when something is drawn."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np

# These are Okabe and Ito, Color Universal Design (2008), without the yellow: it is too light for a line on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "s^Dv"  # They distinguish curves of the same color, from the eighth on.
_MARKS = {"session": ("restarted", (0, (4, 3))), "rollback": ("went back to a checkpoint", (0, (1, 1.5)))}
_MANY_POINTS = 100  # A noisy curve of at least this many points gets its moving average drawn over it.


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A line in a chart; the curves of one run have the same number of a color when several runs are compared."""

    label: str
    color: int
    x: np.ndarray
    y: np.ndarray
    is_dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
      name: of its file, without the ending.
      title, x_label, y_label: with units.
      series: for each curve of a run its label, and its name in trainer.monitor.sinks.scalars.
      noisy: moving averages are drawn over the curves.
      from_zero: the y axis begins at 0.
      rims: curves may be equal and hide each other; earlier ones are drawn wider, and show as rims.
      marks: (kind of line in metrics.jsonl, color or None for gray, x) for each event of a run.
    """

    name: str
    title: str
    y_label: str
    series: dict[str, str]
    noisy: bool = False
    from_zero: bool = False
    rims: bool = False
    x_label: str = "step"
    curves: Sequence[Curve] = ()
    marks: Sequence[tuple[str, int | None, float]] = ()


CHARTS = (
    Chart("loss", "Training loss", "loss", {"": "train/loss"}, noisy=True),
    Chart("top1", "Validation accuracy", "top-1 (%)", {"EMA weights": "eval/ema/top1", "raw weights": "eval/raw/top1"}),
    Chart(
        "agreement",
        "Agreement on training images",
        "images (%)",
        {"teacher with labels": "train/teacher_top1", "student with teacher": "train/agreement"},
        noisy=True,
    ),
    Chart("lr", "Learning rate", "learning rate", {"": "train/lr"}, from_zero=True, rims=True),
    Chart("throughput", "Throughput", "images/s, all ranks", {"": "train/images_per_s"}, noisy=True, from_zero=True),
    Chart(
        "input_wait", "Waiting for input", "fraction of the time", {"": "train/input_wait"}, noisy=True, from_zero=True
    ),
)


def draw(chart: Chart) -> bytes:
    """The chart as a PNG of 864 x 576 pixels or more, for a legend of many runs; a phone shows it in full."""
    from matplotlib.figure import Figure  # Unlike pyplot it needs no window and has no state.

    entries = len(chart.curves) + len({kind for kind, _, _ in chart.marks})
    figure = Figure(figsize=(5.4, 3.6 + 0.1 * max(0, entries - 4)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for curve in chart.curves:
        _draw_curve(axes, curve, chart)
    for kind, color, x in chart.marks:
        label, dashes = _MARKS[kind]
        shade = "0.55" if color is None else _COLORS[color % len(_COLORS)]
        axes.axvline(x, label=label, color=shade, linestyle=dashes, linewidth=0.9, alpha=0.7, zorder=1)
    _dress(axes, chart)
    handles, labels = axes.get_legend_handles_labels()
    if unique := dict(zip(labels, handles, strict=True)):  # It is below the axes, where it hides nothing.
        columns = min(4, max(1, 54 // (8 + max(map(len, unique)))))
        figure.legend(unique.values(), unique, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def moving_average(values: np.ndarray) -> np.ndarray:
    """The mean around each value, over a fiftieth of them; at both ends over what there is."""
    half = max(1, len(values) // 100)
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    start, stop = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _draw_curve(axes, curve: Curve, chart: Chart) -> None:
    color, style = _COLORS[curve.color % len(_COLORS)], (0, (4, 2)) if curve.is_dashed else "-"
    look = {"color": color, "linestyle": style, "solid_capstyle": "round"}
    y = curve.y
    if chart.noisy and len(y) >= _MANY_POINTS:
        if len(chart.curves) <= 2:  # More curves would hide each other.
            axes.plot(curve.x, y, **look, linewidth=0.6, alpha=0.3)
        y = moving_average(y)
    label = _plain(curve.label) if len(chart.curves) > 1 else None  # The title names a single curve.
    marker = "o" if len(y) <= 12 else None
    if again := curve.color // len(_COLORS):
        marker = _MARKERS[(again - 1) % len(_MARKERS)]
    width = 1.7
    if chart.rims:
        width += 1.4 * (len(chart.curves) - 1 - chart.curves.index(curve))
    axes.plot(
        curve.x,
        y,
        **look,
        label=label,
        linewidth=min(width, 10.0),
        marker=marker,
        markersize=4,
        zorder=3,
        markevery=max(1, len(y) // 12),
    )


def _dress(axes, chart: Chart) -> None:
    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")
    axes.tick_params(color="0.6", labelcolor="0.25")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1.02 * max(curve.x[-1] for curve in chart.curves))
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)


def _plain(label: str) -> str:
    """A label that matplotlib shows unchanged: no formula between dollars, and not left out for its underscore."""
    return (" " if label[:1] == "_" else "") + label.replace("$", r"\$")
