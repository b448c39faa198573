"""Of multi_gpu.py: what becomes of a run of which a rank dies in a save."""

import json
import re
import sys
from pathlib import Path

from processes import deepspeed
from tqdm import tqdm

STEPS = 6


def killed(command: str, gpus: int, folder: Path, timeout: float) -> str:
    """Of a `finetune.py` of six steps, saved after every second, in which the last rank dies in its
    second save; then the same command again; and the same without a death."""
    command = command.replace("--save_strategy no", "--save_strategy steps --save_steps 2")
    command += " --save_total_limit 1 --learning_rate 1e-4"

    def start(output: str, victim: int) -> tuple[str, int]:
        words = ["die", str(victim), *command.split(), "--output_dir", str(folder / output)]
        ended = deepspeed(gpus, words, folder / "log", timeout)
        bar.update()
        return ended

    with tqdm(total=3, unit="run", file=sys.stderr) as bar:
        _, code = start("killed", gpus - 1)
        kept = sorted(one.name for one in (folder / "killed").glob("checkpoint-*"))
        printed, _ = start("killed", -1)
        start("whole", -1)
    repeated = re.findall(r"step (\d+)/", printed)
    return judged(code, kept, repeated, *(losses(folder / f) for f in ("killed", "whole")))


def losses(output: Path) -> list[float]:
    """Of all steps; empty without the last checkpoint."""
    state = output / f"checkpoint-{STEPS}" / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"] if state.exists() else []
    return [line["loss"] for line in history if "loss" in line]


def judged(
    code: int, kept: list[str], repeated: list[str], found: list[float], whole: list[float]
) -> str:
    """What became of a killed run, from its exit code, the checkpoints that it left, the steps that
    the repeated one took, and the losses of it and of an undisturbed one."""
    if code == 0 or kept != ["checkpoint-2"]:
        return f"FAILED: exit code {code}, checkpoints {', '.join(kept) or 'none'}"
    if repeated != ["3", "4", "5", "6"] or not len(found) == len(whole) == STEPS:
        return f"FAILED: went on with steps {', '.join(repeated) or 'none'}"
    apart = max(abs(a / b - 1) for a, b in zip(found, whole, strict=True))
    return f"exit code {code}; went on from step 2, losses within {apart:.0e} of a whole run's"
