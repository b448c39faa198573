"""What multi_gpu.py runs on each GPU; a launcher starts it and says who is who.

    deepspeed --no_local_rank one_rank.py profile FILE ...    finetune.py, its last step profiled
    deepspeed --no_local_rank one_rank.py die STEP ...        finetune.py, killed in a save
    torchrun one_rank.py generate '{"way": "tensor", ...}'    greedy tokens and their rate
    torchrun one_rank.py link FILE cuda                       how fast the GPUs talk

Results are JSON files that the first process writes.
"""

import importlib.util
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import ExportableState

from deepseek_moe.errors import end_without_teardown, exit_on_user_error, rank_zero_reports
from deepseek_moe.files import write_text

WAYS = ("one", "tensor", "expert")
RANK = int(os.environ.get("RANK", 0))


def main() -> None:
    what, argument, *rest = sys.argv[1:]
    if what == "generate":
        generate(**json.loads(argument))
    elif what == "link":
        measure_link(Path(argument), *rest)
    elif what == "profile":
        finetune(rest, [ProfileLastStep(Path(argument))] if RANK == 0 else [])
    elif what == "die":
        finetune(rest, [DieInSave(int(argument))] if RANK == 0 else [])


def finetune(argv: Sequence[str], callbacks: Sequence[TrainerCallback]) -> None:
    """Runs finetune.py in this process."""
    script = Path(__file__).resolve().parents[1] / "finetune" / "finetune.py"
    sys.path.insert(0, str(script.parent))  # as Python itself does for a script
    spec = importlib.util.spec_from_file_location("finetune", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with end_without_teardown(), exit_on_user_error(), rank_zero_reports():
        module.main(argv, callbacks)


class ProfileLastStep(TrainerCallback):
    """Writes `communication_shares` of the last step to `file`; the others go at full speed."""

    def __init__(self, file: Path) -> None:
        self.file, self.start, self.profiler = file, 0.0, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            on_gpu = args.device.type == "cuda"
            activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
            self.profiler = profile(activities=[activity])
            self.profiler.start()
            synchronize()
            self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is None:
            return
        synchronize()
        seconds = time.perf_counter() - self.start
        self.profiler.stop()
        events = self.profiler.events()
        if args.device.type == "cuda":  # Kernels and copies; annotations are names for these.
            on_device = torch.autograd.DeviceType.CUDA
            events = [e for e in events if e.device_type == on_device and not e.is_user_annotation]
        spans = [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events]
        shares = communication_shares(spans, seconds)
        write_text(self.file, json.dumps(shares), overwrite=True)


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


def communication_shares(
    spans: Sequence[tuple[str, float, float]], seconds: float
) -> dict[str, float]:
    """Parts of a step of `seconds` in which NCCL (gloo, on CPUs) was at work, and alone at work.

    `spans` are name, start and end of each kernel, in seconds. A collective counts from when this
    rank enters it, so that waiting for the slowest rank is in it.
    """
    talks = [span for span in spans if span[0].startswith(("nccl", "gloo:"))]
    computing = covered_seconds([span for span in spans if span not in talks])
    exposed = covered_seconds(spans) - computing
    return {"communication": covered_seconds(talks) / seconds, "exposed": exposed / seconds}


def covered_seconds(spans: Sequence[tuple[str, float, float]]) -> float:
    """Seconds that are in at least one span."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_link(file: Path, device: str) -> None:
    """Bytes/s that each rank sends and receives in a large sum over all ranks.

    In a ring each of n ranks passes on 2 (n - 1) / n of what is summed.
    """
    if device == "cuda":
        torch.cuda.set_device(RANK)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    data = torch.zeros(2**29 if device == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(12):
        distributed.barrier()
        synchronize()
        start = time.perf_counter()
        distributed.all_reduce(data)
        synchronize()
        seconds.append(time.perf_counter() - start)
    ranks = distributed.get_world_size()
    sent = 2 * (ranks - 1) / ranks * data.nbytes
    finish(file, {"bytes_s": sent / statistics.median(seconds[2:])})


def generate(
    way: str,
    model: str,
    dtype: str,
    device: str,
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    file: str,
) -> None:
    """Tokens of `generate` for each batch size, tokens/s, and GB of this GPU."""
    from timing import random_prompts, stock_decode

    if way == "one":
        options = {"device_map": {"": device}}
    else:
        ranks = int(os.environ["WORLD_SIZE"])
        options = {"distributed_config": DistributedConfig(**parallel_options(way, ranks))}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options)
    network.eval()
    found: dict[str, Any] = {"tokens": {}, "tokens_s": {}}
    for size in batch_sizes:
        prompts = random_prompts(network, size, prompt_tokens)
        seconds, found["tokens"][size] = stock_decode(network, prompts, new_tokens)
        found["tokens_s"][size] = size / seconds
    if torch.cuda.is_available():
        found["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    finish(Path(file), found)


def parallel_options(way: str, ranks: int) -> dict[str, Any]:
    """Of transformers' DistributedConfig: the model's tensor plan, with its expert plan or not."""
    options: dict[str, Any] = {"tp_size": ranks, "tp_plan": "auto"}
    if way == "expert":
        if "ep_size" in {field.name for field in fields(DistributedConfig)}:
            options["ep_size"] = ranks
        else:  # transformers 5.17
            options["enable_expert_parallel"] = True
    return options


def finish(file: Path, found: dict[str, Any]) -> None:
    if RANK == 0:
        write_text(file, json.dumps(found), overwrite=True)
    if distributed.is_initialized():
        distributed.barrier()  # One that leaves early may abort the others.
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
