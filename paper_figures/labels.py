"""Names where the eye is, instead of legends: at the ends of lines, and beside points."""

import random

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from .style import SMALL

Point = tuple[float, float, str, str]  # x, y, name, colour

# Where a point's name may stand, in points from the marker, best first: beside it, above, below, then further off.
PLACES = [(8, 4), (8, -5), (-8, 4), (-8, -5), (0, 6), (0, -6), (8, 14), (-8, 14), (8, -15), (-8, -15), (0, 17), (0, -17)]
PLACES += [(16, 22), (-16, 22), (16, -22), (-16, -22), (20, 0), (-20, 0), (0, 28), (0, -28)]
NEAR = 6  # of them need no line that leads to them
TRIES = 100


def name_points(ax: Axes, points: list[Point]) -> None:
    """Each name where it covers no marker, bar or other name, as near as can be; a hair line leads to one that is further off.

    Names take the first free place one by one; of several orders, the same ones each time, the one that leaves them nearest counts.

    Args:
        ax: as it will stay: the layout of its figure is settled.
        points: of each what to write beside it.
    """
    boxes = [possible_boxes(ax, point) for point in points]  # of each: (places, 4)
    fixed = np.array([box.extents for box in obstacles(ax, points)])
    order, chance, best = sorted(range(len(points)), key=lambda n: -len(points[n][2])), random.Random(0), (float("inf"), {})
    for _ in range(TRIES):
        best = min(best, placed(boxes, fixed, order, ax.bbox.extents), key=lambda found: found[0])
        order = chance.sample(order, len(order))
    for n, place in best[1].items():
        x, y, name, colour = points[n]
        lead = dict(arrowstyle="-", color=colour, linewidth=0.5, shrinkA=0, shrinkB=3) if place >= NEAR else None
        write(ax, points[n], PLACES[place], lead)


def write(ax: Axes, point: Point, place: tuple[int, int], lead: dict | None = None):
    """A name beside its point."""
    x, y, name, colour = point
    side = {1: "left", 0: "center", -1: "right"}[int(np.sign(place[0]))]
    height = "center" if place[0] else "bottom" if place[1] > 0 else "top"
    look = dict(textcoords="offset points", ha=side, va=height, fontsize=SMALL, color=colour, arrowprops=lead)
    return ax.annotate(name, (x, y), place, **look)


def possible_boxes(ax: Axes, point: Point) -> np.ndarray:
    """(places, 4): what a name would cover at each place, from x0, y0 to x1, y1 in pixels."""
    boxes = []
    for place in PLACES:
        note = write(ax, point, place)
        boxes.append(note.get_window_extent().extents)
        note.remove()
    return np.array(boxes)


def obstacles(ax: Axes, points: list[Point]) -> list[Bbox]:
    """What no name may cover: markers, dots, dotted lines, bars, and curves of a hundred points or more."""
    corners = ax.transData.transform([point[:2] for point in points])
    found = [Bbox.from_bounds(x - 7, y - 6, 14, 12) for x, y in corners]
    dots = [ax.transData.transform(line.get_xydata()) for line in ax.lines if line.get_marker() == "."]
    found += [Bbox.from_bounds(x - 4, y - 4, 8, 8) for places in dots for x, y in places]
    found += [line.get_window_extent().padded(2) for line in ax.lines if line.get_linestyle() == ":"]
    curves = [ax.transData.transform(line.get_xydata()) for line in ax.lines if len(line.get_xydata()) >= 100]
    found += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for curve in curves for x, y in curve]
    return found + [Bbox(ax.transData.transform(bar)).padded(3) for bars in ax.collections for bar in bars.get_segments()]


def placed(boxes: list[np.ndarray], fixed: np.ndarray, order: list[int], inside: np.ndarray) -> tuple[float, dict[int, int]]:
    """Names at their first free places, in an order.

    Args:
        boxes: of each name, as `possible_boxes` gives them.
        fixed: (obstacles, 4).
        order: of the names.
        inside: within what they must stay.

    Returns:
        How far off they stand in all, a name that finds no place counting most, and the place of each by number.
    """
    taken, cost, places = fixed, 0.0, {}
    for n in order:
        low, high = boxes[n][:, None, :2], boxes[n][:, None, 2:]  # (places, 1, 2)
        covers = ((low < taken[:, 2:]) & (high > taken[:, :2])).all(axis=2).any(axis=1)  # (places,)
        free = ~covers & (boxes[n][:, :2] >= inside[:2]).all(axis=1) & (boxes[n][:, 2:] <= inside[2:]).all(axis=1)
        places[n] = int(np.argmax(free)) if free.any() else len(PLACES) - 1
        cost += places[n] + (places[n] >= NEAR) * 5 + (not free.any()) * 1000
        taken = np.vstack([taken, boxes[n][places[n]]])
    return cost, places


def name_ends(ax: Axes, ends: list[Point]) -> None:
    """Names to the right of an axis, each led to by a hair line from the end of its line, moved apart where they would overlap.

    Args:
        ax: with its scales and limits as they will stay, in a figure with title and caption.
        ends: of each line where it ends and what to write there.
    """
    ax.figure.draw_without_rendering()  # settles how high the axes are
    places = ax.transAxes.inverted().transform(ax.transData.transform([end[:2] for end in ends]))[:, 1]
    line = 1.25 * SMALL * ax.figure.dpi / 72 / ax.bbox.height  # of text, as a share of the height
    heights = [line * (1 + name.count("\n") * 1.35) for _, _, name, _ in ends]  # with air around a name of several lines
    for (x, y, name, colour), place in zip(ends, moved_apart(places, heights)):
        lead = dict(arrowstyle="-", color=colour, linewidth=0.6, shrinkA=0, shrinkB=2, relpos=(0, 0.5))
        look = dict(textcoords="axes fraction", va="center", fontsize=SMALL, color=colour, arrowprops=lead)
        ax.annotate(name, (x, y), (1.04, place), **look)


def moved_apart(places: list[float], heights: list[float]) -> list[float]:
    """Where things of these heights stand that belong at these places of 0 to 1, without overlap, in the same order.

    Those that would overlap become one block, which is centred where its things belong on average.
    """
    blocks: list[tuple[list[int], float]] = []  # members from the lowest, and the block's centre
    for n in np.argsort(places, kind="stable"):
        members, centre = [n], float(np.clip(places[n], 0, 1))
        while blocks:
            below, middle = blocks[-1]
            tall, taller = (sum(heights[m] for m in group) for group in (members, below))
            if centre - tall / 2 >= middle + taller / 2:
                break
            blocks.pop()
            members, half = below + members, (tall + taller) / 2
            centre = float(np.clip(np.mean([places[m] for m in members]), half, max(1 - half, half)))
        blocks.append((members, centre))
    settled = [0.0] * len(places)
    for members, centre in blocks:
        bottom = centre - sum(heights[m] for m in members) / 2
        for m in members:
            settled[m] = bottom + heights[m] / 2
            bottom += heights[m]
    return settled
