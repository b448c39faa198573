"""The plots of what benchmarks/ measured, one function a report."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shapes import DENSE, IDLE, INK, ROUTED, SHARED, WHITE, Point, box, canvas, write

MFU_X, GB_X = 636, 700  # right edges of columns
Label = tuple[float, str, str]
"""y, text, colour."""


def draw_decode(report: dict[str, Any]) -> Figure:
    """Tokens a second against the size of the batch, both by their logarithms: `report` is what
    benchmarks/decode.py writes. What it could not measure is left out."""
    figure, ax = canvas(460, 352)
    rows = sorted(report["decode"], key=lambda row: row["batch_size"])
    write(ax, 20, 24, "Decoding: tokens/s in total", 15, ha="left", weight="bold")
    what = f"16B model in {rows[0]['weights']} and its limit; "
    what += f"prompts of {report['prompt_tokens']} tokens"
    write(ax, 20, 45, what, 12, ha="left")
    write(ax, 20, 336, source(report, "decode.py"), 10, ha="left", color=DENSE)

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


def draw_train(report: dict[str, Any]) -> Figure:
    """Tokens a second of fine-tuning, a bar a setting, with the share of what the GPU multiplies
    and the GB at the peak; those of transformers below, where measured. `report` is what
    benchmarks/train.py writes."""
    lines = report["lines"]
    has_stock = ["stock_tokens_s" in measured(line) for line in lines]
    *ys, bottom = accumulate((40 if stock else 24 for stock in has_stock), initial=100)
    figure, ax = canvas(720, bottom + 44)
    write(ax, 20, 24, "Fine-tuning: tokens/s on one GPU", 15, ha="left", weight="bold")
    keys = ((ROUTED, "this repository"), (SHARED, "transformers with PEFT"))
    x = 20.0
    for color, text in keys[: 1 + any(has_stock)]:
        box(ax, x, 40, 10, 10, fill=color, edge=color, radius=2)
        x = cell(ax, x + 16, 45, text, INK, 12) + 18
    notes = f"MFU: of {report['operations_s'] / 1e12:,.0f} TFLOP/s, measured on large products"
    if any(has_stock):  # what stock_train.py does
        notes += "; transformers: layers computed again, full without optimizer"
    write(ax, 20, bottom + 10, notes, 10, ha="left", color=DENSE)
    write(ax, 20, bottom + 26, source(report, "train.py"), 10, ha="left", color=DENSE)

    x = max(cell(ax, 20, y, line["name"], INK) for y, line in zip(ys, lines, strict=True)) + 14
    shapes = [cell(ax, x, 76, "rows x length", size=10)]
    shapes += [cell(ax, x, y, line["shape"]) for y, line in zip(ys, lines, strict=True)]
    cell(ax, MFU_X, 76, "MFU", size=10, ha="right")
    cell(ax, GB_X, 76, "peak GB", size=10, ha="right")
    left, right = max(shapes) + 14, 536  # of the longest bar
    fastest = max((speed for line in lines for speed in measured(line).values()), default=1)
    for y, line in zip(ys, lines, strict=True):
        draw_setting(ax, left, y, line, (right - left) / fastest)
    return figure


def draw_setting(ax: Axes, left: float, y: float, line: dict[str, Any], pixels: float) -> None:
    """The bars of a setting, `pixels` long for each token/s, and the figures beside them."""
    speeds = measured(line)
    if "tokens_s" in speeds:
        cell(ax, MFU_X, y, f"{100 * line['mfu']:.0f} %", ROUTED, ha="right")
    else:
        cell(ax, left, y, "failed")
    for prefix, middle, color in (("", y, ROUTED), ("stock_", y + 16, SHARED)):
        if f"{prefix}tokens_s" in speeds:
            speed, size = speeds[f"{prefix}tokens_s"], line[f"{prefix}gigabytes"]
            length = speed * pixels
            radius = min(2, length / 2)
            box(ax, left, middle - 6, length, 12, fill=color, edge=color, radius=radius)
            cell(ax, left + length + 7, middle, f"{speed:,.0f}", color, weight="bold")
            cell(ax, GB_X, middle, f"{size:.1f}", color, ha="right")


def cell(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    color: str = DENSE,
    size: float = 11.5,
    ha: str = "left",
    weight: str = "normal",
) -> float:
    """Text on one line with its neighbours, which centred text would not quite be; returns its
    right end."""
    style = {"color": color, "ha": ha, "va": "baseline", "weight": weight}
    return write(ax, x, y + 4, text, size, **style)


def measured(row: dict[str, Any]) -> dict[str, float]:
    """The speeds of a line that are numbers."""
    return {k: v for k, v in row.items() if k.endswith("tokens_s") and isinstance(v, int | float)}


def spread(labels: list[Label], gap: float) -> list[Label]:
    """From the top down, each moved down where it would stand closer than `gap` to the last."""
    placed: list[Label] = []
    for y, text, color in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, text, color))
    return placed


def source(report: dict[str, Any], script: str) -> str:
    """The GPU and the versions that a report was measured with, and by what."""
    machine = report["machine"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "transformers")]
    return f"{machine['hardware']}; {', '.join(versions)}; benchmarks/{script}"
