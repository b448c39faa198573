"""Saves what is trained: from the GPU to the host tensor by tensor, and from there to the disk.

A save takes no GPU memory beyond what training holds. Before the first step, the largest tensor is
saved once as a trial.
"""

import copy
import errno
import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint_writer import write_shards
from ..errors import RunError, UserError
from ..model.layout import official_parts

INCOMPLETE = "incomplete"
"""The folder, inside of a run's, in which it writes what is not complete yet."""
SHARD_BYTES = 2 * 10**9  # of a weight file; so much of the weights is on the host at once
ONE_TENSOR = 0  # instead: a file for each tensor


def tensors_on_host(
    model: nn.Module, state: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and tensors of `model`, each copied to the host when it is asked for.

    Args:
        state: the parameters by their names in memory, where `model` itself does not hold them
            whole (ZeRO-3).
    """
    parameters = state or dict(model.named_parameters())
    for name, _ in model.named_parameters():  # a tied head is in `state` too, and not in here
        tensor = parameters[name].detach()
        for official, where in official_parts(name, tuple(tensor.shape)):
            yield official, tensor[where].to("cpu", copy=True).contiguous()


def save_weights(
    model: PreTrainedModel,
    folder: Path,
    state: Mapping[str, torch.Tensor] | None,
    shard_bytes: int,
) -> None:
    """Writes config and weights of a checkpoint that training goes on from, in their own dtypes.

    The names are the official ones. `state` is that of `tensors_on_host`.
    """
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_shards(tensors_on_host(model, state), folder, shard_bytes)


def save_sparingly(save: Callable[[int], None], aside: Path, alone: bool) -> None:
    """Calls `save(shard_bytes)`; when memory runs out, once more with ONE_TENSOR at a time.

    Args:
        aside: the folder that `save` fills; it is emptied between the two tries.
        alone: whether this is the only process. Others would wait for a second try for ever.
    """
    release_gpu_memory()
    try:
        save(SHARD_BYTES)
        return
    except Exception as error:
        if not (alone and is_out_of_memory(error)):
            raise
    # This stands outside of `except`: inside, the error's traceback would keep tensors alive.
    shutil.rmtree(aside, ignore_errors=True)
    release_gpu_memory()
    save(ONE_TENSOR)


def release_gpu_memory() -> None:
    """Gives back what PyTorch's allocator has cached, for libraries that allocate by themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, says that GPU or host ran out of memory."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if getattr(error, "errno", None) == errno.ENOMEM:
            return True
        text = str(error).lower()  # of the host's allocator, and of libraries, as RuntimeError
        if "out of memory" in text or "allocate memory" in text:
            return True
        error = error.__cause__
    return False


@contextmanager
def report_failed_save(output: str | Path, main: bool) -> Iterator[None]:
    """Turns a save that failed into one line, after removing what is half written.

    Args:
        output: the folder of the run.
        main: whether this process is the one that removes.

    Raises:
        RunError: names the cause (memory, or the disk) and the last complete checkpoint.
        UserError: as it was raised inside; the save itself did not fail.
    """
    try:
        yield
    except Exception as error:  # libraries raise errors of any class when a disk is full
        if main:
            shutil.rmtree(Path(output) / INCOMPLETE, ignore_errors=True)
        if isinstance(error, UserError) and not isinstance(error, RunError):
            raise
        found = " ".join(str(error).split())[:200] or type(error).__name__
        last = f"the last complete checkpoint is {get_last_checkpoint(str(output)) or 'none'}"
        if is_out_of_memory(error):
            raise RunError(
                f"saving to {output} ran out of memory ({found}); {last}: end other programs, or "
                "lower --per_device_train_batch_size, and repeat the command to go on from it"
            ) from error
        if isinstance(error, RunError):
            found = found.partition("; ")[0]  # Its own remedy is one for exports.
        free = shutil.disk_usage(output).free / 1e9
        raise RunError(
            f"{output} could not be written to ({found}; {free:.1f} GB free there); {last}: make "
            "room and repeat the command to go on from it"
        ) from error


class RehearseSave(TrainerCallback):
    """Saves the largest trained tensor before the first step, with its optimizer states if there
    are any yet.

    A folder that cannot be written to is then found before any step can be lost.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad and p.numel()]
        if not trained:  # ZeRO-3 has divided all of them
            return
        largest = max(trained, key=lambda parameter: parameter.nbytes)
        optimizer = kwargs.get("optimizer")
        states = getattr(optimizer, "state", {}).get(largest, {})
        aside = Path(args.output_dir) / INCOMPLETE
        with report_failed_save(args.output_dir, main=True):
            release_gpu_memory()
            kwargs["model"].config.save_pretrained(aside)
            write_shards(iter([("largest", largest.detach().cpu())]), aside, SHARD_BYTES)
            torch.save(states, aside / "optimizer.pt")
            shutil.rmtree(aside)
