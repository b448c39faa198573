"""How do several GPUs of one host fine-tune and generate?

    python benchmarks/multi_gpu.py                        on one GPU and on all there are
    python benchmarks/multi_gpu.py --gpus 1 2 4 8 --only LoRA --parts train
    python benchmarks/multi_gpu.py --kill                 a rank dies in a save; the run goes on
    python benchmarks/multi_gpu.py --device cpu           the bundled model on two processes

Weights are random, in the official configuration. Training runs a `finetune.py` under the deepspeed
launcher for each line; the first four steps do not count, and one more is profiled. Communication
is the part of that step in which NCCL's kernels ran on the first GPU, waiting for other ranks
included; exposed is the part in which nothing else ran. Memory is the most that PyTorch allocated
on the first GPU. Scaling is the rate of a GPU over that in the line with the fewest of them. Full
training takes the most rows that the dry run says fit.

Inference is transformers' `generate` under torchrun, by the model's own plans. In bf16 sums in
another order may swap close tokens; --dtype float32 decides whether a plan is right.

--kill compares with a run that was not killed. The launcher gives the other ranks, which wait for
the dead one, half a minute to end. The checkpoints of full training are 16 bytes a parameter, so it
is killed only where --only names it (--num_hidden_layers 4 makes it smaller).
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune_runs as runs
import tables
import torch
from one_rank import WAYS
from random_model import model_of_layers
from tables import Columns, Row, number, percent
from tqdm import tqdm

from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.files import BUNDLED_MODEL

PARTS = ("train", "inference")
ROWS, LENGTH = (16, 4, 1), 1024
CPU_ROWS, CPU_LENGTH = (2,), 64
RESERVE = 0.92  # of a GPU's memory: the rest is for CUDA, and for what the cache wastes
KILL_STEPS = 6
SETTINGS = {
    "full, ZeRO-3": f"{runs.ZERO}3.json",
    "QLoRA, ZeRO-2": f"{runs.QLORA} {runs.ZERO}2_no_offload.json",
    "LoRA, ZeRO-2": f"{runs.LORA} {runs.ZERO}2_no_offload.json",
}
TRAINED: Columns = {
    "rows": lambda row: str(row["rows"] or "no fit"),
    "tok/s/GPU": lambda row: number(row["tokens_s"]),
    "ms a step": lambda row: number(row["step_ms"]),
    "GB": lambda row: number(row["gigabytes"]),
    "comm.": lambda row: percent(row["communication"]),
    "exposed": lambda row: percent(row["exposed"]),
    "scaling": lambda row: percent(row["scaling"]),
}
GENERATED: Columns = {
    "batch": lambda row: str(row["batch_size"]),
    "tokens/s": lambda row: number(row["tokens_s"]),
    "GB": lambda row: number(row["gigabytes"]),
    "same": lambda row: number(row["same"]),
    "tokens": lambda row: number(row["tokens"]),
}


def main() -> None:
    args = parse_arguments()
    if args.model is None:
        args.model = model_of_layers(args.folder, args.num_hidden_layers)
    report = tables.Report(args, torch.device(args.device))
    report.contents["gpus"] = args.gpus
    if args.kill:
        print("\na rank killed in its second save, and the command repeated", flush=True)
        for name in chosen(args):
            if "full" not in name or args.only:
                print(f"{name:14} {args.gpus[-1]:>4} {killed(args, name)}", flush=True)
        return
    if "train" in args.parts:
        speed = report.contents["bytes_s"] = link(args)
        print(f"link: {number(speed and speed / 1e9)} GB/s a GPU, each way")
        print(f"\n{'training':14} {'GPUs':>4} {tables.aligned(TRAINED)}", flush=True)
        with runs.rows_file(rows_of(args)[0] * args.gpus[-1] * (runs.STEPS + 1), 1500) as data:
            for row in train_rows(args, data):
                report.add("train", row, TRAINED, f"{row['name']:14} {row['gpus']:>4}")
    if "inference" in args.parts:
        print(f"\n{'inference':14} {'GPUs':>4} {tables.aligned(GENERATED)}", flush=True)
        for row in inference_rows(args):
            report.add("inference", row, GENERATED, f"{row['way']:14} {row['gpus']:>4}")


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
    tables.add_report_options(parser)
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
    tables.refuse_unknown(args.only, chosen(args), SETTINGS)
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def chosen(args: argparse.Namespace) -> list[str]:
    """The settings that --only means: LoRA is not QLoRA."""
    return [name for name in SETTINGS if name.startswith(args.only)]


def rows_of(args: argparse.Namespace) -> tuple[int, ...]:
    """The numbers of rows a GPU to try, the most first."""
    return ROWS if args.device == "cuda" else CPU_ROWS


def options_of(args: argparse.Namespace, data: Path, rows: int, options: str, steps: int) -> str:
    """Options of finetune.py for some steps."""
    length = LENGTH if args.device == "cuda" else CPU_LENGTH
    command = runs.command_of(args.model, data, rows, length, options, steps)
    return command + (" --use_cpu True" if args.device == "cpu" else "")


def link(args: argparse.Namespace) -> float | None:
    """Bytes/s between the most GPUs asked for; None if that failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "link.json")
        command = [*runs.torchrun(args.gpus[-1]), "link", str(file), args.device]
        runs.run(command, Path(folder, "log"), args.timeout, lambda _: file.exists())
        return json.loads(file.read_text())["bytes_s"] if file.exists() else None


def train_rows(args: argparse.Namespace, data: Path) -> Iterator[Row]:
    """A row for each setting and number of GPUs; rows 0: nothing fits; None: not measured."""
    before: dict[tuple[str, int], float] = {}  # the rate with the fewest GPUs, by name and rows
    todo = [(name, gpus) for name in chosen(args) for gpus in args.gpus]
    for name, gpus in tqdm(todo, file=sys.stderr):
        rows, options = fitting(args, name, gpus, data)
        row: Row = {"name": name, "gpus": gpus, "rows": rows}
        row |= dict.fromkeys(("tokens_s", "step_ms", "gigabytes", "communication", "exposed"))
        row["scaling"] = None
        if rows:
            command = options_of(args, data, rows, options, runs.STEPS + 1)
            printed, shares = profiled(args, command, gpus)
            found = runs.measured_rate(runs.steps_of(printed))
            if found and shares:
                speed, row["gigabytes"] = found[0] / gpus, found[1]
                length = LENGTH if args.device == "cuda" else CPU_LENGTH
                row |= {"tokens_s": speed, "step_ms": 1000 * rows * length / speed} | shares
                if (name, rows) in before:
                    row["scaling"] = speed / before[name, rows]
                before.setdefault((name, rows), speed)
        yield row


def fitting(args: argparse.Namespace, name: str, gpus: int, data: Path) -> tuple[int, str]:
    """Rows a GPU, and options, for what the dry run says fits; 0 rows if nothing does."""
    options = SETTINGS[name]
    if args.device == "cpu" or "full" not in name:
        return rows_of(args)[0], options
    room = RESERVE * torch.cuda.get_device_properties(0).total_memory / 1e9
    for rows in ROWS:
        needed = runs.dry_run_gigabytes(options_of(args, data, rows, options, runs.STEPS), gpus)
        if needed is not None and needed < room:
            return rows, options
    return (ROWS[0], f"{runs.ZERO}3_offload.json") if args.offload else (0, options)


def profiled(args: argparse.Namespace, command: str, gpus: int) -> tuple[str, dict[str, float]]:
    """What a run printed, and what it says of its last step (nothing, if it failed)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "shares.json")
        words = ["profile", str(file), *command.split(), "--output_dir", f"{folder}/run"]
        log, until = Path(folder, "log"), lambda _: file.exists()
        printed, _ = runs.deepspeed(gpus, words, log, args.timeout, until)
        return printed, json.loads(file.read_text()) if file.exists() else {}


def killed(args: argparse.Namespace, name: str) -> str:
    """What becomes of a run that saves after every second step, of which a rank dies in its second
    save, and which is repeated; beside the same run without a death."""
    gpus, rows = args.gpus[-1], rows_of(args)[-1]
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        runs.rows_file(rows * gpus * KILL_STEPS, 1500) as data,
        tqdm(total=3, unit="run", file=sys.stderr) as bar,
    ):
        command = options_of(args, data, rows, SETTINGS[name], KILL_STEPS)
        command = command.replace("--save_strategy no", "--save_strategy steps --save_steps 2")
        command += " --save_total_limit 1 --learning_rate 1e-4"

        def start(output: str, death: int) -> tuple[str, int]:
            words = ["die", str(death), *command.split(), "--output_dir", f"{folder}/{output}"]
            ended = runs.deepspeed(gpus, words, Path(folder, "log"), args.timeout)
            bar.update()
            return ended

        _, code = start("killed", death=4)
        kept = sorted(one.name for one in Path(folder, "killed").glob("checkpoint-*"))
        if code == 0 or kept != ["checkpoint-2"]:
            return f"FAILED: exit code {code}, checkpoints {', '.join(kept) or 'none'}"
        printed, _ = start("killed", death=0)
        start("whole", death=0)
        steps = re.findall(r"step (\d+)/", printed)
        found, whole = (losses(Path(folder, output)) for output in ("killed", "whole"))
    if steps != ["3", "4", "5", "6"] or not len(found) == len(whole) == KILL_STEPS:
        return f"FAILED: went on with steps {', '.join(steps) or 'none'}"
    apart = max(abs(a / b - 1) for a, b in zip(found, whole, strict=True))
    return f"exit code {code}; went on from step 2, losses within {apart:.0e} of a whole run's"


def losses(output: Path) -> list[float]:
    """The losses of all steps; empty without the last checkpoint."""
    state = output / f"checkpoint-{KILL_STEPS}" / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"] if state.exists() else []
    return [line["loss"] for line in history if "loss" in line]


def inference_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each way, number of GPUs and batch size.

    `same` of `tokens` are those of one GPU, up to the first other one of each sequence.
    """
    todo = [(way, 1 if way == "one" else n) for way in WAYS for n in args.gpus if n > 1]
    tokens: dict[str, list[list[int]]] = {}  # of one GPU, by batch size
    for way, gpus in tqdm(dict.fromkeys(todo), file=sys.stderr):
        found = generated(args, way, gpus)
        if way == "one":
            tokens = found.get("tokens", {})
        for size in args.batch_sizes:
            row: Row = {"way": way, "gpus": gpus, "batch_size": size}
            row |= dict.fromkeys(("tokens_s", "gigabytes", "same", "tokens"))
            if found:
                row["tokens_s"] = found["tokens_s"][str(size)]
                row["gigabytes"] = found.get("gigabytes")
                row["tokens"] = size * args.new_tokens
                if tokens:
                    row["same"] = common(found["tokens"][str(size)], tokens[str(size)])
            yield row


def generated(args: argparse.Namespace, way: str, gpus: int) -> dict[str, Any]:
    """What one_rank.py found; empty if it failed."""
    names = ("dtype", "device", "batch_sizes", "prompt_tokens", "new_tokens")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        options = {name: getattr(args, name) for name in names}
        options |= {"way": way, "model": str(args.model), "file": str(file)}
        command = [*runs.torchrun(gpus), "generate", json.dumps(options)]
        runs.run(command, Path(folder, "log"), args.timeout, lambda _: file.exists())
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
