"""The room on a disk that a fine-tuning run needs, reckoned before any weight is loaded."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .arguments import FineTuningArguments, ModelArguments
from .errors import UserError
from .memory import optimizer_bytes
from .quantization import full_shape
from .saving import INCOMPLETE


@dataclass
class DiskNeed:
    """Bytes that a run writes: each of the checkpoints that it keeps, and its result."""

    checkpoint: float
    checkpoints: int
    result: float

    @property
    def least(self) -> float:
        """A checkpoint, if there is any, and the result: what no run can end without."""
        return self.checkpoint * min(1, self.checkpoints) + self.result

    @property
    def total(self) -> float:
        return self.checkpoint * self.checkpoints + self.result

    def compared_with(self, output: Path) -> str:
        """One line: what the run needs, and what the disk of `output` has."""
        kept = "no checkpoint"
        if self.checkpoints:
            kept = f"{self.checkpoints} x {_size(self.checkpoint)} of checkpoints"
        return (
            f"{kept} and {_size(self.result)} of result, {_size(self.total)} in all; "
            f"{_size(free_bytes(output))} are free"
        )

    def refuse_too_small(self, output: Path) -> None:
        """
        Raises:
            UserError: the disk of `output` cannot hold one checkpoint and the result.
        """
        free = free_bytes(output)
        if self.least > free:
            raise UserError(
                f"the disk of {output} is too small: a checkpoint takes {_size(self.checkpoint)}, "
                f"the result {_size(self.result)}, and {_size(free)} are free; make room, or give "
                "another --output_dir"
            )


def disk_need(
    model: nn.Module, options: ModelArguments, training: FineTuningArguments, steps: int
) -> DiskNeed:
    """What a run of `steps` steps over `model` (on meta, with its adapters) writes.

    A checkpoint holds the weights (of LoRA those of the adapters) as training keeps them, and the
    optimizer's states; under DeepSpeed also fp32 copies of what trains. The result is the adapter,
    or the whole model in the base's dtype, which is taken to be bf16.
    """
    low = 2 if training.bf16 else 4
    number = sum(full_shape(p).numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    keeps_fp32 = not (training.deepspeed or training.single_gpu_full)
    weights = float(trained * (4 if keeps_fp32 else low))
    states = trained * (12.0 if training.deepspeed else optimizer_bytes(training))
    whole = 2.0 * _numbers_of_base(model)
    if options.use_lora:
        result = weights + (whole if options.merge_on_save else 0)
    else:
        weights += low * (number - trained)
        result = whole
    return DiskNeed(weights + states, _checkpoints(training, steps), result)


def _numbers_of_base(model: nn.Module) -> int:
    """Without adapters, and without the copies that train in the place of saved modules."""
    return sum(
        full_shape(parameter).numel()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    )


def _checkpoints(training: FineTuningArguments, steps: int) -> int:
    """How many checkpoints a run keeps at its end."""
    if training.save_strategy == "no":
        return 0
    if training.save_strategy == "epoch":
        count = math.ceil(training.num_train_epochs)
    else:
        every = training.save_steps if training.save_steps >= 1 else training.save_steps * steps
        count = math.ceil(steps / max(1, math.ceil(every)))  # the last step has one too
    return min(count, training.save_total_limit or count)


def free_bytes(output: Path) -> int:
    """Bytes that a run in `output`, which need not be there yet, can write."""
    output = output.absolute()
    there = next(folder for folder in (output, *output.parents) if folder.is_dir())
    # What an interrupted save has left is removed before anything is written.
    left_over = sum(file.stat().st_size for file in (output / INCOMPLETE).rglob("*"))
    return shutil.disk_usage(there).free + left_over


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
