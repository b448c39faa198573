"""Draws the pictures of this folder: `python images/draw.py` (needs matplotlib).

The parameter counts are computed here from the sizes of the published config; the speeds come from
decode.json and train.json, which the scripts of these names in benchmarks/ write.
"""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from plots import draw_decode, draw_train
from shapes import (
    DENSE,
    IDLE,
    INK,
    PALE_DENSE,
    PALE_ROUTED,
    PALE_SHARED,
    PANEL,
    ROUTED,
    SHARED,
    WHITE,
    box,
    canvas,
    flow,
    hop,
    node,
    wire,
    write,
)

FOLDER = Path(__file__).parent

# DeepSeekMoE 16B: hidden size, layers, attention heads, vocabulary, width of layer 0's MLP, ...
D, LAYERS, HEADS, VOCAB, DENSE_WIDTH = 2048, 28, 16, 102_400, 10_944
# ... routed experts, experts a token, expert width, shared experts.
E, K, WIDTH, SHARED_EXPERTS = 64, 6, 1408, 2
PICKED = (5, 16, 24, 38, 47, 58)  # the experts that the drawn token goes to


def main() -> None:
    matplotlib.use("agg")
    # A font that comes with matplotlib and a fixed salt for the SVG's ids: every run writes the
    # same bytes.
    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "deepseek-moe"})
    save(draw_logo(), "logo")
    save(draw_architecture(), "architecture")
    for name, plot in (("decode", draw_decode), ("train", draw_train)):
        report = FOLDER / f"{name}.json"  # written by the benchmark of this name on a GPU
        if report.is_file():
            save(plot(json.loads(report.read_text(encoding="utf-8"))), name)


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


def save(figure: Figure, name: str) -> None:
    svg, png = FOLDER / f"{name}.svg", FOLDER / f"{name}.png"
    figure.savefig(svg, transparent=True, metadata={"Date": None, "Creator": None})
    small = {"optimize": True}
    figure.savefig(png, dpi=160, transparent=True, metadata={"Software": None}, pil_kwargs=small)
    plt.close(figure)


if __name__ == "__main__":
    main()
