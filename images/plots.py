"""Draws decode.png and train.png (and .svg) from decode.json and train.json beside them.

    python images/plots.py                  needs matplotlib
    python images/plots.py --output /tmp    draws into another folder

benchmarks/decode.py and benchmarks/train.py write the JSON files on a GPU. Every run draws the same
bytes. The colours differ in lightness too, and each kind of mark has a shape of its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

FOLDER = Path(__file__).parent
INK, GREY, GRID = "#1e293b", "#64748b", "#d3dbe6"
OURS, STOCK = "#0f766e", "#f59e0b"
Row = dict[str, Any]
"""A line of a report; a speed is a number, the text "no memory", or None: not measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder to draw into")
    args = parser.parse_args()
    matplotlib.use("agg")
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",  # It comes with matplotlib.
            "font.size": 9,
            "text.color": INK,
            "svg.hashsalt": "deepseek-moe",  # Ids in the SVG are the same in every run.
            "axes.axisbelow": True,
        }
    )
    for name, draw in (("decode", draw_decode), ("train", draw_train)):
        report = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        save(draw(report), args.output / name)


def draw_decode(report: dict[str, Any]) -> Figure:
    """A row for each number of sequences and kind of weights: this engine and transformers, and the
    limit that memory sets for weights of this kind."""
    rows = sorted(report["decode"], key=lambda row: row["batch_size"])
    figure, ax = horizontal(len(rows), 5.6, 0.34, left=0.17)
    ax.set_xscale("log")
    ax.set_xlim(4, 100_000)
    names = [f"{number(row['batch_size'])} x {short(row['weights'])}" for row in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set_xticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
    ax.minorticks_off()
    ax.grid(axis="x", color=GRID, lw=0.8)
    for y, row in enumerate(rows):
        for field, mark, size, color, side in (
            ("stock_tokens_s", "s", 6, STOCK, -1),
            ("tokens_s", "o", 7, OURS, -1),
            ("limit_tokens_s", "|", 13, INK, 1),
        ):
            if is_measured(row[field]):
                ax.plot(row[field], y, mark, color=color, ms=size, mew=2 if mark == "|" else 0)
                text(ax, row[field], y, number(row[field]), side, color)
    marks = [
        Line2D([], [], marker="s", ls="", ms=6, color=STOCK, label="transformers"),
        Line2D([], [], marker="o", ls="", ms=7, color=OURS, label="this engine"),
        Line2D([], [], marker="|", ls="", ms=11, mew=2, color=INK, label="limit of the memory"),
    ]
    title = "Decoding: tokens/s of all sequences together"
    what = f"sequences x weights; prompts of {report['prompt_tokens']} tokens"
    frame(figure, title, what, marks, source(report, "decode.py"))
    return figure


def draw_train(report: dict[str, Any]) -> Figure:
    """A bar for each setting, and below it transformers with PEFT where it keeps as much for the
    backward pass."""
    measured = [row for row in report["lines"] if is_measured(row["tokens_s"])]
    rows = [row for row in measured if "skewed" not in row["name"]]  # They are as fast.
    figure, ax = horizontal(len(rows), 7.6, 0.36, left=0.37)
    ax.set_xlim(0, 2.0 * max(row["tokens_s"] for row in rows))
    usual = rows[0]["shape"]
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
    ax.set_xticks([])
    for y, row in enumerate(rows):
        speed, stock = row["tokens_s"], row["stock_tokens_s"]
        said = f"{number(speed)}   {100 * row['mfu']:.0f} %, {row['gigabytes']:.1f} GB"
        said += f", {row['shape']}" * (row["shape"] != usual)
        if not is_measured(stock):
            ax.barh(y, speed, 0.52, color=OURS)
            text(ax, speed, y, said, 1, OURS)
            continue
        ax.barh(y - 0.2, speed, 0.38, color=OURS)
        text(ax, speed, y - 0.2, f"{said}, {speed / stock:.1f} times transformers", 1, OURS)
        ax.barh(y + 0.2, stock, 0.38, color=STOCK, hatch="////", edgecolor="white", lw=0)
        text(ax, stock, y + 0.2, f"{number(stock)}   {row['stock_gigabytes']:.1f} GB", 1, INK)
    marks = [
        Patch(color=OURS, label="this repository"),
        Patch(facecolor=STOCK, hatch="////", edgecolor="white", label="transformers with PEFT"),
    ]
    title = "Fine-tuning: tokens/s on one GPU"
    share = f"% of {report['operations_s'] / 1e12:,.0f} TFLOP/s"
    what = f"{usual} tokens a step where nothing is said; {share}; GB at most"
    frame(figure, title, what, marks, source(report, "train.py"))
    return figure


def horizontal(rows: int, width: float, height: float, left: float) -> tuple[Figure, Axes]:
    """Axes with `rows` rows of `height` inches, the first on top."""
    head, foot = 0.86, 0.62
    whole = head + rows * height + foot
    figure = plt.figure(figsize=(width, whole), facecolor="white")
    ax = figure.add_axes((left, foot / whole, 0.97 - left, rows * height / whole))
    ax.set_ylim(rows - 0.5, -0.5)
    ax.tick_params(length=0, labelcolor=INK)
    for side in ax.spines.values():
        side.set_visible(False)
    return figure, ax


def frame(figure: Figure, title: str, what: str, marks: list[Any], source: str) -> None:
    """What stands above and below the rows."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.22 / height, title, size=11.5, weight="bold", va="center")
    figure.text(0.02, 1 - 0.45 / height, what, color=GREY, va="center")
    figure.legend(
        handles=marks,
        loc="center left",
        bbox_to_anchor=(0.01, 1 - 0.7 / height),
        ncols=len(marks),
        frameon=False,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    figure.text(0.02, 0.14 / height, source, color=GREY, size=7.5, va="center")


def text(ax: Axes, x: float, y: float, said: str, side: int, color: str) -> None:
    """Right of (x, y), or left of it where `side` is -1."""
    place = {"xytext": (8 * side, 0), "textcoords": "offset points", "va": "center_baseline"}
    color = GREY if color == STOCK else color  # Text in that colour would be too pale.
    ax.annotate(said, (x, y), ha="left" if side > 0 else "right", color=color, **place)


def is_measured(value: object) -> bool:
    return isinstance(value, int | float)


def number(value: float) -> str:
    return f"{value:,.0f}"


def short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)


def source(report: dict[str, Any], script: str) -> str:
    """The GPU and the versions that a report was measured with, and by what."""
    machine = report["machine"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "transformers")]
    return f"{machine['hardware']}; {', '.join(versions)}; benchmarks/{script}"


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    small = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
    figure.savefig(path.with_suffix(".png"), dpi=160, **small)
    plt.close(figure)


if __name__ == "__main__":
    main()
