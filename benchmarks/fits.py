"""Which settings fit which cards, proven to the end: trained, saved, killed, resumed and used?

    python benchmarks/fits.py                      about 30 minutes, 140 GB of disk
    python benchmarks/fits.py --only QLoRA         the settings in which a word begins so
    python benchmarks/fits.py --only offloaded     those with offloaded experts, for 8 and 10 GB
    python benchmarks/fits.py --folder /dev/shm    models and runs are written there

Every process may take as much GPU memory as a card of the given size has, less 1 GB for CUDA itself
and a display; on a card of 8 GB, 7.0 GB. A fine-tuning run saves a checkpoint at step 6, is killed
at step 7, goes on by the same command, and writes its result. A result that is a whole model then
continues a text. Tokens/s are those of steps 4 to 6. The model has random weights of the official
configuration.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import finetune_runs as runs
from tables import Row

from deepseek_moe.errors import exit_on_user_error

LENGTH = 1024  # tokens of a row
CAPPED = """\
import os, runpy, sys
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as finetune.py does
import torch
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv[1]) / total))
del sys.argv[:2]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Setting(NamedTuple):
    card: int  # GB
    options: str
    rows: int = 0  # of a batch; 0: this only completes a text
    whole: bool = False  # the result is a model, not an adapter


SETTINGS = {
    "full, layers recomputed": Setting(80, "", 16, whole=True),
    "LoRA r64, layers recomputed": Setting(80, runs.LORA, 16),
    "LoRA r64, Adam in 8 bits": Setting(48, runs.LORA_8BIT_ADAM, 16),
    "QLoRA r64, layers recomputed": Setting(32, runs.QLORA, 16),
    "QLoRA r64, Adam in 8 bits": Setting(24, runs.QLORA_8BIT_ADAM, 16),
    "QLoRA r16, Adam in 8 bits": Setting(16, runs.QLORA_16_8BIT_ADAM, 1),
    "QLoRA r16, experts offloaded": Setting(8, runs.OFFLOADED, 1),
    "QLoRA r16, experts offloaded, 8 rows": Setting(10, runs.OFFLOADED, 8),
    "completion, bf16": Setting(40, "--dtype bfloat16"),
    "completion, int8": Setting(24, "--quantization int8"),
    "completion, int4": Setting(16, "--quantization int4"),
}


def main() -> None:
    args = runs.make_settings_parser(__doc__).parse_args()
    runs.measure_settings(args, "fits", SETTINGS, tried)


def tried(setting: Setting, model: Path, data: Path) -> Row:
    """Tokens/s, the most GB that were allocated (None: not known), and what became of it."""
    speed = peak = None
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        if setting.rows:
            speed, peak, became = trained(setting, model, data, Path(folder, "run"))
        else:
            became = complete(model, setting.card, setting.options)
    return {"card": setting.card, "tokens_s": speed, "gigabytes": peak, "became": became}


def trained(
    setting: Setting, model: Path, data: Path, output: Path
) -> tuple[float | None, float | None, str]:
    options = runs.command_of(model, data, setting.rows, LENGTH, setting.options, steps=8)
    options = options.replace("--save_strategy no", "--save_steps 6 --save_total_limit 1")
    words = ["finetune.py", *options.split(), "--output_dir", str(output)]
    command = capped(setting.card, words)
    first, _ = runs.run(command, lambda printed: "step 7/8" in printed)
    second, code = runs.run(command)
    speed, peak = runs.speed_and_gigabytes(first + second, steps=6, uncounted=3)
    if "step 7/8" not in first:
        return speed, peak, "not trained and saved"
    if code or f"going on from {output / 'checkpoint-6'}" not in second:
        return speed, peak, f"trained and saved, not resumed: {second[-300:]}"
    became = "trained, saved, resumed, finished"
    became = f"{became}, {complete(output, setting.card)}" if setting.whole else became
    return speed, peak, became


def complete(model: Path, card: int, options: str = "") -> str:
    script = str(runs.HERE.parent / "examples" / "completion.py")
    words = [script, "--model", str(model), "--max_new_tokens", "50", *options.split()]
    command = [sys.executable, *capped(card, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    return f"not complete: {last}" if done.returncode else f"continued a text: {last}"


def capped(card: int, words: list[str]) -> list[str]:
    """The words of a script that gets the GPU memory of a card of `card` GB."""
    return ["-c", CAPPED, str(7e9 if card == 8 else (card - 1) * 2**30), *words]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
