"""The 16B model on several GPUs of one host: fine-tuning under DeepSpeed, and parallel inference.

    python benchmarks/multi_gpu.py                        on one GPU and on all there are
    python benchmarks/multi_gpu.py --gpus 1 2 4 8 --only LoRA --parts train
    python benchmarks/multi_gpu.py --kill                 a rank dies in a save; the run goes on
    python benchmarks/multi_gpu.py --device cpu           the bundled model on two processes

Random weights of the official configuration. Training: a `finetune.py` under the deepspeed launcher
for each line, counted from the fourth step on and profiled in one more. Communication is the
part of that step in which NCCL's kernels ran on the first GPU, waiting for other ranks included;
exposed, in which nothing else ran. Memory is the first GPU's, the most that PyTorch had allocated.
Scaling is the rate of a GPU over that of a GPU in the line with the fewest of them. Full training
takes the most rows that the dry run says fit.

AutoEP (DeepSpeed 0.19) replaces each mixture by a layer of its own, which leaves out the balance
loss, and it saves no model under ZeRO-3: here it only shows its rate.

Inference: transformers' `generate` under torchrun, by the model's own plans. In bf16 sums in
another order may swap close tokens; --dtype float32 decides whether a plan is right.

--kill compares with a run that was not killed; on GPUs the launcher gives the other ranks, which
wait for the dead one, half a minute to end. The checkpoints of full training are 16 bytes a
parameter, so it is killed only where --only names it (--num_hidden_layers 4 makes it smaller).
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kill
import torch
from decode import aligned, machine, number, percent
from one_rank import WAYS
from processes import (
    CONFIGS,
    LORA,
    QLORA,
    ZERO,
    command_of,
    deepspeed,
    finetune,
    rows_file,
    run,
    steps_of,
    torchrun,
)
from random_model import write_random_model
from tqdm import tqdm

from deepseek_moe import DeepseekConfig
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.files import BUNDLED_MODEL, check_writable, write_text

STEPS, LEAD = 8, 3  # of a run, and those of them that do not count; one more is profiled
PARTS = ("train", "inference")
ROWS, LENGTH = (16, 4, 1), 1024
CPU_ROWS, CPU_LENGTH = (2,), 64
RESERVE = 0.92  # of a GPU's memory: the rest is for CUDA, and for what the cache wastes
AUTOEP = "autoep.json"  # stands for a file that is written for each number of GPUs
SETTINGS = {
    "full, ZeRO-3": f"{ZERO}3.json",
    "QLoRA, ZeRO-2": f"{QLORA} {ZERO}2_no_offload.json",
    "LoRA, ZeRO-2": f"{LORA} {ZERO}2_no_offload.json",
    "full, AutoEP": f"--deepspeed {AUTOEP}",  # DeepSpeed's expert parallelism, for comparison
}
TRAINED = ["rows", "tok/s/GPU", "ms a step", "GB", "comm.", "exposed", "scaling"]
GENERATED = ["batch", "tokens/s", "GB", "same", "tokens"]


@dataclass
class Trained:
    """A line of the first table. None: not measured."""

    name: str
    gpus: int
    rows: int
    tokens_s: float | None = None  # of one GPU
    step_ms: float | None = None
    gigabytes: float | None = None
    communication: float | None = None
    exposed: float | None = None
    scaling: float | None = None

    def cells(self) -> list[str]:
        parts = [percent(x, 1) for x in (self.communication, self.exposed, self.scaling)]
        return [
            str(self.rows or "no fit"),
            number(self.tokens_s),
            number(self.step_ms),
            number(self.gigabytes),
            *parts,
        ]


@dataclass
class Generated:
    """A line of the second table; `same` of `tokens` are those of one GPU, up to the first other
    one of each sequence."""

    way: str
    gpus: int
    batch_size: int
    tokens_s: float | None = None
    gigabytes: float | None = None
    same: int | None = None
    tokens: int | None = None

    def cells(self) -> list[str]:
        sizes = [number(self.tokens_s), number(self.gigabytes)]
        counts = ["-" if x is None else f"{x:,}" for x in (self.same, self.tokens)]
        return [str(self.batch_size), *sizes, *counts]


def main() -> None:
    args = parse_arguments()
    if args.model is None:
        args.model = args.folder / f"{args.num_hidden_layers}-layers"
        if not (args.model / "config.json").exists():
            write_random_model(args.model, DeepseekConfig(num_hidden_layers=args.num_hidden_layers))
    device = torch.device(args.device)
    report: dict[str, Any] = {"machine": machine(device), "gpus": args.gpus}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    if args.kill:
        kill_lines(args)
        return
    if "train" in args.parts:
        report["bytes_s"] = link(args)
        print(f"link: {number(report['bytes_s'] and report['bytes_s'] / 1e9)} GB/s a GPU, each way")
        print(f"\n{'training':14} {'GPUs':>4} {aligned(TRAINED)}", flush=True)
        with rows_file(largest_batch(args) * (STEPS + 1), 1500) as data:
            show(train_lines(args, data), "train", report, args)
    if "inference" in args.parts:
        print(f"\n{'inference':14} {'GPUs':>4} {aligned(GENERATED)}", flush=True)
        show(inference_lines(args), "inference", report, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs; one and all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kill", action="store_true", help="instead: kill a rank in a save")
    parser.add_argument("--only", default="", help="settings whose name begins so: full, LoRA, ...")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of random weights")
    parser.add_argument("--num_hidden_layers", type=int, default=28)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of inference")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--offload", action="store_true", help="where full training does not fit")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of a run")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "random-moe")
    parser.add_argument("--output_file", type=Path, help="JSON")
    parser.add_argument("--overwrite", action="store_true", help="an output file that is there")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    there = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    args.gpus = sorted(set(args.gpus or ([1, there] if on_gpu else [1, 2])))
    if (on_gpu and args.gpus[-1] > there) or args.gpus[-1] < 2 or args.gpus[0] < 1:
        raise UserError(
            f"{there} GPU(s) are here and --gpus is {args.gpus[-1]}; this measures 2 or more GPUs "
            "of one host (or processes, with --device cpu)"
        )
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        args.model = args.model or BUNDLED_MODEL
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    if not chosen(args):
        raise UserError(f"no setting begins with {args.only!r}; there are: {'; '.join(SETTINGS)}")
    if args.output_file:
        check_writable(args.output_file, args.overwrite)
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def show(lines: Iterator[Any], part: str, report: dict[str, Any], args: Any) -> None:
    """Prints each line as soon as it is measured, and keeps it in the file."""
    report[part] = []
    for line in lines:
        name = getattr(line, "name", None) or line.way
        print(f"{name:14} {line.gpus:>4} {aligned(line.cells())}", flush=True)
        report[part].append(asdict(line))
        if args.output_file:
            write_text(args.output_file, json.dumps(report, indent=1) + "\n", overwrite=True)


def chosen(args: argparse.Namespace) -> list[str]:
    return [name for name in SETTINGS if name.startswith(args.only)]


# ---- training ----


def link(args: argparse.Namespace) -> float | None:
    """Bytes/s between the most GPUs asked for; None if that failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "link.json")
        command = [*torchrun(args.gpus[-1]), "link", str(file), args.device]
        run(command, Path(folder, "log"), args.timeout, lambda _: file.exists())
        return json.loads(file.read_text())["bytes_s"] if file.exists() else None


def largest_batch(args: argparse.Namespace) -> int:
    return (ROWS if args.device == "cuda" else CPU_ROWS)[0] * args.gpus[-1]


def train_lines(args: argparse.Namespace, data: Path) -> Iterator[Trained]:
    todo = [(name, gpus) for name in chosen(args) for gpus in args.gpus]
    todo = [(name, gpus) for name, gpus in todo if gpus > 1 or AUTOEP not in SETTINGS[name]]
    lines: list[Trained] = []
    for name, gpus in tqdm(todo, file=sys.stderr):
        rows, options = fitting(args, name, gpus, data)
        line = Trained(name, gpus, rows)
        if rows:
            if AUTOEP in options:
                options = options.replace(AUTOEP, str(write_autoep(data.parent, gpus)))
            command = options_of(args, data, rows, options, STEPS + 1)
            line = trained(line, *profiled(args, command, gpus), length_of(args))
        line.scaling = scaling(line, lines)
        lines.append(line)
        yield line


def length_of(args: argparse.Namespace) -> int:
    return LENGTH if args.device == "cuda" else CPU_LENGTH


def options_of(args: argparse.Namespace, data: Path, rows: int, options: str, steps: int) -> str:
    """Of finetune.py, for some steps."""
    command = command_of(args.model, data, rows, length_of(args), options, steps)
    return command + (" --use_cpu True" if args.device == "cpu" else "")


def fitting(args: argparse.Namespace, name: str, gpus: int, data: Path) -> tuple[int, str]:
    """Rows a GPU, and options, for what the dry run says fits; 0 rows if nothing does."""
    if args.device == "cpu" or "full" not in name:
        return (CPU_ROWS if args.device == "cpu" else ROWS)[0], SETTINGS[name]
    room = RESERVE * torch.cuda.get_device_properties(0).total_memory / 1e9
    for rows in ROWS:
        options = SETTINGS["full, ZeRO-3"]  # the other way is taken to need as much
        command = options_of(args, data, rows, options, STEPS)
        found = re.search(
            r"in all +([\d.]+) (GB|MB)", finetune(f"{command} --dry_run True", gpus=gpus)
        )
        if found and (found[2] == "MB" or float(found[1]) < room):
            return rows, SETTINGS[name]
    return (ROWS[0], f"{ZERO}3_offload.json") if args.offload else (0, SETTINGS[name])


def write_autoep(folder: Path, gpus: int) -> Path:
    """ZeRO-3's settings with experts divided among `gpus`, by the patterns of this model."""
    settings = json.loads((CONFIGS / "ds_config_zero3.json").read_text(encoding="utf-8"))
    del settings["zero_optimization"]["leaf_module"]  # of a class that is replaced
    settings["expert_parallel"] = {
        "enabled": True,
        "autoep_size": gpus,
        "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "num_experts_attr": "n_routed_experts",
        "top_k_attr": "num_experts_per_tok",
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": False,
        "has_shared_experts": True,
        "shared_experts_pattern": "shared_experts",
    }
    file = folder.resolve() / f"autoep-{gpus}.json"
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return file


def profiled(args: argparse.Namespace, command: str, gpus: int) -> tuple[str, dict[str, float]]:
    """What a run printed, and what it says of its last step (nothing, if it failed)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "shares.json")
        words = ["profile", str(file), *command.split(), "--output_dir", f"{folder}/run"]
        log, until = Path(folder, "log"), lambda _: file.exists()
        printed, _ = deepspeed(gpus, words, log, args.timeout, until)
        return printed, json.loads(file.read_text()) if file.exists() else {}


def trained(line: Trained, printed: str, shares: dict[str, float], length: int) -> Trained:
    """The line with what a run printed and said of its last step."""
    steps = steps_of(printed)
    if not shares or len(steps) < STEPS:
        return line
    seconds = [1 / rate for rate, _ in steps[LEAD:STEPS]]  # a token of all GPUs
    line.tokens_s = len(seconds) / sum(seconds) / line.gpus
    line.step_ms = 1000 * line.rows * length / line.tokens_s
    line.gigabytes = max((size for _, size in steps if size), default=None)
    line.communication, line.exposed = shares["communication"], shares["exposed"]
    return line


def scaling(line: Trained, before: list[Trained]) -> float | None:
    """Over the same setting with as many rows on the fewest GPUs; None if there is none."""
    alike = [one for one in before if (one.name, one.rows) == (line.name, line.rows)]
    base = next((one.tokens_s for one in alike if one.tokens_s), None)
    return line.tokens_s / base if base and line.tokens_s else None


def kill_lines(args: argparse.Namespace) -> None:
    print("\na rank killed in its second save, and the command repeated", flush=True)
    gpus, rows = args.gpus[-1], (ROWS if args.device == "cuda" else CPU_ROWS)[-1]
    for name in chosen(args):
        if "full" in name and not args.only:
            continue
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
            rows_file(rows * gpus * kill.STEPS, 1500) as data,
        ):
            command = options_of(args, data, rows, SETTINGS[name], kill.STEPS)
            became = kill.killed(command, gpus, Path(folder), args.timeout)
        print(f"{name:14} {gpus:>4} {became}", flush=True)


# ---- inference ----


def inference_lines(args: argparse.Namespace) -> Iterator[Generated]:
    todo = [(way, 1 if way == "one" else n) for way in WAYS for n in args.gpus if n > 1]
    tokens: dict[str, list[list[int]]] = {}  # of one GPU, by batch size
    for way, gpus in tqdm(dict.fromkeys(todo), file=sys.stderr):
        found = generated(args, way, gpus)
        if way == "one":
            tokens = found.get("tokens", {})
        for size in args.batch_sizes:
            line = Generated(way, gpus, size)
            if found:
                line.tokens_s = found["tokens_s"][str(size)]
                line.gigabytes = found.get("gigabytes")
                line.tokens = size * args.new_tokens
                if tokens:
                    line.same = common(found["tokens"][str(size)], tokens[str(size)])
            yield line


def generated(args: argparse.Namespace, way: str, gpus: int) -> dict[str, Any]:
    """What one_rank.py found; empty if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        command = [*torchrun(gpus), "generate", way]
        for name in ("model", "dtype", "device", "prompt_tokens", "new_tokens"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--batch_sizes", *map(str, args.batch_sizes), "--file", str(file)]
        run(command, Path(folder, "log"), args.timeout, lambda _: file.exists())
        return json.loads(file.read_text()) if file.exists() else {}


def common(found: list[list[int]], wanted: list[list[int]]) -> int:
    """Tokens before the first that differs, of all sequences."""
    total = 0
    for one, other in zip(found, wanted, strict=True):
        differ = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        total += next(differ, len(one))
    return total


if __name__ == "__main__":
    with exit_on_user_error():
        main()
