"""Is the dry run's estimate of GPU memory right?

    python benchmarks/memory.py                 about a minute a setting, for the 16B model on a GPU
    python benchmarks/memory.py --only QLoRA    the settings in which a word begins so

The settings are those of train.py and some more, in fp32 and under ZeRO with as many layers as fit.
Each is a `finetune.py` of its own on random weights, under `--dry_run True` and then three steps
for real. GB are the most that PyTorch had allocated.
"""

from pathlib import Path

import finetune_runs as runs
import train
from tables import Row, ratio
from train import Setting

from deepseek_moe.errors import exit_on_user_error

SETTINGS = {
    **train.SETTINGS,
    "LoRA r64, in 8 bits": Setting(4, 1024, "--use_lora True --bits 8 --lora_r 64"),
    "QLoRA r64, ZeRO-2": Setting(16, 1024, f"{runs.QLORA} {runs.ZERO}2_no_offload.json"),
    "fp32, 4 layers": Setting(8, 1024, "--single_gpu_full False"),
    "fp32, 4 layers, everything kept": Setting(4, 1024, f"--single_gpu_full False {runs.KEPT}"),
    "ZeRO-2, 4 layers": Setting(8, 1024, f"{runs.ZERO}2_no_offload.json"),
    "ZeRO-3, 4 layers": Setting(8, 1024, f"{runs.ZERO}3.json"),
    "ZeRO-3 offload, 4 layers": Setting(8, 1024, f"{runs.ZERO}3_offload.json"),
}


def main() -> None:
    args = runs.make_settings_parser(__doc__).parse_args()
    runs.measure_settings(args, "memory", SETTINGS, compared)


def compared(setting: Setting, model: Path, data: Path) -> Row:
    command = train.command_of(setting, model, data, steps=3)
    estimated = runs.dry_run_gigabytes(command)
    _, measured = runs.speed_and_gigabytes(runs.finetune(command, "step 3/3"))
    return {"estimated": estimated, "measured": measured, "ratio": ratio(estimated, measured)}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
