"""The picture of accuracy and speed: names that can be read, and what the colors of points say."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from tools.lib.common import front
from tools.lib.common.front import BEHIND, FRONT, PERHAPS, Point


def point(name: str, top1: float, speed: float, standing: str = FRONT, **changes) -> Point:
    return Point(name, top1, speed, 0.9 * speed, 1.1 * speed, standing, **changes)


def crowd(count: int) -> list[Point]:
    random = np.random.default_rng(0)
    return [point(f"model_{i}", 80 + random.random(), 1000 + 10 * random.random()) for i in range(count)]


@pytest.mark.parametrize("points", [crowd(2), crowd(16), [point("a", 80.0, 9.0), point("b", 80.0, 9.0)]])
def test_names_cover_no_other_name_and_no_marker(points):
    figure = Figure(figsize=(8, 5), dpi=100)
    axes = figure.subplots()
    front._draw(axes, points)
    figure.draw_without_rendering()
    front._write_names(axes, points)
    names = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert {*names} == {each.model for each in points}
    for (_, one), (_, other) in itertools.combinations(names.items(), 2):
        assert not one.overlaps(other)
    for (_, box), each in itertools.product(names.items(), points):
        assert not box.contains(*axes.transData.transform((each.images_per_s, each.top1)))
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1


def lines(points: list[Point]) -> dict[bool, list[float]]:
    """The accuracies at the ends of the lines, by whether these points are surely on the front."""
    return {sure: [top1 for _, top1 in ends if top1 == top1] for sure, ends in front.front_lines(points).items()}


def test_the_lines_join_the_measured_front_whatever_noise_says():
    points = [point("a", 82.0, 5.0, PERHAPS), point("b", 81.0, 4.0, PERHAPS), point("c", 80.0, 9.0)]
    assert lines(points) == {False: [82.0, 80.0]}


def test_the_line_is_dashed_to_a_point_that_is_not_surely_on_the_front():
    points = [point("a", 82.0, 5.0), point("b", 81.0, 6.0), point("c", 80.0, 9.0, PERHAPS), point("d", 79.0, 10.0)]
    assert lines(points) == {True: [82.0, 81.0], False: [81.0, 80.0, 80.0, 79.0]}
    axes = Figure().subplots()
    front._draw(axes, points)
    drawn = {line.get_linestyle(): line.get_ydata() for line in axes.lines[:2]}
    assert np.isnan(drawn["-"][2]) and [*drawn["--"][:2]] == [81.0, 80.0]


def test_the_axis_has_room_for_all_timed_runs():
    low, high = front.powers_shown([Point("a", 80.0, 100.0, 10.0, 1000.0, FRONT)])
    assert 10**low < 10 and 10**high > 1000


def test_a_picture_shows_standing_origin_and_bars():
    usual = point("a $x$", 80.0, 10.0, BEHIND)
    changed = [point("a $x$", 80.0, 10.0), point("a $x$", 80.0, 10.0, BEHIND, is_published=True)]
    changed.append(point("a $x$", 80.0, 10.0, BEHIND, top1_interval=(79.0, 81.0)))
    changed.append(Point("a $x$", 80.0, 10.0, 9.0, 20.0, BEHIND))
    pictures = [front.picture({"eager": [each]}, "title", {False: "ours", True: "paper"}) for each in (usual, *changed)]
    assert all(each.startswith(b"\x89PNG") for each in pictures) and len({*pictures}) == len(pictures)
