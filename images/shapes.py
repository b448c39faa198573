"""What the pictures of this folder are made of: colours, boxes, lines, text.

Coordinates are pixels of the picture as it is shown, y downwards.
"""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

INK, LINE, PANEL = "#1e293b", "#94a3b8", "#f6f8fb"
WHITE, IDLE, ROUTED, SHARED, DENSE = "#ffffff", "#d3dbe6", "#0f766e", "#f59e0b", "#64748b"
PALE_ROUTED, PALE_SHARED, PALE_DENSE = "#dcf4f0", "#fef0cf", "#e8edf3"

Point = tuple[float, float]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A white card with round corners; transparent outside, for light and dark pages."""
    figure = plt.figure(figsize=(width / 100, height / 100))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    box(ax, 1, 1, width - 2, height - 2, edge="#e2e8f0", radius=14)
    return figure, ax


def write(ax: Axes, x: float, y: float, text: str, size: float = 11.5, **style: str) -> float:
    """`size` in pixels, as the coordinates; returns where the text ends on the right."""
    style = {"color": INK, "ha": "center", "va": "center", **style}
    written = ax.text(x, y, text, fontsize=size * 0.72, zorder=6, linespacing=1.35, **style)
    return written.get_window_extent().transformed(ax.transData.inverted()).x1


def box(
    ax: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    fill: str = WHITE,
    edge: str = LINE,
    radius: float = 6,
) -> None:
    shape = f"round,pad=0,rounding_size={radius}"
    ax.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=fill, ec=edge, lw=0.9, zorder=3))
    write(ax, x + width / 2, y + height / 2, text)


def node(ax: Axes, x: float, y: float, sign: str) -> None:
    ax.add_patch(Circle((x, y), 11, fc=WHITE, ec=INK, lw=1.0, zorder=4))
    write(ax, x, y, sign, 14)


def wire(ax: Axes, *points: Point, color: str = INK, head: bool = True) -> None:
    """A line through the points, with an arrow head at the last."""
    ax.add_patch(
        FancyArrowPatch(
            path=Curve(points),
            arrowstyle="-|>,head_length=4,head_width=2" if head else "-",
            color=color,
            lw=1.0,
            zorder=4,
            shrinkA=0,
            shrinkB=0,
        )
    )


def flow(ax: Axes, start: Point, end: Point, color: str) -> None:
    """A curve that leaves and arrives upright."""
    middle = (start[1] + end[1]) / 2
    points = [start, (start[0], middle), (end[0], middle), end]
    path = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3])
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-", color=color, lw=1.1, zorder=3))


def hop(ax: Axes, start: Point, first: Point, last: Point, end: Point, color: str) -> None:
    """A curve from `start`, straight from `first` to `last`, a curve to `end`."""
    knee, knee2 = (start[0] + first[0]) / 2, (last[0] + end[0]) / 2
    points = [start, (knee, start[1]), (knee, first[1]), first, last]
    points += [(knee2, last[1]), (knee2, end[1]), end]
    codes = [Curve.MOVETO, *[Curve.CURVE4] * 3, Curve.LINETO, *[Curve.CURVE4] * 3]
    path = Curve(points, codes)
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-", color=color, lw=1.1, zorder=3))
