"""Draws accuracy over speed with the Pareto front, as a PNG and as an interactive page.

Plotting packages are imported when they are used.
"""

import html
import io
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from tools.lib.compare.results import Row, by_backend, settings_in_words

# Okabe and Ito, Color Universal Design (2008)
_FRONT, _OTHER = "#D55E00", "#0072B2"
_SPEED, _ACCURACY = "images/s (logarithmic)", "top-1 accuracy, %"
_FRONT_LEGEND = "front: none is faster and as accurate"
_LEGEND = {False: "given with --accuracy", True: "published by the paper"}


def plotted(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each backend that have an accuracy."""
    return by_backend([row for row in rows if row.top1 is not None])


def short(label: str) -> str:
    """A model's name for a picture: a path is reduced to its end."""
    return "/".join(PurePath(label).parts[-2:])


def picture(rows: Sequence[Row], machine: str) -> bytes:
    """A PNG with a panel for each backend.

    Args:
      machine: in words, for the title.
    """
    from matplotlib.figure import Figure  # Without pyplot there is no window and no state.

    groups, legend = plotted(rows), {}
    figure = Figure(figsize=(8, 0.9 + 4.6 * len(groups)), dpi=160, layout="constrained")
    figure.suptitle(f"Accuracy and speed on {machine}", x=0.02, ha="left", fontsize=12, fontweight="bold")
    panels = figure.subplots(len(groups), squeeze=False)[:, 0]
    for axes, mine in zip(panels, groups.values(), strict=True):
        _draw(axes, mine)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_title(settings_in_words(rows), loc="left", fontsize=10)
    front = _front(rows)
    axes.plot([row.images_per_s for row in front], [row.top1 for row in front], color=_FRONT, label=_FRONT_LEGEND)
    for published, mine in _by_origin(rows).items():
        colors = [_FRONT if row.on_front else _OTHER for row in mine]
        axes.scatter(
            [row.images_per_s for row in mine],
            [row.top1 for row in mine],
            marker="D" if published else "o",
            edgecolors=colors,
            facecolors="white" if published else colors,
            label=_LEGEND[published],
            zorder=3,
        )
    for row in rows:
        # Names of the front stand above the line, the others below their markers. A path may hold a $.
        place = {"xytext": (5, 5), "va": "bottom"} if row.on_front else {"xytext": (5, -5), "va": "top"}
        label = {"fontsize": 8, "color": _FRONT if row.on_front else "0.25", "parse_math": False}
        axes.annotate(short(row.model), (row.images_per_s, row.top1), textcoords="offset points", **place, **label)
    axes.set_xscale("log")
    axes.set_xlim(*(10**power for power in _powers_shown(rows)))
    axes.margins(y=0.12)
    axes.set_xlabel(_SPEED)
    axes.set_ylabel(_ACCURACY)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.tick_params(color="0.6", labelcolor="0.25", labelsize=8, length=3, pad=3)
    axes.set_axisbelow(True)


def _powers_shown(rows: Sequence[Row]) -> list[float]:
    """The ends of the axis, powers of ten: far enough apart for one of 1, 2 and 5 of a decade, and for names."""
    speeds = [math.log10(row.images_per_s) for row in rows]
    low, high = min(speeds), max(speeds)
    margin = max(0.14 * (high - low), 0.5 * (math.log10(4) - (high - low)))
    return [low - margin, high + margin]


def _front(rows: Sequence[Row]) -> list[Row]:
    return sorted((row for row in rows if row.on_front), key=lambda row: row.images_per_s)


def _by_origin(rows: Sequence[Row]) -> dict[bool, list[Row]]:
    """The rows by whether the paper gives their accuracy."""
    found: dict[bool, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.top1_is_the_papers):
        found.setdefault(row.top1_is_the_papers, []).append(row)
    return found


def page(rows: Sequence[Row], machine: str) -> str:
    """A page that needs no other file and no network: hover over a model, choose a backend. Needs plotly."""
    from plotly import graph_objects

    groups = plotted(rows)
    figure, of_trace = graph_objects.Figure(), []
    for backend, mine in groups.items():
        traces = _traces(mine)
        of_trace += [backend] * len(traces)
        for trace in traces:
            figure.add_trace(graph_objects.Scatter(visible=backend == next(iter(groups)), **trace))
    buttons = [
        {
            "label": settings_in_words(mine),
            "method": "update",
            "args": [{"visible": [backend == other for other in of_trace]}, {"xaxis.range": _powers_shown(mine)}],
        }
        for backend, mine in groups.items()
    ]
    place = {"direction": "down", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "showactive": True}
    figure.update_layout(
        title={"text": f"Accuracy and speed on {html.escape(machine)}", "x": 0.01},
        xaxis={
            "type": "log",
            "title": _SPEED,
            "range": _powers_shown(next(iter(groups.values()))),
            "tickvals": [m * 10.0**e for e in range(-2, 7) for m in (1, 2, 5)],
        },
        yaxis={"title": _ACCURACY},
        updatemenus=[{"buttons": buttons, **place}],
        legend={"orientation": "h", "y": -0.12},
        margin={"t": 120, "r": 170},  # The name of the last point stands in the margin.
        template="plotly_white",
        hoverlabel={"align": "left"},
    )
    shown = {"displaylogo": False, "responsive": True}
    return figure.to_html(include_plotlyjs=True, full_html=True, default_height="90vh", config=shown)


def _traces(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A backend's front, and its models by where their accuracy comes from, as arguments of plotly's Scatter."""
    front = _front(rows)
    found = [
        {
            "x": [row.images_per_s for row in front],
            "y": [row.top1 for row in front],
            "mode": "lines",
            "line": {"color": _FRONT, "width": 2},
            "name": _FRONT_LEGEND,
            "hoverinfo": "skip",
        }
    ]
    for published, mine in _by_origin(rows).items():
        colors = [_FRONT if row.on_front else _OTHER for row in mine]
        shape = "diamond-open" if published else "circle"
        found.append(
            {
                "x": [row.images_per_s for row in mine],
                "y": [row.top1 for row in mine],
                "mode": "markers+text",
                "text": [html.escape(short(row.model)) if row.on_front else "" for row in mine],
                "textposition": "top right",
                "cliponaxis": False,
                "marker": {"symbol": shape, "size": 11, "color": colors, "line": {"width": 2, "color": colors}},
                "name": _LEGEND[published],
                "hovertext": [_hover(row) for row in mine],
                "hoverinfo": "text",
            }
        )
    return found


def _hover(row: Row) -> str:
    unsure = "" if row.front_is_sure else ", not surely faster than each more accurate one"
    front = f"<br>on the front{unsure}" if row.on_front else ""
    return (
        f"<b>{html.escape(row.model)}</b><br>top-1 {row.top1:g} % ({html.escape(row.top1_from)})"
        f"<br>{row.images_per_s:,.1f} images/s ({row.min:,.1f} to {row.max:,.1f})"
        f"<br>{row.latency_ms:.2f} ms for one image<br>{row.parameters_m:.2f} M parameters"
        f"<br>{row.gmacs:.3f} GMACs at {row.image_size} px<br>{row.peak_memory_mib:,.0f} MiB at most{front}"
    )
