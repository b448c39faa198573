"""Is the dry run's estimate of GPU memory right?

    python benchmarks/memory.py                 about a minute a setting, for the 16B model on a GPU
    python benchmarks/memory.py --only qlora    the settings with this text in their name

Each setting is a `finetune.py` of its own on random weights of the official configuration (in fp32
and under ZeRO with as many layers as fit), under `--dry_run True` and then three steps for real.
Measured is the most that PyTorch had allocated.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import finetune_runs as runs
import torch
from random_model import model_of_layers
from tables import refuse_unknown, require_gpu
from tqdm import tqdm

from deepseek_moe.errors import exit_on_user_error

FP32 = "--single_gpu_full False"
SETTINGS = {  # name: layers, rows a batch, tokens a row, options
    "full on one GPU, 16 x 1024": (28, 16, 1024, ""),
    "full on one GPU, 16 x 1024, all kept": (28, 16, 1024, runs.KEPT),
    "full on one GPU, 16 x 1024, experts recomputed": (
        28, 16, 1024, f"{runs.KEPT} --recompute_experts 1"
    ),
    "lora r64, 16 x 1024": (28, 16, 1024, runs.LORA),
    "lora r64, 16 x 1024, all kept": (28, 16, 1024, f"{runs.LORA} {runs.KEPT}"),
    "lora r64 in 8 bits, 4 x 1024": (28, 4, 1024, "--use_lora True --bits 8 --lora_r 64"),
    "qlora r64, 16 x 1024": (28, 16, 1024, runs.QLORA),
    "qlora r64, 16 x 1024, adam in 8 bits": (28, 16, 1024, runs.QLORA_8BIT_ADAM),
    "qlora r64, 4 x 1024, all kept": (28, 4, 1024, f"{runs.QLORA} {runs.KEPT}"),
    "qlora r64, 1 x 4096": (28, 1, 4096, runs.QLORA),
    "qlora r16, 1 x 1024, adam in 8 bits": (28, 1, 1024, runs.QLORA_16_8BIT_ADAM),
    "qlora r64, 16 x 1024, ZeRO-2": (28, 16, 1024, f"{runs.QLORA} {runs.ZERO}2_no_offload.json"),
    "full in fp32, 4 layers, 8 x 1024": (4, 8, 1024, FP32),
    "full in fp32, 4 layers, 4 x 1024, all kept": (4, 4, 1024, f"{FP32} {runs.KEPT}"),
    "full, 4 layers, 8 x 1024, ZeRO-2": (4, 8, 1024, f"{runs.ZERO}2_no_offload.json"),
    "full, 4 layers, 8 x 1024, ZeRO-3": (4, 8, 1024, f"{runs.ZERO}3.json"),
    "full, 4 layers, 8 x 1024, ZeRO-3 offload": (4, 8, 1024, f"{runs.ZERO}3_offload.json"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="settings with this text in their name")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "random-moe")
    args = parser.parse_args()
    chosen = {name: setting for name, setting in SETTINGS.items() if args.only in name}
    refuse_unknown(args.only, chosen, SETTINGS)
    require_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'setting':46} {'estimated':>10} {'measured':>10} {'ratio':>6} {'tokens/s':>9}")
    with runs.rows_file(64, 6000) as data:
        for name, (layers, *shape, options) in tqdm(chosen.items(), file=sys.stderr):
            model = model_of_layers(args.models, layers)
            command = runs.command_of(model, data, *shape, options, steps=3)
            estimated = runs.dry_run_gigabytes(command)
            steps = runs.steps_of(runs.finetune(command, "step 3/3"))
            if estimated is None or not steps:
                print(f"{name:46} failed", flush=True)
                continue
            measured = max(size for _, size in steps)
            sizes = f"{estimated:7.1f} GB {measured:7.1f} GB {estimated / measured:6.2f}"
            print(f"{name:46} {sizes} {steps[-1][0]:>9,.0f}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
