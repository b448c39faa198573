"""What multi_gpu.py runs on each GPU; the environment says who is who, as that of torchrun does.

    one_rank.py profile FILE ...     finetune.py with its last step profiled
    one_rank.py die STEP ...         finetune.py, killed in the save of a step
    one_rank.py generate FILE {...}  greedy tokens and their rate
    one_rank.py link FILE            how fast the GPUs talk

Results are JSON files that the first process writes.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tables import DEVICE
from timing import median_seconds, random_prompts, stock_decode, wait
from torch import distributed
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import ExportableState

from deepseek_moe.errors import exit_on_user_error
from deepseek_moe.files import write_text
from deepseek_moe.processes import end_without_teardown, rank_zero_reports

WAYS = ("one", "tensor", "expert")
TALKS = ("nccl", "gloo:")  # how the names of kernels begin that reach other ranks
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")  # and those of calls that start kernels
RANK = int(os.environ.get("RANK", 0))
Span = tuple[str, float, float]
"""Name, start and end of a kernel, in seconds."""


def main() -> None:
    what, argument, *rest = sys.argv[1:]
    if DEVICE.type == "cuda":
        torch.cuda.set_device(RANK)
    if what == "generate":
        finish(argument, generate(**json.loads(rest[0])))
    elif what == "link":
        finish(argument, {"bytes_s": link_speed()})
    else:
        callback = DieInSave(int(argument)) if what == "die" else ProfileLastStep(argument)
        finetune(rest, [callback] if RANK == 0 else [])


def finetune(argv: Sequence[str], callbacks: Sequence[TrainerCallback]) -> None:
    """Runs finetune.py in this process."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "finetune"))
    import finetune

    with end_without_teardown(), exit_on_user_error(), rank_zero_reports():
        finetune.main(argv, callbacks)


class ProfileLastStep(TrainerCallback):
    """Writes what the last step did to `file`; the others go at full speed: its communication, how
    often the host started something on the device, and the milliseconds in which that was at work.
    """

    def __init__(self, file: str) -> None:
        self.file, self.start, self.profiler = file, 0.0, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self.profiler = profile(activities=[getattr(ProfilerActivity, DEVICE.type.upper())])
            self.profiler.start()
            wait()
            self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is None:
            return
        wait()
        seconds = time.perf_counter() - self.start
        self.profiler.stop()
        events = self.profiler.events()
        launches = sum(event.name.startswith(LAUNCHES) for event in events)
        if DEVICE.type == "cuda":  # Kernels and copies; annotations are names for these.
            on_device = torch.autograd.DeviceType.CUDA
            events = [e for e in events if e.device_type == on_device and not e.is_user_annotation]
        spans = [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events]
        found = communication_shares(spans, seconds)
        found |= {"launches": launches, "device_ms": 1000 * covered_seconds(spans)}
        write_text(self.file, json.dumps(found))


class DieInSave(TrainerCallback, ExportableState):
    """Kills this process in the save of a step: Trainer asks for the state of callbacks when it has
    written the model and the optimizer, and before it writes its own state."""

    def __init__(self, step: int) -> None:
        self.victim, self.step = step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def state(self) -> dict[str, Any]:
        if self.step and self.step == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"args": {"step": self.victim}, "attributes": {}}


def communication_shares(spans: Sequence[Span], seconds: float) -> dict[str, float]:
    """Parts of a step of `seconds` in which NCCL (gloo, on CPUs) was at work, and alone at work.

    A collective counts from when this rank enters it, waiting for the slowest rank included.
    """
    talks = covered_seconds([span for span in spans if span[0].startswith(TALKS)])
    computes = covered_seconds([span for span in spans if not span[0].startswith(TALKS)])
    exposed = covered_seconds(spans) - computes
    return {"communication": talks / seconds, "exposed": exposed / seconds}


def covered_seconds(spans: Sequence[Span]) -> float:
    """Seconds that are in at least one span."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def link_speed() -> float:
    """Bytes/s that each rank sends and receives in a large sum over all ranks.

    In a ring each of n ranks passes on 2 (n - 1) / n of what is summed.
    """
    on_gpu = DEVICE.type == "cuda"
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    data = torch.zeros(2**29 if on_gpu else 2**20, dtype=torch.bfloat16, device=DEVICE)
    seconds = median_seconds(lambda: distributed.all_reduce(data), times=10)
    ranks = distributed.get_world_size()
    return 2 * (ranks - 1) / ranks * data.nbytes / seconds


def generate(
    way: str,
    model: str,
    dtype: str,
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
) -> dict[str, Any]:
    """Tokens of `generate` for each batch size, tokens/s, and GB of this GPU."""
    options: dict[str, Any] = {"device_map": {"": str(DEVICE)}}
    if way != "one":
        options = {"distributed_config": division(way, int(os.environ["WORLD_SIZE"]))}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options)
    network.eval()
    found: dict[str, Any] = {"tokens": {}, "tokens_s": {}}
    for size in batch_sizes:
        prompts = random_prompts(network, size, prompt_tokens)
        seconds, found["tokens"][size] = stock_decode(network, prompts, new_tokens)
        found["tokens_s"][size] = size / seconds
    found["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9  # 0 on a CPU
    return found


def division(way: str, ranks: int) -> DistributedConfig:
    """The model's own plan for its tensors, with its plan for experts or without it."""
    options: dict[str, Any] = {"tp_size": ranks, "tp_plan": "auto"}
    if way == "expert" and "ep_size" in {field.name for field in fields(DistributedConfig)}:
        options["ep_size"] = ranks
    elif way == "expert":  # transformers 5.17
        options["enable_expert_parallel"] = True
    return DistributedConfig(**options)


def finish(file: str, found: dict[str, Any]) -> None:
    if RANK == 0:
        write_text(file, json.dumps(found))
    if distributed.is_initialized():
        distributed.barrier()  # One that leaves early may abort the others.
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
