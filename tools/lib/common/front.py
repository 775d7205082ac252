"""The front of accuracy and speed, and its picture. matplotlib is imported only when something is drawn."""

import collections
import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

FRONT, PERHAPS, BEHIND = "front", "front?", ""
# Okabe and Ito, Color Universal Design (2008)
COLORS = {FRONT: "#D55E00", PERHAPS: "#E69F00", BEHIND: "#0072B2"}
SPEED, ACCURACY = "images/s (logarithmic)", "top-1 accuracy, %"
# The style, and words, for the lines between points that are surely on the front, and for other lines of it.
LINES = {True: ("-", "Pareto front of the measured values"), False: ("--", "the same where noise decides")}
LEGEND = {FRONT: "surely on the front", PERHAPS: "front?: noise decides", BEHIND: "not on the front"}
_MARKERS = {False: "o", True: "D"}  # By whether the paper gives the accuracy.
# Where a name may stand: right (1) or left of its marker, above (1) or below it; and how far away, in points.
_SIDES = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)])
_GAPS = (4, 12, 24, 40)


@dataclasses.dataclass(frozen=True)
class Point:
    """A model in the picture.

    Attributes:
      model: its name; a path is reduced to its end.
      top1: percent; top1_interval: low and high end of its bar, or None for no bar.
      images_per_s: the speed; min, max: of its timed runs, the ends of its bar.
      front: FRONT where it is surely on the front, PERHAPS where noise decides, otherwise BEHIND.
      is_published: whether the paper gives its accuracy.
      details: HTML that an interactive page shows besides.
    """

    model: str
    top1: float
    images_per_s: float
    min: float
    max: float
    front: str
    top1_interval: tuple[float, float] | None = None
    is_published: bool = False
    details: str = ""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the front: no other is at least as accurate and at least as fast, and better in one.

    Args:
      points: accuracy and speed. Equal points are on the front together, or not at all.
    """

    def dominates(a: tuple, b: tuple) -> bool:
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    return [not any(dominates(other, point) for other in points) for point in points]


def front_lines(points: Sequence[Point]) -> dict[bool, list[tuple[float, float]]]:
    """The lines that join the front of the measured values, by whether both of their ends are surely on it.

    Returns:
      images/s and top-1 of the ends of each line, from slow to fast, and NaN behind it.
    """
    is_on = pareto_front([(point.top1, point.images_per_s) for point in points])
    on_front = sorted(itertools.compress(points, is_on), key=lambda point: point.images_per_s)
    found = collections.defaultdict(list)
    for ends in itertools.pairwise(on_front):
        is_sure = all(end.front == FRONT for end in ends)
        found[is_sure] += [*((end.images_per_s, end.top1) for end in ends), (math.nan, math.nan)]
    return found


def by_origin(points: Sequence[Point]) -> dict[bool, list[Point]]:
    """The points by whether the paper gives their accuracy."""
    origins = sorted({point.is_published for point in points})
    return {origin: [point for point in points if point.is_published == origin] for origin in origins}


def short(label: str) -> str:
    """A model's name for a picture: a path is reduced to its end."""
    return "/".join(PurePath(label).parts[-2:])


def powers_shown(points: Sequence[Point]) -> list[float]:
    """The ends of the axis, powers of ten: far enough apart for one of 1, 2 and 5 of a decade, and for names."""
    speeds = [math.log10(speed) for point in points for speed in (point.min, point.images_per_s, point.max)]
    low, high = min(speeds), max(speeds)
    margin = max(0.14 * (high - low), 0.5 * (math.log10(4) - (high - low)))
    return [low - margin, high + margin]


def picture(panels: Mapping[str, Sequence[Point]], title: str, legend: Mapping[bool, str]) -> bytes:
    """A PNG with a panel for each backend.

    Args:
      panels: points by the panel's title.
      legend: words for points whose accuracy the paper does not give (False), and for those where it does (True).
    """
    from matplotlib.figure import Figure  # Without pyplot there is no window and no state.
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(6.4, 1.1 + 4.2 * len(panels)), dpi=160, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    drawn = dict(zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True))
    for name, axes in drawn.items():
        axes.set_title(name, loc="left", fontsize=10)
        _draw(axes, panels[name])
    points = [*itertools.chain(*panels.values())]
    looks: dict[str, dict[str, Any]]
    looks = {words: {"linestyle": style, "color": COLORS[FRONT]} for style, words in LINES.values()}
    looks |= {legend[published]: {"color": "0.4", **_marker(published, "0.4")} for published in by_origin(points)}
    shown = [front for front in COLORS if any(point.front == front for point in points)]
    looks |= {LEGEND[front]: {"marker": "s", "color": COLORS[front]} for front in shown}
    entries = [Line2D([], [], label=words, **{"linestyle": "", **look}) for words, look in looks.items()]
    figure.legend(handles=entries, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    figure.draw_without_rendering()  # Now it is known where the points are.
    figure.set_layout_engine("none")
    for name, axes in drawn.items():
        _write_names(axes, panels[name])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _marker(published: bool, color: str) -> dict[str, Any]:
    return {"marker": _MARKERS[published], "markerfacecolor": "white" if published else color}


def _draw(axes, points: Sequence[Point]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for is_sure, line in front_lines(points).items():
        axes.plot(*zip(*line, strict=True), LINES[is_sure][0], color=COLORS[FRONT])
    for point in points:
        color = COLORS[point.front]
        for bar in _bars(point):
            axes.plot(*zip(*bar, strict=True), color=color, linewidth=1, alpha=0.6)
        axes.plot(point.images_per_s, point.top1, color=color, zorder=3, **_marker(point.is_published, color))
    _dress(axes, points)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def _write_names(axes, points: Sequence[Point]) -> None:
    """Write each name near its marker, where it covers little of markers, bars and other names."""
    from matplotlib.transforms import IdentityTransform

    pixels, transform = axes.figure.dpi / 72, axes.transData.transform  # A typographic point in pixels.
    lines = [(*bar, 0.5) for point in points for bar in _bars(point)]
    lines += [((point.images_per_s, point.top1), (point.images_per_s, point.top1), 4) for point in points]
    taken = np.array(
        [[*transform(start) - width * pixels, *transform(stop) + width * pixels] for start, stop, width in lines]
    )
    for point in points:
        marker = transform((point.images_per_s, point.top1))
        look = {"fontsize": 8, "color": "0.25", "va": "bottom", "transform": IdentityTransform()}
        name = axes.text(0, 0, short(point.model), parse_math=False, **look)  # A path may hold a $.
        size, costs = name.get_window_extent().size, {}
        for gap, side in itertools.product(_GAPS, _SIDES):
            corner = marker + gap * pixels * side + (side - 1) / 2 * size
            box = (*corner, *corner + size)
            outside = size.prod() - _overlaps(axes.bbox.extents[None], box).sum()
            costs[box] = _overlaps(taken, box).sum() + outside + 2 * gap * pixels**2
        best = np.array(min(costs, key=lambda box: costs[box]))
        name.set_position(best[:2])
        taken = np.vstack([taken, best])
        end = np.clip(marker, best[:2], best[2:])
        if np.hypot(*(end - marker)) > 10 * pixels:
            axes.plot(*zip(marker, end, strict=True), color="0.6", linewidth=0.6, transform=IdentityTransform())


def _bars(point: Point) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The ends of a point's bars: of the range of its speed, and of the interval of its accuracy."""
    low, high = point.top1_interval or (point.top1, point.top1)
    return [((point.min, point.top1), (point.max, point.top1)), ((point.images_per_s, low), (point.images_per_s, high))]


def _overlaps(boxes: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """The areas that boxes [N, 4] have in common with another box [4]; left, lower, right and upper end."""
    return np.clip(np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]), 0, None).prod(axis=1)


def _dress(axes, points: Sequence[Point]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*(10**power for power in powers_shown(points)))
    axes.margins(y=0.12)
    axes.set_xlabel(SPEED)
    axes.set_ylabel(ACCURACY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.tick_params(color="0.6", labelcolor="0.25", labelsize=8, length=3, pad=3)
    axes.set_axisbelow(True)
