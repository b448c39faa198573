"""Whether a checkpoint is whole, asked before a run goes on from it.

If a file is missing, Trainer goes on without it: with a fresh optimizer, or at another learning
rate. If a file is damaged, a library raises an error that does not name the file. So each file that
is going to be read back is looked at first: whether it is there, whether its structure is whole,
and whether it is of the checkpoint's step. Large files are not read in full, so changed numbers in
them go unseen.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState

from ..checkpoint import ADAPTER_FILE, Checkpoint
from ..errors import CollectiveRunError, RunError, UserError
from ..model.layout import weight_files
from .arguments import FineTuningArguments, zero_stage
from .compute.adamw_in_backward import StepInBackward
from .quantized_base import QUANTIZATION_FILE
from .saving import is_out_of_memory

Check = Callable[[Path], None]
"""Raises any exception if the file is damaged."""
SMALL = 2**26
"""Bytes; up to here the checksums of a file's content are compared too."""
OF_A_WEIGHT = ("exp_avg", "exp_avg_sq", "m", "v")
"""What AdamW, torch's or ours, keeps for each number of a weight."""


@dataclass(frozen=True)
class Layout:
    """What decides the files of a run's checkpoints: the number of `processes`, the stage of ZeRO
    (None without DeepSpeed), whether an `adapter` is trained or the weights are, and whether that
    is over a `quantized` base."""

    processes: int
    stage: int | None
    adapter: bool
    quantized: bool = False

    @classmethod
    def of(cls, training: FineTuningArguments, adapter: bool, quantized: bool = False) -> "Layout":
        stage = zero_stage(training) if training.deepspeed else None
        return cls(training.world_size, stage, adapter, quantized)

    def checks(self, folder: Path) -> Iterator[tuple[Path, Check]]:
        """Each file of the checkpoint `folder` that is read back, and how it is checked."""
        step = int(folder.name.rpartition("-")[2])
        yield folder / "trainer_state.json", partial(_check_trainer_state, step=step)
        ranks = range(self.processes)
        for name in [f"rng_state_{rank}.pth" for rank in ranks] if ranks[1:] else ["rng_state.pth"]:
            yield folder / name, _check_archive
        if self.quantized:
            yield folder / QUANTIZATION_FILE, _check_object
        yield folder / "scheduler.pt", partial(_check_schedule, step=step)
        if self.stage is None:
            yield folder / "optimizer.pt", _check_optimizer
            yield from self._weights(folder)
        else:
            yield folder / "latest", _check_latest
            yield from self._of_deepspeed(folder)

    def _weights(self, folder: Path) -> Iterator[tuple[Path, Check]]:
        if self.adapter:
            yield folder / "adapter_config.json", _check_object
            yield folder / ADAPTER_FILE, _check_safetensors
            return
        yield folder / "config.json", _check_object
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            yield index, _check_index
        for file in weight_files(folder):
            yield file, _check_safetensors
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
    """Looks at a checkpoint before anything of it is loaded. Called by all processes.

    Raises:
        CollectiveRunError: in one line: the first file that is missing or damaged, what is wrong with it,
            and what to remove to go on from the last checkpoint before it that is whole.
    """
    if found := damage(checkpoint, layout):
        saved_by = processes_of(checkpoint)
        if saved_by not in (None, layout.processes):
            raise CollectiveRunError(
                f"{checkpoint} was saved by {saved_by} processes, and this run has "
                f"{layout.processes}; repeat the command with {saved_by}, or give another "
                "--output_dir"
            )
        raise CollectiveRunError(f"{found}; {_remedy(checkpoint, layout)}")


def damage(checkpoint: Path, layout: Layout) -> str | None:
    """The first file of the checkpoint that is not whole and what is wrong with it, or None."""
    for file, check in layout.checks(checkpoint):
        if not file.is_file():
            return f"{file} is missing"
        if not file.stat().st_size:
            return f"{file} is empty"
        try:
            check(file)
        except Exception as error:  # of many libraries, and of any class
            return f"{file} is damaged ({_first_words(error)})"
    return None


def processes_of(checkpoint: Path) -> int | None:
    """How many processes saved a checkpoint, by their random states; None if there is none."""
    ranks = [int(file.stem[10:]) for file in checkpoint.glob("rng_state_*.pth")]
    if ranks:
        return 1 + max(ranks)
    return 1 if (checkpoint / "rng_state.pth").is_file() else None


class ResumingTrainer(Trainer):
    """transformers' Trainer, which reads a checkpoint back in full or says what it cannot read."""

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer would match the per-expert names on disk with the stacked ones in memory, find
        none of the experts, warn, and go on with those of the base model."""
        model = model or self.model
        with self._reading_back(checkpoint, "the weights"):
            if not isinstance(model, PreTrainedModel):  # adapters are stored as they are
                refuse_other_adapter(model, Path(checkpoint))
                super()._load_from_checkpoint(checkpoint, model)
                return
            saved = Checkpoint(Path(checkpoint))
            with torch.no_grad():  # one at a time, each in its own dtype: what trains may be fp32
                for name, parameter in model.named_parameters():
                    parameter.copy_(saved.read(name))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._reading_back(checkpoint, "optimizer.pt or scheduler.pt"):
            if checkpoint and not self.is_deepspeed_enabled:
                refuse_other_states(self.optimizer.optimizer, Path(checkpoint, "optimizer.pt"))
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._reading_back(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed reads everything back in here."""
        checkpoint = kwargs.get("resume_from_checkpoint", args[-1] if args else None)
        with self._reading_back(
            checkpoint if self.is_deepspeed_enabled else None, "the states of DeepSpeed"
        ):
            return super()._prepare_for_training(*args, **kwargs)

    def _reading_back(self, checkpoint: str | None, what: str) -> AbstractContextManager[None]:
        if checkpoint is None:
            return nullcontext()
        adapter = not isinstance(self.model, PreTrainedModel)
        quantized = self.base_quantization is not None
        return reading_back(checkpoint, what, Layout.of(self.args, adapter, quantized))


@contextmanager
def reading_back(checkpoint: str | Path, what: str, layout: Layout) -> Iterator[None]:
    """Turns an error of a library that loads `what` of a checkpoint into one line.

    The checkpoint may still be whole: a library may fail for a reason of its own.

    Raises:
        RunError: names the error, and what to try. It is of this process alone.
    """
    try:
        yield
    except Exception as error:  # libraries raise errors of any class
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise RunError(
            f"{what} of {checkpoint} cannot be read back ({_first_words(error)}); if repeating the "
            f"command does not help, {_remedy(Path(checkpoint), layout, 'move', ' away')}"
        ) from error


def refuse_other_states(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Refuses states of other weights in optimizer.pt, which `Optimizer` would find out in the
    middle of a step. None of the numbers is read.

    Raises:
        ValueError: there are no states, or those of other weights.
    """
    if not isinstance(optimizer, torch.optim.AdamW | StepInBackward):
        return
    saved = _load(file)
    if not saved["state"]:
        raise ValueError("it has no states")
    mine, theirs = (
        [one for group in groups for one in group["params"]]
        for groups in (optimizer.param_groups, saved["param_groups"])
    )
    if len(mine) != len(theirs):
        raise ValueError(f"it is of {len(theirs)} weights, and this run trains {len(mine)}")
    for parameter, index in zip(mine, theirs, strict=True):
        for name in saved["state"].get(index, {}).keys() & set(OF_A_WEIGHT):
            shape = saved["state"][index][name].shape
            if shape != parameter.shape:
                raise ValueError(
                    f"a state is {list(shape)} for a weight of {list(parameter.shape)}"
                )


def refuse_other_adapter(model: nn.Module, folder: Path) -> None:
    """Refuses a saved adapter that lacks weights of `model`. PEFT would warn, and leave those that
    it does not find as they are.

    Raises:
        ValueError: it names one that is missing.
    """
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    with safe_open(folder / ADAPTER_FILE, framework="pt") as saved:
        missing = sorted(wanted - set(saved.keys()))
    if missing:
        raise ValueError(f"it lacks {missing[0]} ({len(missing)} of {len(wanted)} tensors)")


def _remedy(checkpoint: Path, layout: Layout, verb: str = "remove", after: str = "") -> str:
    """What to remove (or move away), to go on from the last checkpoint that is whole."""
    found = [one for one in checkpoint.parent.glob("checkpoint-*") if one.name[11:].isdecimal()]
    earlier = [one for one in found if _step(one) < _step(checkpoint)]
    remove = [str(checkpoint)]
    for before in sorted(earlier, key=_step, reverse=True):
        if damage(before, layout) is None:
            return f"{verb} {' and '.join(remove)}{after} to go on from {before}"
        remove.append(str(before))
    folders = " and ".join(remove)
    return f"{verb} {folders}{after} to begin anew, since no checkpoint before it is whole"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


# ---- what a file must be ----


def _check_trainer_state(file: Path, step: int) -> None:
    found = TrainerState.load_from_json(str(file)).global_step
    if found != step:
        raise ValueError(f"it is of step {found}")


def _check_archive(file: Path) -> None:
    """Of `torch.save`: a zip file, whose list of parts stands at its end."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.namelist()
        if not any(part.endswith("/data.pkl") for part in parts):
            raise ValueError("torch did not save it")
        for part in parts:
            archive.open(part).close()  # reads the header of each
        if file.stat().st_size <= SMALL and (broken := archive.testzip()):
            raise ValueError(f"the checksum of {broken} in it is wrong")


def _load(file: Path) -> Any:
    """What `torch.save` wrote. Nothing is executed, and a number is read when it is asked for."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _check_schedule(file: Path, step: int) -> None:
    _check_archive(file)
    state = _load(file)
    if not isinstance(state, dict):
        raise ValueError("it holds no state of a schedule")
    if "lr_lambdas" in state and state["last_epoch"] != step:  # others count evaluations
        raise ValueError(f"it is of step {state['last_epoch']}")


def _check_optimizer(file: Path) -> None:
    _check_archive(file)
    found = _load(file)
    for name, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(found[name], kind):
            raise ValueError(f"its {name} is no {kind.__name__}")


def _check_latest(file: Path) -> None:
    name = file.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"global_step\d+", name) or not file.with_name(name).is_dir():
        raise ValueError(f"it names {name[:40]!r}, which is no folder beside it")


def _check_object(file: Path) -> None:
    if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
        raise ValueError("it holds no JSON object")


def _check_index(file: Path) -> None:
    if not json.loads(file.read_text(encoding="utf-8"))["weight_map"].values():
        raise ValueError("it names no weights")


def _check_safetensors(file: Path) -> None:
    """The header says where each tensor is, and how long the file must be."""
    with safe_open(file, framework="pt") as tensors:
        if not tensors.keys():
            raise ValueError("it holds no tensors")


def _check_model(file: Path) -> None:
    """That the files together hold each weight, in its shape."""
    try:
        Checkpoint(file.parent)
    except UserError as error:
        raise ValueError(str(error.__cause__ or error)) from error
