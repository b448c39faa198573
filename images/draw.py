"""Draws the pictures of this folder: `python images/draw.py` (needs matplotlib).

Coordinates are pixels of the picture as it is shown, y downwards. The parameter counts are computed
here from the sizes of the published config; the speeds come from decode.json, which
benchmarks/decode.py writes.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.path import Path as Curve

FOLDER = Path(__file__).parent
INK, LINE, PANEL = "#1e293b", "#94a3b8", "#f6f8fb"
WHITE, IDLE, ROUTED, SHARED, DENSE = "#ffffff", "#d3dbe6", "#0f766e", "#f59e0b", "#64748b"
PALE_ROUTED, PALE_SHARED, PALE_DENSE = "#dcf4f0", "#fef0cf", "#e8edf3"

# DeepSeekMoE 16B: hidden size, layers, attention heads, vocabulary, width of layer 0's MLP, ...
D, LAYERS, HEADS, VOCAB, DENSE_WIDTH = 2048, 28, 16, 102_400, 10_944
# ... routed experts, experts a token, expert width, shared experts.
E, K, WIDTH, SHARED_EXPERTS = 64, 6, 1408, 2
PICKED = (5, 16, 24, 38, 47, 58)  # the experts that the drawn token goes to

Point = tuple[float, float]
Label = tuple[float, str, str]
"""y, text, colour."""


def main() -> None:
    matplotlib.use("agg")
    # A font that comes with matplotlib and a fixed salt for the SVG's ids: every run writes the
    # same bytes.
    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "deepseek-moe"})
    save(draw_logo(), "logo")
    save(draw_architecture(), "architecture")
    report = FOLDER / "decode.json"  # written by benchmarks/decode.py on a GPU
    if report.is_file():
        save(draw_decode(json.loads(report.read_text(encoding="utf-8"))), "decode")


def draw_logo() -> Figure:
    """A token on its way through 6 of 64 experts and the 2 that see every token."""
    figure, ax = canvas(684, 184)
    left, top, pitch, side = 92, 23, 14, 10.5
    right = left + 7 * pitch + side
    start, end = (38, 92), (256, 92)
    picked = {0: 4, 1: 1, 2: 6, 4: 3, 6: 5, 7: 2}  # row: column
    for row in range(8):
        y = top + pitch * row + side / 2
        if row in picked:
            hop(ax, start, (left - 6, y), (right + 6, y), end, ROUTED)
        for column in range(8):
            fill = ROUTED if picked.get(row) == column else IDLE
            box(ax, left + pitch * column, y - side / 2, side, side, fill=fill, edge=fill, radius=2)
    y = top + pitch * 8 + 10 + side / 2
    hop(ax, start, (left - 6, y), (right + 6, y), end, SHARED)
    for column in (3, 4):
        x = left + pitch * column
        box(ax, x, y - side / 2, side, side, fill=SHARED, edge=SHARED, radius=2)
    for x, y in (start, end):
        ax.add_patch(Circle((x, y), 9, fc=INK, ec=WHITE, lw=2, zorder=5))
    write(ax, 290, 92, "DeepSeek-MoE", 43, ha="left", weight="bold")
    return figure


def draw_architecture() -> Figure:
    """The model on the left, one MoE block enlarged on the right, the parameters below."""
    figure, ax = canvas(800, 606)
    draw_model(ax)
    corners = [(216, 308), (268, 18), (268, 476), (216, 344)]
    ax.add_patch(Polygon(corners, fc=ROUTED, alpha=0.1, zorder=3))  # the magnifying glass
    draw_moe_block(ax)
    draw_counts(ax)
    return figure


def draw_model(ax: Axes) -> None:
    x = 126
    write(ax, x, 32, "DeepSeekMoE 16B", 15, weight="bold")
    write(ax, x, 58, "token ids")
    wire(ax, (x, 67), (x, 82))
    box(ax, 36, 82, 180, 30, f"embedding, {VOCAB:,} × {D}")
    wire(ax, (x, 112), (x, 130))
    for top, title, mlp, fill in (
        (130, "layer 0", f"dense SwiGLU, {DENSE_WIDTH:,} wide", PALE_DENSE),
        (252, f"layers 1 to {LAYERS - 1}", "mixture of experts (MoE)", PALE_ROUTED),
    ):
        box(ax, 22, top, 208, 102, fill=PANEL, radius=10)
        write(ax, x, top + 13, title, weight="bold")
        box(ax, 36, top + 24, 180, 30, f"attention, {HEADS} heads, RoPE")
        wire(ax, (x, top + 54), (x, top + 63), head=False)
        box(ax, 36, top + 63, 180, 30, mlp, fill=fill)
        wire(ax, (x, top + 102), (x, top + 122))
    box(ax, 36, 374, 180, 26, "RMSNorm")
    wire(ax, (x, 400), (x, 416))
    box(ax, 36, 416, 180, 30, f"head, {D} × {VOCAB:,}")
    wire(ax, (x, 446), (x, 461))
    write(ax, x, 471, "scores of the next token")


def draw_moe_block(ax: Axes) -> None:
    """The second half of layers 1 to 27: normalise, route, send, add."""
    x, shared_x, residual_x = 460, 700, 772
    box(ax, 268, 14, 518, 466, fill=PANEL, radius=10)
    write(ax, 282, 34, "One MoE block", 15, ha="left", weight="bold")

    write(ax, x, 58, f"hidden state of a token ({D} numbers)")
    wire(ax, (x, 67), (x, 90))
    box(ax, x - 60, 90, 120, 26, "RMSNorm")
    wire(ax, (x, 116), (x, 146))
    gate = f"gate: a score for each expert (softmax over {E}),\nthe {K} largest are kept"
    box(ax, x - 148, 146, 296, 42, gate, fill=PALE_ROUTED)

    top, height, pitch = 236, 48, 5.2
    left = x - pitch * E / 2
    for expert in range(E):
        fill = ROUTED if expert in PICKED else IDLE
        bar = left + pitch * expert
        box(ax, bar, top, 4, height, fill=fill, edge="none", radius=1)
        if expert in PICKED:
            flow(ax, (x, 188), (bar + 2, top), ROUTED)
            flow(ax, (bar + 2, top + height), (x, 336), ROUTED)
    write(ax, 282, 342, f"{E} routed experts", ha="left", weight="bold")
    write(ax, 282, 367, f"each a SwiGLU {WIDTH} wide,\n{K} of them run", ha="left")
    wire(ax, (x + 148, 167), (638, 167), (638, 336), (x + 11, 336), color=ROUTED)
    write(ax, 558, 350, f"their {K} scores as weights")
    node(ax, x, 336, "Σ")

    wire(ax, (x, 131), (shared_x, 131), (shared_x, 194))
    box(ax, shared_x - 48, 194, 96, 134, fill=PALE_SHARED)
    write(ax, shared_x, 213, f"{SHARED_EXPERTS} shared\nexperts", weight="bold")
    for bar in (shared_x - 4.6, shared_x + 0.6):
        box(ax, bar, top, 4, height, fill=SHARED, edge="none", radius=1)
    write(ax, shared_x, 307, f"one SwiGLU\n{SHARED_EXPERTS * WIDTH} wide")
    wire(ax, (shared_x, 328), (shared_x, 386), (x + 11, 386))
    write(ax, 590, 400, "always run")

    wire(ax, (x, 347), (x, 375))
    node(ax, x, 386, "+")
    wire(ax, (x, 397), (x, 419))
    wire(ax, (x, 78), (residual_x, 78), (residual_x, 430), (x + 11, 430))
    write(ax, 590, 444, "residual")
    node(ax, x, 430, "+")
    wire(ax, (x, 441), (x, 457))
    write(ax, x, 467, "to the next layer")


def draw_counts(ax: Axes) -> None:
    """All and active parameters, as two bars of one scale."""
    expert = 3 * D * WIDTH
    routed = (LAYERS - 1) * E * expert
    active = (LAYERS - 1) * K * expert
    shared = (LAYERS - 1) * SHARED_EXPERTS * expert
    rest = LAYERS * 4 * D * D + 2 * VOCAB * D + 3 * D * DENSE_WIDTH  # attention, ends, layer 0
    rest += (LAYERS - 1) * E * D + (2 * LAYERS + 1) * D  # gates, norms
    total = routed + shared + rest

    left, pixels = 22, 764 / total
    for y, title, first in (
        (500, f"{total / 1e9:.2f} B parameters", routed),
        (554, f"{(active + shared + rest) / 1e9:.2f} B of them active for a token", active),
    ):
        write(ax, left, y, title, ha="left", weight="bold")
        x = left
        for part, fill in ((first, ROUTED), (shared, SHARED), (rest, DENSE)):
            box(ax, x, y + 10, part * pixels, 22, fill=fill, edge=WHITE, radius=2)
            x += part * pixels
    share = f"routed experts {routed / 1e9:.2f} B ({routed / total:.1%})".replace("%", " %")
    write(ax, left + routed * pixels / 2, 521, share, color=WHITE, weight="bold")
    x = left + (active + shared + rest) * pixels + 18
    for fill, text, width in (
        (ROUTED, f"{K} of {E} routed experts {active / 1e9:.2f} B", 206),
        (SHARED, f"shared experts {shared / 1e9:.2f} B", 164),
        (DENSE, f"everything else {rest / 1e9:.2f} B", 0),
    ):
        box(ax, x, 570, 10, 10, fill=fill, edge=fill, radius=2)
        write(ax, x + 16, 575, text, ha="left")
        x += width


def draw_decode(report: dict[str, Any]) -> Figure:
    """Tokens a second against the size of the batch, both by their logarithms: `report` is what
    benchmarks/decode.py writes. What it could not measure is left out."""
    figure, ax = canvas(460, 352)
    rows = sorted(report["decode"], key=lambda row: row["batch_size"])
    machine = report["machine"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "transformers")]
    source = f"{machine['hardware']}; {', '.join(versions)}; benchmarks/decode.py"
    write(ax, 20, 24, "Decoding: tokens/s in total", 15, ha="left", weight="bold")
    what = f"16B model in {rows[0]['weights']}, prompts of {report['prompt_tokens']} tokens"
    write(ax, 20, 45, what, 12, ha="left")
    write(ax, 20, 336, source, 10, ha="left", color=DENSE)

    speeds = [speed for row in rows for speed in measured(row).values()]
    low, high = math.log(min(speeds) / 1.5), math.log(max(speeds) * 1.2)
    widest = math.log(max(2, rows[-1]["batch_size"]))
    left, right, top, bottom = 122, 306, 66, 288

    def place(batch: int, speed: float) -> Point:
        x = left + (right - left) * math.log(batch) / widest
        return x, bottom - (bottom - top) * (math.log(speed) - low) / (high - low)

    for decade in range(math.ceil(low / math.log(10)), math.floor(high / math.log(10)) + 1):
        y = place(1, 10**decade)[1]
        ax.plot([56, right], [y, y], color=IDLE, lw=0.8, zorder=3)
        write(ax, 50, y, f"{10**decade:,}", 11, ha="right")
    for batch in {row["batch_size"] for row in rows}:
        write(ax, place(batch, 1)[0], bottom + 13, str(batch), 12)
    write(ax, (left + right) / 2, bottom + 31, "sequences at once", 12)

    ends: list[Label] = []
    for field, name, color, style in (
        ("limit_tokens_s", "memory limit", DENSE, "--"),
        ("tokens_s", "this engine", ROUTED, "-o"),
        ("stock_tokens_s", "transformers", SHARED, "-o"),
    ):
        whole = [r for r in rows if not r["weights"].startswith("int") and field in measured(r)]
        if not whole:
            continue
        points = [place(row["batch_size"], row[field]) for row in whole]
        ax.plot(*zip(*points, strict=True), style, color=color, lw=2, ms=5, zorder=4)
        for (x, y), row in zip(points, whole, strict=True):
            if row is whole[-1]:
                ends.append((y, f"{name} {row[field]:,.0f}", color))
            elif "o" in style:
                note(ax, x + 5, y + 11, f"{row[field]:,.0f}", ha="left", color=color)
    for y, text, color in spread(ends, 15):
        write(ax, right + 10, y, text, 11.5, ha="left", color=color, weight="bold")
    for x, packed in by_place(rows, place).items():
        ax.plot(
            [x] * len(packed),
            [y for y, *_ in packed],
            "D",
            color=ROUTED,
            mec=WHITE,
            mew=0.6,
            ms=5,
            zorder=5,
        )
        for y, text, color in spread(packed, 13):
            note(ax, x - 8, y, text, ha="right", color=color)
    return figure


def note(ax: Axes, x: float, y: float, text: str, ha: str, color: str) -> None:
    """Text that hides the grid behind it."""
    width = 6.2 * len(text)
    box(ax, x - (width if ha == "right" else 0), y - 6, width, 12, edge="none", radius=2)
    write(ax, x, y, text, 11, ha=ha, color=color)


def by_place(
    rows: list[dict[str, Any]], place: Callable[[int, float], Point]
) -> dict[float, list[Label]]:
    """What packed weights reached, by the x of the batch."""
    found: dict[float, list[Label]] = {}
    for row in rows:
        if row["weights"].startswith("int") and "tokens_s" in measured(row):
            x, y = place(row["batch_size"], row["tokens_s"])
            found.setdefault(x, []).append((y, f"{row['weights']} {row['tokens_s']:,.0f}", ROUTED))
    return found


def measured(row: dict[str, Any]) -> dict[str, float]:
    """The speeds of a line that are numbers."""
    return {k: v for k, v in row.items() if k.endswith("tokens_s") and isinstance(v, int | float)}


def spread(labels: list[Label], gap: float) -> list[Label]:
    """From the top down, each moved down where it would stand closer than `gap` to the last."""
    placed: list[Label] = []
    for y, text, color in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, text, color))
    return placed


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A white card with round corners; transparent outside, for light and dark pages."""
    figure = plt.figure(figsize=(width / 100, height / 100))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    box(ax, 1, 1, width - 2, height - 2, edge="#e2e8f0", radius=14)
    return figure, ax


def save(figure: Figure, name: str) -> None:
    svg, png = FOLDER / f"{name}.svg", FOLDER / f"{name}.png"
    figure.savefig(svg, transparent=True, metadata={"Date": None, "Creator": None})
    small = {"optimize": True}
    figure.savefig(png, dpi=160, transparent=True, metadata={"Software": None}, pil_kwargs=small)
    plt.close(figure)


def write(ax: Axes, x: float, y: float, text: str, size: float = 11.5, **style: str) -> None:
    """`size` in pixels, as the coordinates."""
    style = {"color": INK, "ha": "center", "va": "center", **style}
    ax.text(x, y, text, fontsize=size * 0.72, zorder=6, linespacing=1.35, **style)


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


if __name__ == "__main__":
    main()
