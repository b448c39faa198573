"""Which settings fit which cards, proven to the end: trained, saved, killed, resumed and used.

    python benchmarks/fits.py                      about 20 minutes, 140 GB of disk
    python benchmarks/fits.py --only qlora         the settings with this text in their name
    python benchmarks/fits.py --folder /dev/shm    models and runs are written there

Every process may take so much GPU memory as a card of the given size has, less 1 GB for CUDA
itself and a display. A fine-tuning run saves a checkpoint at step 2, is killed at step 3, goes on
by the same command, and writes its result. A result that is a whole model then continues a text.
The model has random weights of the official configuration.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import EIGHT_BITS, QLORA, command_of, rows_file, run, steps_of
from random_model import ROUTERS, write_random_model
from tqdm import tqdm

from deepseek_moe import DeepseekConfig
from deepseek_moe.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
QLORA_16 = "--use_lora True --bits 4 --lora_r 16"
CAPPED = """\
import runpy, sys, torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv[1]) / total))
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Training:
    name: str
    card: int  # GB
    rows: int
    length: int
    options: str = ""
    whole: bool = False  # the result is a model, not an adapter


@dataclass(frozen=True)
class Completing:
    name: str
    card: int
    options: str


SETTINGS = (
    Training("full, layers again", 80, 16, 1024, whole=True),
    Training("qlora r64, layers again", 32, 16, 1024, QLORA),
    Training("qlora r64, adam in 8 bits", 24, 16, 1024, f"{QLORA} {EIGHT_BITS}"),
    Training("qlora r16, adam in 8 bits", 16, 1, 1024, f"{QLORA_16} {EIGHT_BITS}"),
    Completing("completion, bf16", 40, "--dtype bfloat16"),
    Completing("completion, int8", 24, "--quantization int8"),
    Completing("completion, int4", 16, "--quantization int4"),
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
    if not chosen:
        raise UserError(f"no setting has {args.only!r} in its name")
    if not torch.cuda.is_available():
        raise UserError("no GPU was found; this measures one")
    folder = args.folder / "random-moe"
    model = folder / f"{args.num_hidden_layers}-layers"
    folder.mkdir(parents=True, exist_ok=True)
    if not all((model / name).exists() for name in ("config.json", ROUTERS)):
        write_random_model(model, DeepseekConfig(num_hidden_layers=args.num_hidden_layers))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'setting':28} {'card':>6} {'allocated':>10}  it was", flush=True)
    for setting in tqdm(chosen, file=sys.stderr):
        if isinstance(setting, Training):
            with rows_file(64, 6000) as data, tempfile.TemporaryDirectory(dir=folder) as output:
                peak, done = train(setting, model, data, Path(output, "run"))
        else:
            peak, done = None, complete(model, setting.card, setting.options)
        shown = f"{peak:.1f} GB" if peak else ""
        print(f"{setting.name:28} {setting.card:>3} GB {shown:>10}  {done}", flush=True)


def train(setting: Training, model: Path, data: Path, output: Path) -> tuple[float | None, str]:
    """The most GB that were allocated, and what the run came to."""
    words = command_of(model, data, setting.rows, setting.length, setting.options, steps=4)
    words = words.replace("--save_strategy no", "--save_steps 2 --save_total_limit 1").split()
    command = capped(setting.card, ["finetune.py", *words, "--output_dir", str(output)])
    with tempfile.TemporaryDirectory() as logs:
        first, _ = run(command, Path(logs, "1"), math.inf, lambda said: "step 3/4" in said)
        second, code = run(command, Path(logs, "2"), math.inf)
    peak = max((size for _, size in steps_of(first + second) if size), default=None)
    if "step 3/4" not in first:
        return peak, "not trained and saved"
    if code or f"going on from {output / 'checkpoint-2'}" not in second:
        return peak, f"trained and saved, not resumed: {second[-300:]}"
    done = "trained, saved, resumed, finished"
    return peak, f"{done}, {complete(output, setting.card)}" if setting.whole else done


def complete(model: Path, card: int, options: str = "") -> str:
    script = str(ROOT / "examples" / "completion.py")
    words = [script, "--model", str(model), "--max_new_tokens", "50", *options.split()]
    done = subprocess.run(capped(card, words), capture_output=True, text=True)
    last = done.stderr.strip().split("\n")[-1]
    return f"continued a text: {last}" if done.returncode == 0 else f"not complete: {last}"


def capped(card: int, words: list[str]) -> list[str]:
    """A script with so much GPU memory as a card of `card` GB leaves it."""
    return [sys.executable, "-c", CAPPED, str((card - 1) * 2**30), *words]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
