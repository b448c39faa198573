"""Saves what is trained: tensor by tensor from the GPU to the host, and from there to the disk.

A save takes no GPU memory beyond what training holds. Before the first step, the largest tensor is
saved once as a trial.
"""

import copy
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ..checkpoint_writer import write_shards
from ..checksums import write_text_checksums
from ..delta import STEM
from ..errors import RunError, UserError, first_words
from ..experts.choose import CHOICE_FILE, choice_as_text
from ..model.layout import official_parts
from .adapter_config import ADAPTER_FILE
from .chosen_experts import has_chosen_experts, trained_parts
from .expert_lora import chosen_in, with_all_experts

INCOMPLETE = "incomplete"
"""The folder inside of a run's folder that holds whatever is not complete yet."""
SHARD_BYTES = 2 * 10**9
"""The size of a weight file. So much of the weights is on the host at once."""
ONE_TENSOR = 0
"""Given as the size of a weight file: each tensor gets its own."""


def tensors_on_host(
    model: nn.Module, state: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields official names and tensors of `model`, and copies each tensor to the host only then.

    Args:
        state: all parameters by their names in memory, if `model` holds only a part of each
            (ZeRO-3).
    """
    parameters = state or dict(model.named_parameters())
    for name, _ in model.named_parameters():
        tensor = parameters[name].detach()
        for official, where in official_parts(name, tuple(tensor.shape)):
            yield official, tensor[where].to("cpu", copy=True).contiguous()


def trained_on_host(
    model: nn.Module, state: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `tensors_on_host`, but only of what trains, which may be chosen experts."""
    parameters = state or dict(model.named_parameters())
    for official, name, where in trained_parts(model):
        yield official, parameters[name].detach()[where].to("cpu", copy=True).contiguous()


def gather_parameters(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Gathers the parameters that ZeRO-3 has divided, one at a time. All processes call it.

    Returns:
        Copies on the host by their names in memory, of adapters and chosen experts only what
        trains; nothing unless this process is to `keep` them.
    """
    import deepspeed

    part, kept = isinstance(model, PeftModel) or has_chosen_experts(model), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not part:
            with deepspeed.zero.GatheredParameters(parameter):
                if keep:
                    kept[name] = parameter.detach().to("cpu", copy=True)
    return kept


def save_trained(
    model: nn.Module, folder: Path, state: Mapping[str, torch.Tensor] | None, shard_bytes: int
) -> None:
    """Writes what a run goes on from: the adapter that trains, what changes where chosen experts
    train, or config and weights of the model.

    Weights keep their dtypes and have the official names. `state` is that of `gather_parameters`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        on_host = {n: p.detach().cpu() for n, p in (state or trained).items()}
        model.save_pretrained(str(folder), state_dict=with_all_experts(model, on_host))
        saved = load_file(folder / ADAPTER_FILE)  # PEFT wrote it without checksums
        write_shards(iter(saved.items()), folder, sys.maxsize, Path(ADAPTER_FILE).stem)
        if chosen := chosen_in(model):
            (folder / CHOICE_FILE).write_text(choice_as_text(chosen), encoding="utf-8")
        return
    if has_chosen_experts(model):
        write_shards(trained_on_host(model, state), folder, shard_bytes, STEM)
        return
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    # `save_pretrained` would refuse, hours later, what transformers had loaded with a warning.
    model.generation_config.to_json_file(folder / "generation_config.json")
    write_shards(tensors_on_host(model, state), folder, shard_bytes)


def publish_checkpoint(output: Path, name: str, limit: int | None) -> None:
    """Adds the checksums of its texts to the complete checkpoint `name` in INCOMPLETE, and moves it
    into `output`, its run's folder.

    Keeps the newest `limit` checkpoints, or all if that is not positive. Whatever is to be deleted
    is moved to INCOMPLETE first, so that no half-deleted folder has the name of a checkpoint.
    """
    aside = output / INCOMPLETE
    with report_failed_write(output, main=True):
        write_text_checksums(aside / name)
    if (output / name).exists():
        os.replace(output / name, aside / f"{name}-before")
    os.replace(aside / name, output / name)
    if (limit or 0) > 0:
        for old in sort_checkpoints(str(output))[:-limit]:
            os.replace(old, aside / Path(old).name)
    shutil.rmtree(aside)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tells whether `error`, or an error that it was raised from, is of a full GPU or host."""
    while error is not None:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        full |= getattr(error, "errno", None) == errno.ENOMEM
        text = str(error).lower()  # The host's allocator and libraries raise RuntimeError.
        if full or "out of memory" in text or "allocate memory" in text:
            return True
        error = error.__cause__
    return False


@contextmanager
def report_failed_write(output: Path, main: bool) -> Iterator[None]:
    """Turns an error of writing into one line, and removes what is half written.

    Args:
        output: the folder of the run.
        main: whether this process does the removing.

    Raises:
        RunError: names the cause (memory or disk) and the last complete checkpoint.
        UserError: one that was raised inside, unchanged. The write itself did not fail.
    """
    try:
        yield
    except Exception as error:  # Libraries raise errors of any class when a disk is full.
        if main:
            shutil.rmtree(output / INCOMPLETE, ignore_errors=True)
        if isinstance(error, UserError) and not isinstance(error, RunError):
            raise
        found = first_words(error)
        if is_out_of_memory(error):
            what = f"saving to {output} ran out of memory ({found})"
            remedy = "end other programs, or lower --per_device_train_batch_size,"
        else:
            if isinstance(error, RunError):
                found = found.partition("; ")[0]  # Its own remedy is one for exports.
            free = shutil.disk_usage(output).free / 1e9
            what = f"{output} could not be written to ({found}; {free:.1f} GB free there)"
            remedy = "make room"
        last = get_last_checkpoint(str(output)) or "none"
        raise RunError(
            f"{what}; the last complete checkpoint is {last}: {remedy} and repeat the command to "
            "go on from it"
        ) from error


class RehearseSave(TrainerCallback):
    """Saves the largest trained tensor before the first step, with its optimizer states, if any.

    So a folder that cannot be written to is found before any step can be lost.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad and p.numel()]
        if not trained or not state.is_world_process_zero:  # ZeRO-3 leaves every parameter empty.
            return
        largest = max(trained, key=lambda parameter: parameter.nbytes)
        states = getattr(kwargs.get("optimizer"), "state", {}).get(largest, {})
        output = Path(args.output_dir)
        aside = output / INCOMPLETE
        with report_failed_write(output, main=True):
            clear_device_cache(garbage_collection=True)
            kwargs["model"].config.save_pretrained(aside)
            write_shards(iter([("largest", largest.detach().cpu())]), aside, SHARD_BYTES)
            torch.save(states, aside / "optimizer.pt")
            shutil.rmtree(aside)
