"""The dry run's estimate of GPU memory beside what a run takes, for the 16B model on one GPU.

    python benchmarks/memory.py                 about a minute a setting
    python benchmarks/memory.py --only qlora    the settings with this word in their name

Each setting is a `finetune.py` of its own on random weights of the official configuration (full
fine-tuning: with as many layers as fit), under `--dry_run True` and then three steps for real.
Measured is the most that PyTorch had allocated.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch
from processes import (
    EIGHT_BITS,
    KEPT,
    LORA,
    QLORA,
    ZERO,
    command_of,
    finetune,
    rows_file,
    steps_of,
)
from random_model import write_random_model
from tqdm import tqdm

from deepseek_moe import DeepseekConfig
from deepseek_moe.errors import exit_on_user_error

FP32 = "--single_gpu_full False"
SETTINGS = {  # name: layers, rows a batch, tokens a row, options
    "full on one GPU, 16 x 1024": (28, 16, 1024, ""),
    "full on one GPU, 16 x 1024, all kept": (28, 16, 1024, KEPT),
    "full on one GPU, 16 x 1024, experts again": (28, 16, 1024, f"{KEPT} --recompute_experts 1"),
    "lora r64, 16 x 1024": (28, 16, 1024, LORA),
    "lora r64, 16 x 1024, all kept": (28, 16, 1024, f"{LORA} {KEPT}"),
    "lora r64 in 8 bits, 4 x 1024": (28, 4, 1024, "--use_lora True --bits 8 --lora_r 64"),
    "qlora r64, 16 x 1024": (28, 16, 1024, QLORA),
    "qlora r64, 16 x 1024, adam in 8 bits": (28, 16, 1024, f"{QLORA} {EIGHT_BITS}"),
    "qlora r64, 4 x 1024, all kept": (28, 4, 1024, f"{QLORA} {KEPT}"),
    "qlora r64, 1 x 4096": (28, 1, 4096, QLORA),
    "qlora r16, 1 x 1024, adam in 8 bits": (
        28, 1, 1024, f"--use_lora True --bits 4 --lora_r 16 {EIGHT_BITS}"
    ),
    "qlora r64, 16 x 1024, ZeRO-2": (28, 16, 1024, f"{QLORA} {ZERO}2_no_offload.json"),
    "full in fp32, 4 layers, 8 x 1024": (4, 8, 1024, FP32),
    "full in fp32, 4 layers, 4 x 1024, all kept": (4, 4, 1024, f"{FP32} {KEPT}"),
    "full, 4 layers, 8 x 1024, ZeRO-2": (4, 8, 1024, f"{ZERO}2_no_offload.json"),
    "full, 4 layers, 8 x 1024, ZeRO-3": (4, 8, 1024, f"{ZERO}3.json"),
    "full, 4 layers, 8 x 1024, ZeRO-3 offload": (4, 8, 1024, f"{ZERO}3_offload.json"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="settings with this text in their name")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "random-moe")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU was found; this measures one", file=sys.stderr)
        sys.exit(2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'setting':46} {'estimated':>10} {'measured':>10} {'ratio':>6} {'tokens/s':>9}")
    with rows_file(64, 6000) as data:
        measure(args, data)


def measure(args: argparse.Namespace, data: Path) -> None:
    """Prints a line for each setting that was asked for."""
    chosen = {name: how for name, how in SETTINGS.items() if args.only in name}
    for name, (layers, rows, length, options) in tqdm(chosen.items(), file=sys.stderr):
        model = args.models / f"{layers}-layers"
        if not (model / "config.json").exists():
            write_random_model(model, DeepseekConfig(num_hidden_layers=layers))
        command = command_of(model, data, rows, length, options, steps=3)
        plan = finetune(command + " --dry_run True")
        steps = steps_of(finetune(command, "step 3/3"))
        found = re.search(r"in all +([\d.]+) GB", plan)
        if not found or not steps:
            print(f"{name:46} failed", flush=True)
            continue
        estimated, measured = float(found[1]), max(size for _, size in steps)
        sizes = f"{estimated:7.1f} GB {measured:7.1f} GB {estimated / measured:6.2f}"
        print(f"{name:46} {sizes} {steps[-1][0]:>9,.0f}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
