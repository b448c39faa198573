"""The file of --deepspeed: what it must and must not hold, and what a run asks of it."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import UserError
from ..json_file import read_object


def check_deepspeed_file(file: str) -> None:
    """Refuses a broken file, on which transformers would end with an error that does not name it.

    Raises:
        UserError: it cannot be read, or has a block that would silently replace options.
    """
    example = "configs/ds_config_zero2_no_offload.json"
    settings = read_object(file, f"give --deepspeed a file such as {example}")
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict) or type(zero.get("stage")) is not int:
        raise UserError(
            f"--deepspeed {file} has no number as the stage of zero_optimization; give it one, as "
            f"{example} does"
        )
    for block, option in (("scheduler", "--lr_scheduler_type"), ("optimizer", "--optim")):
        if block in settings:
            raise UserError(
                f"{file} has a block {block!r}, which would silently replace what {option} and "
                "--learning_rate say; take it out"
            )
    if "RANK" not in os.environ:
        raise UserError(
            "--deepspeed needs its launcher; write deepspeed (deepspeed --num_gpus 1 for one GPU) "
            "instead of python"
        )


def zero_settings(training: TrainingArguments) -> dict[str, Any]:
    """The block zero_optimization of the run's DeepSpeed file; empty without one."""
    if not training.deepspeed:
        return {}
    return json.loads(Path(training.deepspeed).read_text(encoding="utf-8"))["zero_optimization"]


def zero_stage(training: TrainingArguments) -> int:
    """The stage of ZeRO; 0 without DeepSpeed."""
    return zero_settings(training).get("stage", 0)
