"""Draws accuracy over speed with the Pareto front, as a PNG and as an interactive page.

Plotly is imported when it is used.
"""

import html
from collections.abc import Sequence
from typing import Any

from tools.lib.common import front
from tools.lib.common.front import ACCURACY, COLORS, FRONT, LEGEND, LINES, SPEED, Point
from tools.lib.compare.results import Row, by_backend, settings_in_words

_LEGEND = {False: "given with --accuracy", True: "published by the paper"}


def plotted(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """The points of each backend, by its settings in words: its rows that have an accuracy."""
    known = by_backend([row for row in rows if row.top1 is not None]).values()
    return {settings_in_words(mine): [_point(row) for row in mine if row.top1 is not None] for mine in known}


def _point(row: Row) -> Point:
    assert row.top1 is not None
    speeds = row.images_per_s, row.min, row.max
    return Point(row.model, row.top1, *speeds, row.front, is_published=row.top1_is_the_papers, details=_details(row))


def picture(rows: Sequence[Row], machine: str) -> bytes:
    """A PNG with a panel for each backend.

    Args:
      machine: in words, for the title.
    """
    return front.picture(plotted(rows), f"Accuracy and speed on {machine}", _LEGEND)


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
            "label": backend,
            "method": "update",
            "args": [{"visible": [backend == other for other in of_trace]}, {"xaxis.range": front.powers_shown(mine)}],
        }
        for backend, mine in groups.items()
    ]
    place = {"direction": "down", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "showactive": True}
    figure.update_layout(
        title={"text": f"Accuracy and speed on {html.escape(machine)}", "x": 0.01},
        xaxis={
            "type": "log",
            "title": SPEED,
            "range": front.powers_shown(next(iter(groups.values()))),
            "tickvals": [m * 10.0**e for e in range(-2, 7) for m in (1, 2, 5)],
        },
        yaxis={"title": ACCURACY},
        updatemenus=[{"buttons": buttons, **place}],
        legend={"orientation": "h", "y": -0.12},
        margin={"t": 120, "r": 170},  # The name of the last point stands in the margin.
        template="plotly_white",
        hoverlabel={"align": "left"},
    )
    shown = {"displaylogo": False, "responsive": True}
    return figure.to_html(include_plotlyjs=True, full_html=True, default_height="90vh", config=shown)


def _traces(points: Sequence[Point]) -> list[dict[str, Any]]:
    """A backend's front, and its models by where their accuracy comes from, as arguments of plotly's Scatter."""
    found: list[dict[str, Any]] = [
        {
            "x": [speed for speed, _ in line],
            "y": [top1 for _, top1 in line],
            "mode": "lines",
            "line": {"color": COLORS[FRONT], "width": 2, "dash": "solid" if is_sure else "dash"},
            "name": LINES[is_sure][1],
            "hoverinfo": "skip",
        }
        for is_sure, line in front.front_lines(points).items()
    ]
    for published, mine in front.by_origin(points).items():
        colors = [COLORS[point.front] for point in mine]
        shape = "diamond-open" if published else "circle"
        found.append(
            {
                "x": [point.images_per_s for point in mine],
                "y": [point.top1 for point in mine],
                "mode": "markers+text",
                "text": [html.escape(front.short(point.model)) if point.front else "" for point in mine],
                "textposition": "top right",
                "cliponaxis": False,
                "marker": {"symbol": shape, "size": 11, "color": colors, "line": {"width": 2, "color": colors}},
                "name": _LEGEND[published],
                "hovertext": [point.details for point in mine],
                "hoverinfo": "text",
            }
        )
    return found


def _details(row: Row) -> str:
    return (
        f"<b>{html.escape(row.model)}</b><br>top-1 {row.top1:g} % ({html.escape(row.top1_from)})"
        f"<br>{row.images_per_s:,.1f} images/s ({row.min:,.1f} to {row.max:,.1f})"
        f"<br>{row.latency_ms:.2f} ms for one image<br>{row.parameters_m:.2f} M parameters"
        f"<br>{row.gmacs:.3f} GMACs at {row.image_size} px<br>{row.peak_memory_mib:,.0f} MiB at most"
        f"<br>{LEGEND[row.front]}"
    )
