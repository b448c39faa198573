"""How fast is fine-tuning, beside stock transformers with PEFT and what the machine allows?

    python benchmarks/train.py                      a minute a setting, for the 16B model on an H200
    python benchmarks/train.py --only QLoRA         the settings with this text in their name
    python benchmarks/train.py --output_file images/train.json
    python images/plots.py                          draws images/train.png from that file

Each setting is a `finetune.py` of its own on random weights of the official configuration and
random text, with real steps of the optimizer; the first four do not count. Stock is stock_train.py,
which recomputes layers, and so it stands beside settings that do. MFU counts 6 operations for each
weight that a token passes (2.6 of the 16.4 billion), and those of attention, over the measured rate
of large products. It counts nothing for what is computed twice. Frozen weights count as those that
train, though their gradients, a third of it, are not computed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import finetune_runs as runs
import tables
from limits import layer_numbers, product_rate
from random_model import model_of_layers
from timing import release
from tqdm import tqdm

from deepseek_moe import DeepseekConfig
from deepseek_moe.errors import exit_on_user_error


class Setting(NamedTuple):
    name: str
    rows: int
    length: int
    options: str
    stock: str | None = None  # what stock_train.py trains for comparison
    skewed: bool = False  # half of the picks on 8 experts


SETTINGS = (
    Setting("all weights, everything kept", 16, 1024, runs.KEPT),
    Setting("all weights, skewed routing", 16, 1024, runs.KEPT, skewed=True),
    Setting("all weights, experts recomputed", 16, 1024, f"{runs.KEPT} --recompute_experts True"),
    Setting("all weights, layers recomputed", 16, 1024, "", "full"),
    Setting("all weights, layers recomputed, long", 4, 4096, ""),
    Setting("all weights, layers recomputed, packed", 4, 4096, "--packing True"),
    Setting("LoRA r64, everything kept", 16, 1024, f"{runs.LORA} {runs.KEPT}"),
    Setting("LoRA r64, layers recomputed", 16, 1024, runs.LORA, "lora"),
    Setting("QLoRA r64, layers recomputed", 16, 1024, runs.QLORA),
    Setting("QLoRA r64, layers recomputed, 8-bit Adam", 16, 1024, runs.QLORA_8BIT_ADAM),
    Setting(
        "QLoRA r64, layers recomputed, skewed routing", 16, 1024, runs.QLORA_8BIT_ADAM, skewed=True
    ),
    Setting("QLoRA r64, everything kept", 16, 1024, f"{runs.QLORA} {runs.KEPT}"),
    Setting("QLoRA r16, layers recomputed, 8-bit Adam", 1, 1024, runs.QLORA_16_8BIT_ADAM),
)
COLUMNS: tables.Columns = {
    "tokens/s": lambda row: tables.number(row["tokens_s"]),
    "ms a step": lambda row: tables.number(row["step_ms"]),
    "TFLOP/s": lambda row: tables.ratio(row["flops_s"], 1e12, "{:.0f}"),
    "MFU": lambda row: tables.percent(row["mfu"]),
    "stock": lambda row: tables.number(row["stock_tokens_s"]),
    "x stock": lambda row: tables.ratio(row["tokens_s"], row["stock_tokens_s"]),
    "GB": lambda row: tables.number(row["gigabytes"]),
    "stock GB": lambda row: tables.number(row["stock_gigabytes"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="settings with this text in their name")
    parser.add_argument("--no_stock", action="store_true")
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "random-moe")
    tables.add_report_options(parser)
    args = parser.parse_args()
    chosen = [setting for setting in SETTINGS if args.only in setting.name]
    tables.refuse_unknown(args.only, chosen, (setting.name for setting in SETTINGS))
    device = tables.require_gpu()
    report = tables.Report(args, device)
    operations_s = product_rate(device)
    report.contents["operations_s"] = operations_s
    release(device)
    print(f"measured: multiplies {operations_s / 1e12:.3g} TFLOP/s (square matrices)")
    print(f"{'':44} {'rows x length':>13} {tables.aligned(COLUMNS)}", flush=True)
    with runs.rows_file(16 * runs.STEPS, 6000) as data:
        for row in rows(args, tqdm(chosen, file=sys.stderr), data, operations_s):
            report.add("lines", row, COLUMNS, f"{row['name']:44} {row['shape']:>13}")


def rows(
    args: argparse.Namespace, chosen: Iterator[Setting], data: Path, operations_s: float
) -> Iterator[tables.Row]:
    """A row for each setting; a run that failed leaves None, and says why on stderr."""
    config = DeepseekConfig(num_hidden_layers=args.num_hidden_layers)
    for setting in chosen:
        shape = (setting.rows, setting.length)
        model = model_of_layers(args.models, args.num_hidden_layers, setting.skewed)
        command = runs.command_of(model, data, *shape, setting.options, runs.STEPS)
        printed = runs.finetune(command, f"step {runs.STEPS}/{runs.STEPS}")
        found = runs.measured_rate(runs.steps_of(printed))
        rate, size = found or (None, None)
        flops = rate and rate * token_flops(config, setting.length)
        theirs = None
        if setting.stock and not args.no_stock:
            theirs = stock(model, setting)
        yield {
            "name": setting.name,
            "shape": " x ".join(map(str, shape)),
            "tokens_s": rate,
            "step_ms": rate and 1000 * setting.rows * setting.length / rate,
            "flops_s": flops,
            "mfu": flops and flops / operations_s,
            "gigabytes": size,
            "stock_tokens_s": theirs and theirs["tokens_s"],
            "stock_gigabytes": theirs and theirs["gigabytes"],
        }


def token_flops(config: DeepseekConfig, length: int) -> float:
    """Operations of a token's forward and backward pass: 6 for each weight that it passes, and for
    each of the (length + 1) / 2 positions that it attends to on average."""
    numbers = [layer_numbers(config, i) for i in range(config.num_hidden_layers)]
    experts = config.num_experts_per_tok or 0
    passed = sum(n.kv + n.dense + n.small + experts * n.expert for n in numbers)
    passed += config.vocab_size * config.hidden_size
    attended = len(numbers) * 2 * config.hidden_size * (length + 1) / 2
    return 6 * (passed + attended)


def stock(model: Path, setting: Setting) -> dict[str, float] | None:
    """What stock_train.py prints, or None if it failed."""
    command = [sys.executable, str(runs.HERE / "stock_train.py"), setting.stock]
    command += ["--model", str(model), "--rows", str(setting.rows), "--length", str(setting.length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().split("\n")[-1])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
