"""Accuracy over speed, and the front: a picture, and a page to hover over. Plotting packages are imported when used."""

import html
import io
import math
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from tools.lib.compare.results import by_backend, how

# Okabe and Ito, Color Universal Design (2008)
_FRONT, _OTHER = "#D55E00", "#0072B2"
_SPEED, _ACCURACY = "images/s (logarithmic)", "top-1 accuracy, %"
_LEGEND = {False: "given with --accuracy", True: "published by the paper"}
_PLACES = [  # of a label, in points from its marker: offset, horizontal and vertical alignment
    ((7, 0), "left", "center"),
    ((-7, 0), "right", "center"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
    ((6, 6), "left", "bottom"),
    ((-6, 6), "right", "bottom"),
    ((6, -6), "left", "top"),
    ((-6, -6), "right", "top"),
    ((16, 16), "left", "bottom"),
    ((-16, -16), "right", "top"),
    ((16, -16), "left", "top"),
    ((-16, 16), "right", "bottom"),
    ((0, 24), "center", "bottom"),
    ((0, -24), "center", "top"),
]
_FAR = [offset for offset, _, _ in _PLACES[8:]]  # a line leads there


def plotted(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of each backend that have an accuracy."""
    groups = {name: [row for row in mine if row["top1"] is not None] for name, mine in by_backend(rows).items()}
    return {name: mine for name, mine in groups.items() if mine}


def short(label: str) -> str:
    """A model's name for a picture: of a path the end."""
    return "/".join(PurePath(label).parts[-2:])


def picture(rows: Sequence[dict], machine: str) -> bytes:
    """A PNG with a panel for each backend.

    Args:
      machine: in words, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    groups = plotted(rows)
    figure = Figure(figsize=(8, 0.9 + 4.6 * len(groups)), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(f"Accuracy and speed on {machine}", x=0.02, ha="left", fontsize=12, fontweight="bold")
    panels = figure.subplots(len(groups), squeeze=False)[:, 0]
    for axes, (backend, mine) in zip(panels, groups.items(), strict=True):
        _draw(axes, backend, mine)
    _add_legend(figure, [row for mine in groups.values() for row in mine])
    canvas.draw()  # settles the layout: labels are placed in pixels
    figure.set_layout_engine("none")
    for axes, mine in zip(panels, groups.values(), strict=True):
        _label(axes, mine)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes, backend: str, rows: list[dict]) -> None:
    axes.set_title(f"{backend}: {how(rows)}", loc="left", fontsize=10)
    front = _front(rows)
    axes.plot([row["images_per_s"] for row in front], [row["top1"] for row in front], color=_FRONT, linewidth=1.4)
    for row in rows:
        color = _FRONT if row["on_front"] else _OTHER
        fill = "white" if row["top1_is_the_papers"] else color
        axes.plot(
            row["images_per_s"],
            row["top1"],
            marker="D" if row["top1_is_the_papers"] else "o",
            color=color,
            markerfacecolor=fill,
            markersize=6,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_xlim(*_speeds_shown(rows))
    accuracies = [row["top1"] for row in rows]
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


def _speeds_shown(rows: list[dict]) -> tuple[float, float]:
    """The ends of the axis, images/s: far enough apart for one of 1, 2 and 5 of a decade, and for names."""
    speeds = [row["images_per_s"] for row in rows]
    factor = max((max(speeds) / min(speeds)) ** 0.14, (4 * min(speeds) / max(speeds)) ** 0.5)
    return min(speeds) / factor, max(speeds) * factor


def _minor_tick(value: float, _) -> str:
    """2 and 5 of each decade."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _front(rows: list[dict]) -> list[dict]:
    return sorted((row for row in rows if row["on_front"]), key=lambda row: row["images_per_s"])


def _label(axes, rows: list[dict]) -> None:
    """Each model's name where it hides no marker, line or other name, as far as there is such a place."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    points = axes.transData.transform([(row["images_per_s"], row["top1"]) for row in rows])
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in points]
    line = axes.transData.transform([(row["images_per_s"], row["top1"]) for row in _front(rows)])
    taken += [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in _along(line)]
    inside = axes.get_window_extent(renderer)
    for row in sorted(rows, key=lambda row: not row["on_front"]):
        best = None
        for offset, horizontal, vertical in _PLACES:
            text = axes.annotate(
                short(row["model"]),
                (row["images_per_s"], row["top1"]),
                xytext=offset,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8,
                color=_FRONT if row["on_front"] else "0.25",
                arrowprops=_line_to(horizontal, vertical) if offset in _FAR else None,
                parse_math=False,  # a path may hold a $
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line that may lead there
            cost = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, inside)
            if best is None or cost < best[0]:
                if best:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if cost <= 0:
                break
        taken.append(best[2])


def _line_to(horizontal: str, vertical: str) -> dict:
    """A line from a marker to the near end of its name."""
    end = ({"left": 0, "center": 0.5, "right": 1}[horizontal], {"bottom": 0, "top": 1}[vertical])
    return {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "relpos": end}


def _along(corners: np.ndarray) -> np.ndarray:
    """Points of a line a few pixels apart: [n, 2] of its corners [m, 2]."""
    steps = np.linspace(0, 1, 100)[:, None]
    return np.concatenate([a + steps * (b - a) for a, b in zip(corners, corners[1:], strict=False)] or [corners])


def _overlap(a, b) -> float:
    """Pixels that two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def _add_legend(figure, rows: list[dict]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_FRONT, linewidth=1.4, label="front: none is faster and as accurate")]
    for published in sorted({row["top1_is_the_papers"] for row in rows}):
        look = {"marker": "D" if published else "o", "markerfacecolor": "white" if published else _OTHER}
        handles.append(Line2D([], [], color=_OTHER, linestyle="", **look, label=_LEGEND[published]))
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8)


def page(rows: Sequence[dict], machine: str) -> str:
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
            "label": f"{html.escape(backend)}: {how(mine)}",
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
        margin={"t": 120, "r": 170},  # names begin at the last point
        template="plotly_white",
        hoverlabel={"align": "left"},
    )
    shown = {"displaylogo": False, "responsive": True}
    return figure.to_html(include_plotlyjs=True, full_html=True, default_height="90vh", config=shown)


def _powers(rows: list[dict]) -> list[float]:
    """`_speeds_shown` as plotly has it for a logarithmic axis."""
    return [math.log10(speed) for speed in _speeds_shown(rows)]


def _traces(rows: list[dict]) -> list[dict]:
    """A backend's front, and its models by where their accuracy comes from, as arguments of plotly's Scatter."""
    front = _front(rows)
    found = [
        {
            "x": [row["images_per_s"] for row in front],
            "y": [row["top1"] for row in front],
            "mode": "lines",
            "line": {"color": _FRONT, "width": 2},
            "name": "front: none is faster and as accurate",
            "hoverinfo": "skip",
        }
    ]
    for published in sorted({row["top1_is_the_papers"] for row in rows}):
        mine = [row for row in rows if row["top1_is_the_papers"] == published]
        colors = [_FRONT if row["on_front"] else _OTHER for row in mine]
        shape = "diamond-open" if published else "circle"
        found.append(
            {
                "x": [row["images_per_s"] for row in mine],
                "y": [row["top1"] for row in mine],
                "mode": "markers+text",
                "text": [html.escape(short(row["model"])) if row["on_front"] else "" for row in mine],
                "textposition": "top right",
                "cliponaxis": False,
                "marker": {"symbol": shape, "size": 11, "color": colors, "line": {"width": 2, "color": colors}},
                "name": _LEGEND[published],
                "hovertext": [_hover(row) for row in mine],
                "hoverinfo": "text",
            }
        )
    return found


def _hover(row: dict) -> str:
    unsure = "" if row["front_is_sure"] else ", not surely faster than each more accurate one"
    front = f"<br>on the front{unsure}" if row["on_front"] else ""
    return (
        f"<b>{html.escape(row['model'])}</b><br>top-1 {row['top1']:g} % ({html.escape(row['top1_from'])})"
        f"<br>{row['images_per_s']:,.1f} images/s ({row['min']:,.1f} to {row['max']:,.1f})"
        f"<br>{row['latency_ms']:.2f} ms for one image<br>{row['parameters_m']:.2f} M parameters"
        f"<br>{row['gmacs']:.3f} GMACs at {row['image_size']} px<br>{row['peak_memory_mib']:,.0f} MiB at most{front}"
    )
