"""Draws accuracy over speed with the Pareto front, as a PNG and as an interactive page.

Plotting packages are imported when they are used.
"""

import html
import io
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from tools.lib.compare.results import FailedRow, Row, by_backend, settings_in_words

# Okabe and Ito, Color Universal Design (2008)
_FRONT, _OTHER = "#D55E00", "#0072B2"
_SPEED, _ACCURACY = "images/s (logarithmic)", "top-1 accuracy, %"
_FRONT_LEGEND = "front: none is faster and as accurate"
_LEGEND = {False: "given with --accuracy", True: "published by the paper"}


def plotted(rows: Sequence[Row | FailedRow]) -> dict[str, list[Row]]:
    """The rows of each backend that have an accuracy."""
    groups = {name: [row for row in mine if row.top1 is not None] for name, mine in by_backend(rows).items()}
    return {name: mine for name, mine in groups.items() if mine}


def short(label: str) -> str:
    """A model's name for a picture: a path is reduced to its end."""
    return "/".join(PurePath(label).parts[-2:])


def picture(rows: Sequence[Row | FailedRow], machine: str) -> bytes:
    """A PNG with a panel for each backend.

    Args:
      machine: in words, for the title.
    """
    from matplotlib.figure import Figure  # Without pyplot there is no window and no state.

    groups = plotted(rows)
    figure = Figure(figsize=(8, 0.9 + 4.6 * len(groups)), dpi=160, layout="constrained")
    figure.suptitle(f"Accuracy and speed on {machine}", x=0.02, ha="left", fontsize=12, fontweight="bold")
    panels = figure.subplots(len(groups), squeeze=False)[:, 0]
    for axes, (backend, mine) in zip(panels, groups.items(), strict=True):
        _draw(axes, backend, mine)
    _add_legend(figure, [row for mine in groups.values() for row in mine])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes, backend: str, rows: Sequence[Row]) -> None:
    axes.set_title(f"{backend}: {settings_in_words(rows)}", loc="left", fontsize=10)
    front = _front(rows)
    axes.plot([row.images_per_s for row in front], [row.top1 for row in front], color=_FRONT, linewidth=1.4)
    for row in rows:
        color, label_color = (_FRONT, _FRONT) if row.on_front else (_OTHER, "0.25")
        axes.plot(
            row.images_per_s,
            row.top1,
            marker="D" if row.top1_is_the_papers else "o",
            color=color,
            markerfacecolor="white" if row.top1_is_the_papers else color,
            markersize=6,
            zorder=3,
        )
        # Names of the front stand above the line, the others below their markers. A path may hold a $.
        place = {"xytext": (5, 5), "va": "bottom"} if row.on_front else {"xytext": (5, -5), "va": "top"}
        label = {"fontsize": 8, "color": label_color, "parse_math": False, "textcoords": "offset points"}
        axes.annotate(short(row.model), (row.images_per_s, row.top1), **place, **label)
    axes.set_xscale("log")
    axes.set_xlim(*_speeds_shown(rows))
    accuracies = [row.top1 for row in rows if row.top1 is not None]
    margin = max(0.5, 0.12 * (max(accuracies) - min(accuracies)))
    axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)
    axes.set_xlabel(_SPEED)
    axes.set_ylabel(_ACCURACY)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(_minor_tick)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.tick_params(which="both", color="0.6", labelcolor="0.25", labelsize=8, length=3, pad=3)
    axes.set_axisbelow(True)


def _speeds_shown(rows: Sequence[Row]) -> tuple[float, float]:
    """The ends of the axis, images/s: far enough apart for one of 1, 2 and 5 of a decade, and for names."""
    speeds = [row.images_per_s for row in rows]
    factor = max((max(speeds) / min(speeds)) ** 0.14, (4 * min(speeds) / max(speeds)) ** 0.5)
    return min(speeds) / factor, max(speeds) * factor


def _minor_tick(value: float, _) -> str:
    """2 and 5 of each decade."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _front(rows: Sequence[Row]) -> list[Row]:
    return sorted((row for row in rows if row.on_front), key=lambda row: row.images_per_s)


def _add_legend(figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_FRONT, linewidth=1.4, label=_FRONT_LEGEND)]
    for published in sorted({row.top1_is_the_papers for row in rows}):
        marker, fill = ("D", "white") if published else ("o", _OTHER)
        label = _LEGEND[published]
        handles.append(Line2D([], [], color=_OTHER, linestyle="", marker=marker, markerfacecolor=fill, label=label))
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8)


def page(rows: Sequence[Row | FailedRow], machine: str) -> str:
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
            "label": f"{html.escape(backend)}: {settings_in_words(mine)}",
            "method": "update",
            "args": [{"visible": [backend == other for other in of_trace]}, {"xaxis.range": _powers(mine)}],
        }
        for backend, mine in groups.items()
    ]
    place = {"direction": "down", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "showactive": True}
    figure.update_layout(
        title={"text": f"Accuracy and speed on {html.escape(machine)}", "x": 0.01},
        xaxis={
            "type": "log",
            "title": _SPEED,
            "range": _powers(next(iter(groups.values()))),
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


def _powers(rows: Sequence[Row]) -> list[float]:
    """`_speeds_shown` as powers of ten, which plotly takes for a logarithmic axis."""
    return [math.log10(speed) for speed in _speeds_shown(rows)]


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
    for published in sorted({row.top1_is_the_papers for row in rows}):
        mine = [row for row in rows if row.top1_is_the_papers == published]
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
