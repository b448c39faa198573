"""The room on a disk that a fine-tuning run needs, known before any weight is loaded."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import UserError
from ..files import free_bytes_at, readable_size
from .arguments import FineTuningArguments, ModelArguments
from .chosen_experts import CHOSEN
from .deepspeed_file import zero_stage
from .expert_lora import zeros_left_out
from .memory_need import optimizer_bytes
from .quantized_base import full_shape
from .saving import INCOMPLETE


@dataclass
class DiskNeed:
    """What a run writes: bytes of a checkpoint, how many it saves and keeps, bytes of a result."""

    checkpoint: float
    saved: int
    kept: int
    result: float

    def least(self, resumes: bool = False) -> float:
        """The bytes that must be free at the start, if old checkpoints are moved away in time.

        A run that keeps only the newest checkpoint has two while it saves. A run that `resumes` has
        one already.
        """
        one = self.checkpoint * min(1, self.saved)
        if self.kept > 1:
            return one + self.result
        if resumes:
            return max(one, self.result)
        return max(self.checkpoint * min(2, self.saved), one + self.result)

    @property
    def total(self) -> float:
        """The most bytes that are there at once if nothing is moved."""
        while_saving = self.checkpoint * min(self.saved, self.kept + 1)
        return max(while_saving, self.checkpoint * self.kept + self.result)

    def compared_with(self, output: Path) -> str:
        """One line that says what the run needs and what is free on the disk of `output`."""
        kept = "no checkpoint"
        if self.kept:
            kept = f"{self.kept} x {readable_size(self.checkpoint)} of checkpoints"
        result, total, free = map(readable_size, (self.result, self.total, free_bytes(output)))
        return f"{kept} and {result} of result, at most {total} at once; {free} are free"

    def refuse_too_small(self, output: Path, resumes: bool = False) -> None:
        """Raises a UserError if the disk of `output` has less than `least` free."""
        least, free = self.least(resumes), free_bytes(output)
        if least > free:
            sizes = (self.checkpoint, self.result, least, free)
            one, result, run, there = map(readable_size, sizes)
            raise UserError(
                f"the disk of {output} is too small: a checkpoint takes {one}, the result "
                f"{result}, the run at least {run}, and {there} are free; make room, or give "
                "another --output_dir"
            )


def disk_need(
    model: nn.Module,
    options: ModelArguments,
    training: FineTuningArguments,
    steps: int,
    steps_in_epoch: int,
) -> DiskNeed:
    """What a run of `steps` steps writes that trains `model` (on meta, with its adapters).

    A checkpoint holds the weights as training keeps them (with LoRA only the adapters, which are
    zeros for experts that were not chosen, with chosen experts only what trains) and the
    optimizer's states. Under DeepSpeed it also holds fp32 copies of what trains and, below stage 3,
    all weights a second time. The result is the adapter, or what changed, or the whole model in the
    base's dtype, which is assumed to be bf16.
    """
    low = training.number_bytes
    number = sum(full_shape(p).numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = float(trained * (4 if training.keeps_fp32 else low))
    states = trained * (12.0 if training.deepspeed else optimizer_bytes(training))
    if training.deepspeed and zero_stage(training) < 3:
        part = options.use_lora or options.train_chosen_whole
        states += low * (trained if part else number)
    added = (".lora_", ".modules_to_save.", f".{CHOSEN}")  # to the base
    whole = 2.0 * sum(
        full_shape(parameter).numel()
        for name, parameter in model.named_parameters()
        if not any(part in name for part in added)
    )
    if options.train_chosen_whole:
        result = 2.0 * trained if options.save_delta else whole
    elif options.use_lora:
        weights += zeros_left_out(model) * (4 if training.keeps_fp32 else low)
        result = weights + (whole if options.merge_on_save else 0)
    else:
        weights += low * (number - trained)
        result = whole
    saved = _checkpoints(training, steps, steps_in_epoch)
    kept = min(saved, training.save_total_limit or saved)
    return DiskNeed(weights + states, saved, kept, result)


def _checkpoints(training: FineTuningArguments, steps: int, steps_in_epoch: int) -> int:
    """How many checkpoints a run saves. There is always one after the last step."""
    if training.save_strategy == "no":
        return 0
    every = training.save_steps if training.save_steps >= 1 else training.save_steps * steps
    if training.save_strategy == "epoch":
        every = steps_in_epoch
    return math.ceil(steps / max(1, math.ceil(every)))


def free_bytes(output: Path) -> int:
    """The bytes that a run can write into `output`, which need not be there yet."""
    left_over = 0  # by an interrupted save; a run removes it before it writes anything
    for file in (output / INCOMPLETE).rglob("*"):
        with suppress(FileNotFoundError):  # The first process may remove it meanwhile.
            left_over += file.stat().st_size
    return free_bytes_at(output) + left_over
