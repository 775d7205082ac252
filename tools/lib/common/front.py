"""The front of accuracy and speed, and its picture. matplotlib is imported only when something is drawn."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Protocol, TypeVar

# Okabe and Ito, Color Universal Design (2008)
FRONT_COLOR, OTHER_COLOR = "#D55E00", "#0072B2"
SPEED, ACCURACY = "images/s (logarithmic)", "top-1 accuracy, %"
FRONT_LEGEND = "front: none is faster and as accurate"


class Plotted(Protocol):
    """A point of the picture.

    Attributes:
      model: its name; a path is reduced to its end.
      top1: percent, not None where it is plotted; top1_interval: low and high end of a bar, or None for no bar.
      top1_is_the_papers: whether the paper says so, which gives the point another marker.
      images_per_s: the speed.
      on_front: as `pareto_front` has found.
    """

    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def top1(self) -> float | None: ...  # noqa: D102
    @property
    def top1_interval(self) -> tuple[float, float] | None: ...  # noqa: D102
    @property
    def top1_is_the_papers(self) -> bool: ...  # noqa: D102
    @property
    def images_per_s(self) -> float: ...  # noqa: D102
    @property
    def on_front(self) -> bool | None: ...  # noqa: D102


P = TypeVar("P", bound=Plotted)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the front: no other is at least as accurate and at least as fast, and better in one.

    Args:
      points: accuracy and speed. Equal points are on the front together, or not at all.
    """

    def dominates(a: tuple, b: tuple) -> bool:
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    return [not any(dominates(other, point) for other in points) for point in points]


def front_of(points: Sequence[P]) -> list[P]:
    """The points on the front, from slow to fast."""
    return sorted((point for point in points if point.on_front), key=lambda point: point.images_per_s)


def by_origin(points: Sequence[P]) -> dict[bool, list[P]]:
    """The points by whether the paper gives their accuracy."""
    found: dict[bool, list[P]] = {}
    for point in sorted(points, key=lambda point: point.top1_is_the_papers):
        found.setdefault(point.top1_is_the_papers, []).append(point)
    return found


def short(label: str) -> str:
    """A model's name for a picture: a path is reduced to its end."""
    return "/".join(PurePath(label).parts[-2:])


def powers_shown(points: Sequence[Plotted]) -> list[float]:
    """The ends of the axis, powers of ten: far enough apart for one of 1, 2 and 5 of a decade, and for names."""
    speeds = [math.log10(point.images_per_s) for point in points]
    low, high = min(speeds), max(speeds)
    margin = max(0.14 * (high - low), 0.5 * (math.log10(4) - (high - low)))
    return [low - margin, high + margin]


def picture(panels: Mapping[str, Sequence[Plotted]], title: str, legend: Mapping[bool, str]) -> bytes:
    """A PNG with a panel for each backend.

    Args:
      panels: points by the panel's title.
      legend: words for points whose accuracy the paper does not give (False), and for those where it does (True).
    """
    from matplotlib.figure import Figure  # Without pyplot there is no window and no state.

    entries = {}
    figure = Figure(figsize=(8, 0.9 + 4.6 * len(panels)), dpi=160, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    drawn = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (name, points) in zip(drawn, panels.items(), strict=True):
        axes.set_title(name, loc="left", fontsize=10)
        _draw(axes, points, legend)
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes, points: Sequence[Plotted], legend: Mapping[bool, str]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    front = front_of(points)
    axes.plot([p.images_per_s for p in front], [p.top1 for p in front], color=FRONT_COLOR, label=FRONT_LEGEND)
    for published, mine in by_origin(points).items():
        colors = [FRONT_COLOR if point.on_front else OTHER_COLOR for point in mine]
        axes.scatter(
            [point.images_per_s for point in mine],
            [point.top1 for point in mine],
            marker="D" if published else "o",
            edgecolors=colors,
            facecolors="white" if published else colors,
            label=legend[published],
            zorder=3,
        )
    for point in points:
        color = FRONT_COLOR if point.on_front else OTHER_COLOR
        if point.top1_interval is not None:
            axes.vlines(point.images_per_s, *point.top1_interval, colors=color, linewidth=1, alpha=0.6)
        # Names of the front stand above the line, the others below their markers. A path may hold a $.
        place = {"xytext": (5, 5), "va": "bottom"} if point.on_front else {"xytext": (5, -5), "va": "top"}
        label = {"fontsize": 8, "color": color if point.on_front else "0.25", "parse_math": False}
        axes.annotate(
            short(point.model), (point.images_per_s, point.top1), textcoords="offset points", **place, **label
        )
    _dress(axes, points)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def _dress(axes, points: Sequence[Plotted]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*(10**power for power in powers_shown(points)))
    axes.margins(y=0.12)
    axes.set_xlabel(SPEED)
    axes.set_ylabel(ACCURACY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.tick_params(color="0.6", labelcolor="0.25", labelsize=8, length=3, pad=3)
    axes.set_axisbelow(True)
