"""What multi_gpu.py has each GPU run; started by a launcher, which says who is who.

    deepspeed --no_local_rank one_rank.py profile FILE ...    finetune.py, its last step profiled
    deepspeed --no_local_rank one_rank.py die RANK ...        finetune.py, one rank killed in a save
    torchrun one_rank.py generate tensor --model ...          greedy tokens and their rate
    torchrun one_rank.py link FILE cuda                       how fast the GPUs talk

Results are JSON files that the first process writes.
"""

import argparse
import json
import os
import runpy
import signal
import statistics
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.distributed import DistributedConfig

from deepseek_moe.files import write_text
from deepseek_moe.training import trainer as training

SCRIPT = Path(__file__).resolve().parents[1] / "finetune" / "finetune.py"
WAYS = ("one", "tensor", "expert")
RANK = int(os.environ.get("RANK", 0))
Intervals = list[tuple[float, float]]


def main() -> None:
    mode, *rest = sys.argv[1:]
    if mode == "generate":
        generate(rest)
        return
    if mode == "link":
        link(Path(rest[0]), rest[1])
        return
    if mode == "profile" and RANK == 0:
        add_callback(ProfileLastStep(Path(rest[0])))
    if mode == "die" and int(rest[0]) == RANK:
        die_in_save(2)
    if any("autoep" in word for word in rest):
        leave_out_routing()
    sys.argv = [str(SCRIPT), *rest[1:]]
    sys.path.insert(0, str(SCRIPT.parent))  # as python itself does for a script
    runpy.run_path(str(SCRIPT), run_name="__main__")


# ---- training ----


def add_callback(callback: TrainerCallback) -> None:
    """To every trainer made from now on."""
    original = training.FineTuner.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(callback)

    training.FineTuner.__init__ = init


class ProfileLastStep(TrainerCallback):
    """Writes `shares` of the last step to `file`; the steps before go at full speed."""

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
        on_gpu = args.device.type == "cuda"
        events = self.profiler.events()
        if on_gpu:  # kernels and copies; annotations are names for what other events are
            on_device = torch.autograd.DeviceType.CUDA
            events = [e for e in events if e.device_type == on_device and not e.is_user_annotation]
        spans = [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events]
        write_text(self.file, json.dumps(shares(spans, seconds)), overwrite=True)  # of a rank


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shares(spans: list[tuple[str, float, float]], seconds: float) -> dict[str, float]:
    """Parts of a step of `seconds` in which NCCL (gloo, on CPUs) was at work, and in which it was
    and nothing else: from (name, start, end) of each kernel, in seconds. A collective counts from
    when this rank enters it, so that waiting for the slowest rank is in it."""
    talks = [is_communication(name) for name, _, _ in spans]
    times = [span[1:] for span in spans]
    talking = covered([span for span, talk in zip(times, talks, strict=True) if talk])
    computing = covered([span for span, talk in zip(times, talks, strict=True) if not talk])
    return {"communication": talking / seconds, "exposed": (covered(times) - computing) / seconds}


def is_communication(name: str) -> bool:
    return name.startswith(("nccl", "gloo:"))


def covered(intervals: Intervals) -> float:
    """Seconds that are in at least one."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def die_in_save(count: int) -> None:
    """Kills this process in its `count`-th checkpoint, when the model's part of it is written and
    the optimizer's is not."""
    original, calls = training.FineTuner._save_optimizer_and_scheduler, 0

    def save(self: Any, output_dir: str) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, output_dir)

    training.FineTuner._save_optimizer_and_scheduler = save


def leave_out_routing() -> None:
    """DeepSpeed's own mixture takes none; so it has no balance loss."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    original = AutoEPMoELayer.forward
    AutoEPMoELayer.forward = lambda self, hidden, routing=None: original(self, hidden)


# ---- the link ----


def link(file: Path, device: str) -> None:
    """Bytes/s that each rank sends and receives in a large sum over all ranks (in a ring, each
    passes on 2 (n - 1) / n of what is summed)."""
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


# ---- inference ----


def generate(argv: list[str]) -> None:
    """Tokens of `generate` for each batch size, tokens/s, and GB of this GPU."""
    from rates import random_prompts, stock_decode_seconds

    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    for name in ("--model", "--dtype", "--device", "--file"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch_sizes", type=int, nargs="+", required=True)
    parser.add_argument("--prompt_tokens", type=int, required=True)
    parser.add_argument("--new_tokens", type=int, required=True)
    args = parser.parse_args(argv)
    model = load(args).eval()
    found: dict[str, Any] = {"tokens": {}, "tokens_s": {}}
    for size in args.batch_sizes:
        prompts = random_prompts(model, size, args.prompt_tokens)
        found["tokens"][size] = greedy_tokens(model, prompts, args.new_tokens)
        found["tokens_s"][size] = size / stock_decode_seconds(model, prompts)
    if torch.cuda.is_available():
        found["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    finish(Path(args.file), found)


def finish(file: Path, found: dict[str, Any]) -> None:
    if RANK == 0:
        write_text(file, json.dumps(found), overwrite=True)
    if distributed.is_initialized():
        distributed.barrier()  # one that leaves early may abort the others
        distributed.destroy_process_group()


def load(args: argparse.Namespace) -> PreTrainedModel:
    dtype = getattr(torch, args.dtype)
    if args.way == "one":
        return AutoModelForCausalLM.from_pretrained(
            args.model, dtype=dtype, device_map={"": args.device}
        )
    parallel = DistributedConfig(**parallel_options(args.way, int(os.environ["WORLD_SIZE"])))
    return AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, distributed_config=parallel
    )


def parallel_options(way: str, ranks: int) -> dict[str, Any]:
    """Of transformers' DistributedConfig: the model's tensor plan, with its expert plan or not."""
    options: dict[str, Any] = {"tp_size": ranks, "tp_plan": "auto"}
    if way == "expert":
        if "ep_size" in {field.name for field in fields(DistributedConfig)}:
            options["ep_size"] = ranks
        else:  # transformers 5.17
            options["enable_expert_parallel"] = True
    return options


def greedy_tokens(model: PreTrainedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The `new` tokens after each prompt; all prompts are of one length."""
    ids_BL = torch.tensor(prompts, device=model.device)
    tokens_BL = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
    )
    return tokens_BL[:, ids_BL.shape[1] :].tolist()


if __name__ == "__main__":
    main()
