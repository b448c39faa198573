"""Which settings fit which cards, proven to the end: trained, saved, killed, resumed and used?

    python benchmarks/fits.py                      about 20 minutes, 140 GB of disk
    python benchmarks/fits.py --only qlora         the settings with this text in their name
    python benchmarks/fits.py --folder /dev/shm    models and runs are written there

Every process may take as much GPU memory as a card of the given size has, less 1 GB for CUDA itself
and a display. A fine-tuning run saves a checkpoint at step 2, is killed at step 3, goes on by the
same command, and writes its result. A result that is a whole model then continues a text. The model
has random weights of the official configuration.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from finetune_runs import (
    HERE,
    QLORA,
    QLORA_8BIT_ADAM,
    QLORA_16_8BIT_ADAM,
    command_of,
    rows_file,
    run,
    steps_of,
)
from random_model import model_of_layers
from tables import refuse_unknown, require_gpu
from tqdm import tqdm

from deepseek_moe.errors import exit_on_user_error

CAPPED = """\
import os, runpy, sys, torch
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv[1]) / total))
del sys.argv[:2]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Setting(NamedTuple):
    name: str
    card: int  # GB
    options: str
    rows: int = 0  # of a batch; 0: this only completes a text
    length: int = 1024
    whole: bool = False  # the result is a model, not an adapter


SETTINGS = (
    Setting("full, layers recomputed", 80, "", 16, whole=True),
    Setting("qlora r64, layers recomputed", 32, QLORA, 16),
    Setting("qlora r64, adam in 8 bits", 24, QLORA_8BIT_ADAM, 16),
    Setting("qlora r16, adam in 8 bits", 16, QLORA_16_8BIT_ADAM, 1),
    Setting("completion, bf16", 40, "--dtype bfloat16"),
    Setting("completion, int8", 24, "--quantization int8"),
    Setting("completion, int4", 16, "--quantization int4"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="settings with this text in their name")
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="for models and runs"
    )
    args = parser.parse_args()
    chosen = [setting for setting in SETTINGS if args.only in setting.name]
    refuse_unknown(args.only, chosen, (setting.name for setting in SETTINGS))
    require_gpu()
    model = model_of_layers(args.folder / "random-moe", args.num_hidden_layers)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'setting':28} {'card':>6} {'allocated':>10}  it was", flush=True)
    for setting in tqdm(chosen, file=sys.stderr):
        peak, became = try_setting(setting, model)
        shown = f"{peak:.1f} GB" if peak else ""
        print(f"{setting.name:28} {setting.card:>3} GB {shown:>10}  {became}", flush=True)


def try_setting(setting: Setting, model: Path) -> tuple[float | None, str]:
    """The most GB that were allocated (None: not known), and what became of it."""
    if not setting.rows:
        return None, complete(model, setting.card, setting.options)
    with rows_file(64, 6000) as data, tempfile.TemporaryDirectory(dir=model.parent) as output:
        return train(setting, model, data, Path(output, "run"))


def train(setting: Setting, model: Path, data: Path, output: Path) -> tuple[float | None, str]:
    words = command_of(model, data, setting.rows, setting.length, setting.options, steps=4)
    words = words.replace("--save_strategy no", "--save_steps 2 --save_total_limit 1").split()
    command = capped(setting.card, ["finetune.py", *words, "--output_dir", str(output)])
    with tempfile.TemporaryDirectory() as logs:
        first, _ = run(command, Path(logs, "1"), math.inf, lambda printed: "step 3/4" in printed)
        second, code = run(command, Path(logs, "2"), math.inf)
    peak = max((size for _, size in steps_of(first + second) if size), default=None)
    if "step 3/4" not in first:
        return peak, "not trained and saved"
    if code or f"going on from {output / 'checkpoint-2'}" not in second:
        return peak, f"trained and saved, not resumed: {second[-300:]}"
    became = "trained, saved, resumed, finished"
    return peak, f"{became}, {complete(output, setting.card)}" if setting.whole else became


def complete(model: Path, card: int, options: str = "") -> str:
    script = str(HERE.parent / "examples" / "completion.py")
    words = [script, "--model", str(model), "--max_new_tokens", "50", *options.split()]
    done = subprocess.run(capped(card, words), capture_output=True, text=True)
    last = done.stderr.strip().split("\n")[-1]
    return f"continued a text: {last}" if done.returncode == 0 else f"not complete: {last}"


def capped(card: int, words: list[str]) -> list[str]:
    """The command of a script that gets the GPU memory of a card of `card` GB."""
    return [sys.executable, "-c", CAPPED, str((card - 1) * 2**30), *words]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
