"""Checks that a checkpoint is whole before a run goes on from it.

If a file is missing, Trainer goes on without it: with a fresh optimizer, or at another learning
rate. If a file is damaged, a library raises an error that does not name the file. So every file is
checked first: whether it is there, whether its structure is whole, whether it is of the
checkpoint's step, and whether it has the checksums with which it was written.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import TrainerState

from .. import checksums
from ..checkpoint import Checkpoint
from ..delta import STEM
from ..errors import RunError, UserError, first_words
from ..json_file import read_object
from ..model.layout import weight_files
from ..processes import CollectiveRunError
from .adapter_config import ADAPTER_FILE
from .arguments import FineTuningArguments
from .compute.adamw_in_backward import StepInBackward
from .deepspeed_file import zero_stage
from .quantized_base import QUANTIZATION_FILE
from .saving import is_out_of_memory

Check = Callable[[Path], object]
"""Raises any exception if the file is damaged."""
OF_A_WEIGHT = ("exp_avg", "exp_avg_sq", "m", "v")
"""The states of AdamW (torch's or ours) that have the shape of their weight."""


@dataclass(frozen=True)
class Layout:
    """What decides which files a checkpoint of a run has."""

    processes: int
    stage: int | None  # of ZeRO; None without DeepSpeed
    adapter: bool  # whether an adapter is trained, rather than the weights
    quantized: bool = False  # whether what is frozen is quantised
    delta: bool = False  # whether only what trains of the weights is saved

    @classmethod
    def of(
        cls,
        training: FineTuningArguments,
        adapter: bool,
        quantized: bool = False,
        delta: bool = False,
    ) -> "Layout":
        stage = zero_stage(training) if training.deepspeed else None
        return cls(training.world_size, stage, adapter, quantized, delta)

    def checks(self, folder: Path) -> Iterator[tuple[Path, Check]]:
        """Yields each file that is read back from the checkpoint `folder`, and its check."""
        step = _step(folder)
        yield folder / "trainer_state.json", partial(_check_trainer_state, step=step)
        ranks = range(self.processes)
        for name in [f"rng_state_{rank}.pth" for rank in ranks] if ranks[1:] else ["rng_state.pth"]:
            yield folder / name, _check_archive
        if self.quantized:
            yield folder / QUANTIZATION_FILE, read_object
        yield folder / "scheduler.pt", partial(_check_schedule, step=step)
        if self.stage is None:
            yield folder / "optimizer.pt", _check_optimizer
            yield from self._weights(folder)
        else:
            yield folder / "latest", _check_latest
            yield from self._of_deepspeed(folder)

    def _weights(self, folder: Path) -> Iterator[tuple[Path, Check]]:
        if self.adapter:
            yield folder / "adapter_config.json", read_object
            yield folder / ADAPTER_FILE, _check_safetensors
            return
        stem = STEM if self.delta else "model"
        if not self.delta:
            yield folder / "config.json", read_object
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            yield index, _check_index
        for file in weight_files(folder, stem):
            yield file, _check_safetensors
        if not self.delta:
            yield index if index.is_file() else folder / "model.safetensors", _check_model

    def _of_deepspeed(self, folder: Path) -> Iterator[tuple[Path, Check]]:
        states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        for rank in range(self.processes):
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            if self.stage:
                low = states / f"bf16_{name}_optim_states.pt"
                plain = states / f"{name}_optim_states.pt"
                yield low if low.is_file() else plain, _check_archive
            if self.stage == 3:
                yield states / f"{name}_model_states.pt", _check_archive
        if self.stage != 3:
            yield states / "mp_rank_00_model_states.pt", _check_archive


def refuse_damaged(checkpoint: Path, layout: Layout) -> None:
    """Checks a checkpoint before anything of it is loaded. All processes call this, and share the
    checksums among themselves.

    Raises:
        CollectiveRunError: names the first file that is missing or damaged, what is wrong with it,
            and what to remove to go on from the last checkpoint before it that is whole.
        RunError: the same, of a checksum, which only this process has compared.
    """
    if not (damage := _find_broken(checkpoint, layout)):
        if changed := _find_changed(checkpoint, layout, int(os.environ.get("RANK", 0))):
            raise RunError(f"{changed}; {_remedy(checkpoint, layout)}")
        return
    # One process saves its random states to rng_state.pth, each of several to rng_state_N.pth.
    ranks = [int(file.stem[10:] or 0) for file in checkpoint.glob("rng_state*.pth")]
    saved_by = 1 + max(ranks, default=layout.processes - 1)
    if saved_by != layout.processes:
        raise CollectiveRunError(
            f"{checkpoint} was saved by {saved_by} processes, and this run has {layout.processes}; "
            f"repeat the command with {saved_by}, or give another --output_dir"
        )
    raise CollectiveRunError(f"{damage}; {_remedy(checkpoint, layout)}")


def find_damage(checkpoint: Path, layout: Layout) -> str | None:
    """Names a file of the checkpoint that is not whole, and what is wrong with it."""
    return _find_broken(checkpoint, layout) or _find_changed(checkpoint, layout)


def _find_changed(checkpoint: Path, layout: Layout, rank: int | None = None) -> str | None:
    """Compares the checksums of the share of `rank`, or of all files."""
    files = [checkpoint / checksums.CHECKSUMS, *(file for file, _ in layout.checks(checkpoint))]
    share = files if rank is None else files[rank :: layout.processes]
    return checksums.find_damage(tqdm(share, "verify", unit="file", delay=3, leave=False))


def _find_broken(checkpoint: Path, layout: Layout) -> str | None:
    for file, check in layout.checks(checkpoint):
        if not file.is_file():
            return f"{file} is missing"
        if not file.stat().st_size:
            return f"{file} is empty"
        try:
            check(file)
        except Exception as error:  # Libraries raise errors of any class.
            # The weights do not fit a config.json in which a digit has changed.
            changed = checksums.find_damage([checkpoint / checksums.CHECKSUMS])
            return changed or f"{file} is damaged ({first_words(error)})"
    return None


@contextmanager
def report_unreadable(
    checkpoint: Path | None, layout: Layout, is_read: Callable[[], bool]
) -> Iterator[None]:
    """Turns an error that comes before all of a checkpoint `is_read` into one line.

    The checkpoint may still be whole: a library may fail for a reason of its own.

    Raises:
        RunError: names the error and what to try. Only this process may have met it.
    """
    try:
        yield
    except Exception as error:  # Libraries raise errors of any class.
        passes = isinstance(error, UserError) or is_out_of_memory(error)
        if checkpoint is None or passes or is_read():
            raise
        raise RunError(
            f"the run cannot go on from {checkpoint} ({type(error).__name__}: "
            f"{first_words(error)}); if repeating the command does not help, "
            f"{_remedy(checkpoint, layout, 'move', ' away')}"
        ) from error


def refuse_other_states(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Refuses an optimizer.pt without states, or with those of other weights.

    `Optimizer` would load them, and fail in the middle of a step. No number is read here.

    Raises:
        ValueError: says what does not fit.
    """
    if not isinstance(optimizer, torch.optim.AdamW | StepInBackward):
        return
    saved = _load(file)
    if not saved["state"]:
        raise ValueError("it has no states")
    mine = [weight for group in optimizer.param_groups for weight in group["params"]]
    theirs = [index for group in saved["param_groups"] for index in group["params"]]
    if len(mine) != len(theirs):
        raise ValueError(f"it is of {len(theirs)} weights, and this run trains {len(mine)}")
    for weight, index in zip(mine, theirs, strict=True):
        states = saved["state"].get(index, {})
        for shape in [states[name].shape for name in OF_A_WEIGHT if name in states]:
            if shape != weight.shape:
                raise ValueError(f"a state is {list(shape)} for a weight of {list(weight.shape)}")


def refuse_other_adapter(model: nn.Module, folder: Path) -> None:
    """Refuses a saved adapter that lacks weights of `model`, where PEFT would only warn.

    Raises:
        ValueError: names a missing weight.
    """
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    with safe_open(folder / ADAPTER_FILE, framework="pt") as saved:
        missing = sorted(wanted - set(saved.keys()))
    if missing:
        raise ValueError(f"it lacks {missing[0]} ({len(missing)} of {len(wanted)} tensors)")


def _remedy(checkpoint: Path, layout: Layout, verb: str = "remove", after: str = "") -> str:
    """Says what to remove (or move away) to go on from the last checkpoint that is whole."""
    # A name like checkpoint-6-old is the user's.
    found = [one for one in checkpoint.parent.glob("checkpoint-*") if one.name[11:].isdecimal()]
    earlier = [one for one in found if _step(one) < _step(checkpoint)]
    remove = [str(checkpoint)]
    for before in sorted(earlier, key=_step, reverse=True):
        if find_damage(before, layout) is None:
            return f"{verb} {' and '.join(remove)}{after} to go on from {before}"
        remove.append(str(before))
    folders = " and ".join(remove)
    return f"{verb} {folders}{after} to begin anew, since no checkpoint before it is whole"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# ---- the checks of single files ----


def _check_trainer_state(file: Path, step: int) -> None:
    found = TrainerState.load_from_json(str(file)).global_step
    if found != step:
        raise ValueError(f"it is of step {found}")


def _check_archive(file: Path) -> None:
    """Checks what `torch.save` wrote: a zip file, whose list of parts stands at its end."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.namelist()
        if not any(part.endswith("/data.pkl") for part in parts):
            raise ValueError("torch did not save it")
        for part in parts:
            archive.open(part).close()  # reads the header of each


def _load(file: Path) -> Any:
    """Loads what `torch.save` wrote. Executes nothing, and reads a number when it is used."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _check_schedule(file: Path, step: int) -> None:
    _check_archive(file)
    state = dict(_load(file))
    if "lr_lambdas" in state and state["last_epoch"] != step:  # Other schedules count evaluations.
        raise ValueError(f"it is of step {state['last_epoch']}")


def _check_optimizer(file: Path) -> None:
    _check_archive(file)
    found = _load(file)
    if not (isinstance(found["state"], dict) and isinstance(found["param_groups"], list)):
        raise ValueError("it holds no states of an optimizer")


def _check_latest(file: Path) -> None:
    name = file.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"global_step\d+", name) or not file.with_name(name).is_dir():
        raise ValueError(f"it names {name[:40]!r}, which is no folder beside it")


def _check_index(file: Path) -> None:
    weight_files(file.parent, file.name.partition(".")[0])


def _check_safetensors(file: Path) -> None:
    """Reads the header, which says where each tensor is and how long the file must be."""
    with safe_open(file, framework="pt") as tensors:
        if not tensors.keys():
            raise ValueError("it holds no tensors")


def _check_model(file: Path) -> None:
    """Checks that the files together hold every weight, in its shape."""
    try:
        Checkpoint(file.parent)
    except UserError as error:
        raise ValueError(str(error.__cause__ or error)) from error
