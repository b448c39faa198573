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
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

FOLDER = Path(__file__).parent
INK, GREY, GRID = "#1e293b", "#64748b", "#d3dbe6"
OURS, STOCK = "#0f766e", "#f59e0b"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HEAD, FOOT = 0.86, 0.62  # inches above and below the rows
Report = dict[str, Any]
"""What a benchmark wrote; a speed is a number, the text "no memory", or None: not measured."""


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
        draw(report)
        path = args.output / name
        plt.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        small = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
        plt.savefig(path.with_suffix(".png"), dpi=160, **small)
        plt.close()


def draw_decode(report: Report) -> None:
    """A row for each number of sequences and kind of weights: this engine and transformers, and the
    limit that memory sets for weights of this kind."""
    rows = sorted(report["decode"], key=lambda row: row["batch_size"])
    names = [f"{row['batch_size']} x {SHORT.get(row['weights'], row['weights'])}" for row in rows]
    ax = axes(names, width=5.6, height=0.34, left=0.17)
    ax.set_xscale("log")
    ax.set_xlim(4, 100_000)
    ax.set_xticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
    ax.minorticks_off()
    ax.grid(axis="x", color=GRID, lw=0.8)
    kinds = {  # the label, shape, sizes in the plot and the legend, line, colour, and side of text
        "stock_tokens_s": ("transformers", "s", 6, 6, 0, STOCK, -1),
        "tokens_s": ("this engine", "o", 7, 7, 0, OURS, -1),
        "limit_tokens_s": ("limit of the memory", "|", 13, 11, 2, INK, 1),
    }
    marks = []
    for field, (label, shape, size, in_legend, line, color, side) in kinds.items():
        look = {"marker": shape, "ls": "", "color": color}
        marks.append(Line2D([], [], ms=in_legend, mew=line or 1, label=label, **look))
        for y, row in enumerate(rows):
            if is_measured(row[field]):
                ax.plot(row[field], y, ms=size, mew=line, **look)
                text(ax, row[field], y, f"{row[field]:,.0f}", side, color)
    what = f"sequences x weights; prompts of {report['prompt_tokens']} tokens"
    frame("Decoding: tokens/s of all sequences together", what, marks, report, "decode.py")


def draw_train(report: Report) -> None:
    """A bar for each setting, and below it transformers with PEFT where it keeps as much for the
    backward pass."""
    measured = [row for row in report["lines"] if is_measured(row["tokens_s"])]
    rows = [row for row in measured if "skewed" not in row["name"]]  # They are as fast.
    ax = axes([row["name"] for row in rows], width=7.6, height=0.36, left=0.37)
    ax.set_xlim(0, 2.0 * max(row["tokens_s"] for row in rows))
    ax.set_xticks([])
    usual = rows[0]["shape"]
    for y, row in enumerate(rows):
        speed, stock = row["tokens_s"], row["stock_tokens_s"]
        said = f"{speed:,.0f}   {100 * row['mfu']:.0f} %, {row['gigabytes']:.1f} GB"
        said += f", {row['shape']}" * (row["shape"] != usual)
        if not is_measured(stock):
            ax.barh(y, speed, 0.52, color=OURS)
            text(ax, speed, y, said, 1, OURS)
            continue
        ax.barh(y - 0.2, speed, 0.38, color=OURS)
        text(ax, speed, y - 0.2, f"{said}, {speed / stock:.1f} times transformers", 1, OURS)
        ax.barh(y + 0.2, stock, 0.38, color=STOCK, hatch="////", edgecolor="white", lw=0)
        text(ax, stock, y + 0.2, f"{stock:,.0f}   {row['stock_gigabytes']:.1f} GB", 1, INK)
    marks = [
        Patch(color=OURS, label="this repository"),
        Patch(facecolor=STOCK, hatch="////", edgecolor="white", label="transformers with PEFT"),
    ]
    share = f"% of {report['operations_s'] / 1e12:,.0f} TFLOP/s"
    what = f"{usual} tokens a step where nothing is said; {share}; GB at most"
    frame("Fine-tuning: tokens/s on one GPU", what, marks, report, "train.py")


def axes(names: list[str], width: float, height: float, left: float) -> Axes:
    """Axes with a row of `height` inches for each name, the first on top."""
    whole = HEAD + len(names) * height + FOOT
    figure = plt.figure(figsize=(width, whole), facecolor="white")
    ax = figure.add_axes((left, FOOT / whole, 0.97 - left, len(names) * height / whole))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0, labelcolor=INK)
    for side in ax.spines.values():
        side.set_visible(False)
    return ax


def frame(title: str, what: str, marks: list[Any], report: Report, script: str) -> None:
    """What stands above and below the rows; below is what the report was measured with."""
    figure = plt.gcf()
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.22 / height, title, size=11.5, weight="bold", va="center")
    figure.text(0.02, 1 - 0.45 / height, what, color=GREY, va="center")
    options = {"frameon": False, "handletextpad": 0.4, "columnspacing": 1.4, "ncols": len(marks)}
    place = {"loc": "center left", "bbox_to_anchor": (0.01, 1 - 0.7 / height)}
    figure.legend(handles=marks, **place, **options)
    machine = report["machine"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "transformers")]
    source = f"{machine['hardware']}; {', '.join(versions)}; benchmarks/{script}"
    figure.text(0.02, 0.14 / height, source, color=GREY, size=7.5, va="center")


def text(ax: Axes, x: float, y: float, said: str, side: int, color: str) -> None:
    """Right of (x, y), or left of it where `side` is -1."""
    place = {"xytext": (8 * side, 0), "textcoords": "offset points", "va": "center_baseline"}
    color = GREY if color == STOCK else color  # Text in that colour would be too pale.
    ax.annotate(said, (x, y), ha="left" if side > 0 else "right", color=color, **place)


def is_measured(value: object) -> bool:
    return isinstance(value, int | float)


if __name__ == "__main__":
    main()
