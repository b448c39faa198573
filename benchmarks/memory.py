"""The dry run's estimate of GPU memory beside what a run takes, for the 16B model on one GPU.

    python benchmarks/memory.py                 about a minute a setting
    python benchmarks/memory.py --only qlora    the settings with this word in their name

Each setting is a `finetune.py` of its own on random weights of the official configuration (full
fine-tuning: with as many layers as fit), under `--dry_run True` and then three steps for real.
Measured is the most that PyTorch had allocated.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_model import write_random_model
from tqdm import tqdm

from deepseek_moe import DeepseekConfig

ROOT = Path(__file__).resolve().parents[1]
QLORA, LORA = "--use_lora True --bits 4 --lora_r 64", "--use_lora True --lora_r 64"
ZERO, KEPT = "--deepspeed configs/ds_config_zero", "--gradient_checkpointing 0"
FP32 = "--single_gpu_full False"
EIGHT_BITS = "--optim adamw_bnb_8bit"
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
        sys.exit("this needs a GPU")
    data = args.models / "rows.json"
    args.models.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(random_rows(64, 6000)))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'setting':46} {'estimated':>10} {'measured':>10} {'ratio':>6} {'tokens/s':>9}")
    chosen = {name: how for name, how in SETTINGS.items() if args.only in name}
    for name, (layers, rows, length, options) in tqdm(chosen.items(), file=sys.stderr):
        model = args.models / f"{layers}-layers"
        if not (model / "config.json").exists():
            write_random_model(model, DeepseekConfig(num_hidden_layers=layers))
        command = command_of(model, data, rows, length, options, steps=3)
        plan = finetune(command + " --dry_run True")
        steps = re.findall(r"([\d,]+) tok/s  ([\d.]+) GB", finetune(command))
        found = re.search(r"in all +([\d.]+) GB", plan)
        if not found or not steps:
            print(f"{name:46} failed", flush=True)
            continue
        estimated, measured = float(found[1]), max(float(gb) for _, gb in steps)
        sizes = f"{estimated:7.1f} GB {measured:7.1f} GB {estimated / measured:6.2f}"
        print(f"{name:46} {sizes} {steps[-1][0]:>9}", flush=True)


def command_of(model: Path, data: Path, rows: int, length: int, options: str, steps: int) -> str:
    """Options of finetune.py for some steps of `rows` x `length` tokens that leave nothing behind;
    layers are computed again in the backward pass unless `options` say otherwise."""
    command = f"--model_name_or_path {model} --data_path {data} --bf16 True --max_steps {steps} "
    command += f"--model_max_length {length} --per_device_train_batch_size {rows} "
    command += "--save_strategy no --report_to none --logging_steps 1 --learning_rate 1e-6 "
    command += "" if "gradient_checkpointing" in options else "--gradient_checkpointing True "
    return command + options


def finetune(options: str, last_step: str = "step 3/3", gpus: int = 1) -> str:
    """What the script prints up to its last step (under DeepSpeed by its launcher)."""
    launcher = [sys.executable]
    if "--deepspeed" in options:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [*launcher, "finetune.py", *options.split(), "--output_dir", f"{folder}/run"]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT / "finetune", stdout=file, stderr=file, start_new_session=True
            )
        while process.poll() is None and last_step not in log.read_text(errors="replace"):
            time.sleep(0.2)
        if process.poll() is None:  # the result need not be written
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        printed = log.read_text(errors="replace")
        if process.returncode not in (0, -signal.SIGKILL):
            print(printed[-1500:], file=sys.stderr)
        return printed


def random_rows(count: int, words: int) -> list[dict[str, str]]:
    """Rows longer than any setting's limit, so that each is cut to it."""
    source = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = (
        " ".join("".join(source.choices(letters, k=source.randint(2, 8))) for _ in range(words))
        for _ in range(count)
    )
    return [{"instruction": "Write.", "output": text} for text in texts]


if __name__ == "__main__":
    main()
