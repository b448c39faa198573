"""images/: plots of made-up reports say what these hold, legibly; each run draws the same bytes."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from deepseek_moe import DeepseekConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "images")]
limits, rates, decode, train = map(import_module, ("limits", "rates", "decode", "train"))
draw, plots, shapes = map(import_module, ("draw", "plots", "shapes"))
MACHINE = {"hardware": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "transformers": "5.17"}
SOURCE = "NVIDIA H200; torch 2.11, triton 3.6, transformers 5.17; benchmarks"


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def bars(figure: Figure) -> list[Patch]:
    """With the squares that say whose they are."""
    fills = (shapes.ROUTED, shapes.SHARED)
    return [patch for patch in figure.axes[0].patches if to_hex(patch.get_facecolor()) in fills]


def legible(figure: Figure) -> list[str]:
    """The texts of a plot: all are inside of it, and none on another or on a bar."""
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [item.get_window_extent() for item in [*texts, *bars(figure)]]
    whole = figure.bbox.padded(-2)  # its edge
    for box in boxes:
        assert whole.contains(*box.min) and whole.contains(*box.max), box
    inked = [box.padded(0, -1) for box in boxes]  # letters do not fill their line
    assert not [pair for pair in combinations(inked, 2) if pair[0].overlaps(pair[1])]
    return [text.get_text() for text in texts]


# The plot of decoding


def decoding() -> dict[str, Any]:
    """A report such as decode.py writes, of the official model."""
    config, rows = DeepseekConfig(), []

    def row(weights: str, batch: int, speed: Any, stock: Any, bits: int | None = None) -> None:
        limit = batch * 4.24e12 / limits.step_bytes(config, batch, 220, 2, bits)
        rows.append(asdict(decode.Decoded(weights, 10**9, batch, speed, stock, None, limit, 6, 6)))

    row("bfloat16", 1, 615.2, 37.1)
    row("bfloat16", 8, 1437.0, 150.0)
    row("bfloat16", 64, 6100.0, None)
    row("bfloat16", 256, rates.NO_MEMORY, rates.NO_MEMORY)
    row("int8", 1, 900.0, None, 8)
    row("int4", 1, 1133.0, None, 4)
    return {"machine": MACHINE, "prompt_tokens": 128, "decode": rows}


def test_the_plot_of_decoding() -> None:
    texts = legible(plots.draw_decode(decoding()))
    assert {"615", "37", "1,437", "int8 900", "int4 1,133", "1", "8", "64", "256"} <= set(texts)
    assert f"{SOURCE}/decode.py" in texts
    ends = [text for text in texts if re.match(r"(memory limit|this engine|transformers) ", text)]
    assert sorted(ends)[1:] == ["this engine 6,100", "transformers 150"]
    assert int(sorted(ends)[0].split()[-1].replace(",", "")) == pytest.approx(24000, rel=0.02)


def test_labels_that_would_meet_move_apart() -> None:
    labels = [(50.0, "c", ""), (10.0, "a", ""), (12.0, "b", "")]
    placed = [(y, text) for y, text, _ in plots.spread(labels, 15)]
    assert placed == [(10, "a"), (25, "b"), (50, "c")]


# The plot of fine-tuning


def training(*lines: Any) -> dict[str, Any]:
    """A report such as train.py writes."""
    return {"machine": MACHINE, "operations_s": 8e14, "lines": [asdict(line) for line in lines]}


def line(name: str, speed: float | None, **stock: float) -> Any:
    if speed is None:
        return train.Trained(name, "16 x 1024", None, None, None, None, None, **stock)
    return train.Trained(name, "16 x 1024", speed, 1.0, 1.0, speed / 1e6, 110.64, **stock)


STOCK = {"stock_tokens_s": 13329.7, "stock_gigabytes": 69.35}


def test_the_plot_of_fine_tuning() -> None:
    report = training(
        line("full", 27653.0, **STOCK), line("lora r64", None, **STOCK), line("qlora r64", 1204.2)
    )
    figure = plots.draw_train(report)
    texts = legible(figure)
    assert {"full", "lora r64", "qlora r64", "16 x 1024", f"{SOURCE}/train.py"} <= set(texts)
    assert {"27,653", "3 %", "110.6", "1,204", "0 %"} <= set(texts)
    assert texts.count("13,330") == texts.count("69.3") == 2
    assert texts.count("failed") == 1
    assert any(text.startswith("MFU: of 800 TFLOP/s") for text in texts)
    lengths = [bar.get_width() for bar in bars(figure)[2:]]
    expected = [speed / 27653 * lengths[0] for speed in (27653, 13329.7, 13329.7, 1204.2)]
    assert lengths == pytest.approx(expected)


@pytest.mark.parametrize("speed", [None, 3.0, 28353.3, 999999.0])
@pytest.mark.parametrize("stock", [{}, STOCK])
def test_the_plot_of_one_setting(speed: float | None, stock: dict[str, float]) -> None:
    texts = legible(plots.draw_train(training(line("full", speed, **stock))))
    assert ("failed" in texts) == (speed is None)
    assert ("transformers with PEFT" in texts) == bool(stock)


def test_all_settings_of_the_benchmark_fit() -> None:
    lines = [line(setting.name, 28000.0, **STOCK) for setting in train.SETTINGS]
    legible(plots.draw_train(training(*lines)))


# Files


def test_every_run_draws_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    (tmp_path / "decode.json").write_text(json.dumps(decoding()))
    (tmp_path / "train.json").write_text(json.dumps(training(line("full", 1.0, **STOCK))))
    runs = []
    with plt.rc_context():
        for _ in range(2):
            draw.main()
            runs.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert runs[0] == runs[1]
    names = ("architecture", "decode", "logo", "train")
    assert {f"{name}.{kind}" for name in names for kind in ("png", "svg")} < runs[0].keys()
    assert runs[0]["train.png"][:4] == b"\x89PNG"


def test_the_settings_that_are_drawn_are_those_of_the_benchmark() -> None:
    report = json.loads((ROOT / "images" / "train.json").read_text())
    assert {line["name"] for line in report["lines"]} <= {one.name for one in train.SETTINGS}
