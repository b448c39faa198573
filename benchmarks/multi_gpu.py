"""How do several GPUs of one host fine-tune and generate?

    python benchmarks/multi_gpu.py                        on one GPU and on all there are
    python benchmarks/multi_gpu.py --gpus 1 2 4 8 --only LoRA --parts train
    python benchmarks/multi_gpu.py --kill                 a rank dies in a save; the run goes on

Weights are random, in the official configuration. Each line of training is a `finetune.py` on each
GPU; the first four steps do not count, and one more is profiled. Rates are tokens/s of a GPU.
Communication is the part of that step in which NCCL's kernels ran on the first GPU, waiting for
other ranks included; exposed is the part in which nothing else ran. GB are the most that PyTorch
allocated on the first GPU, beside what the dry run foretold. Scaling is the rate over that of the
line with the fewest GPUs. Full training takes the most rows that the dry run says fit; 0 rows:
nothing fits.

Inference is transformers' `generate` by the model's own plans. `same` of `tokens` are those of one
GPU, up to the first other one of each sequence. In bf16 sums in another order may swap close
tokens; --dtype float32 decides whether a plan is right.

--kill kills a rank in its second save, repeats the command, and compares the losses with those of a
run that was not killed. The checkpoints of full training are 16 bytes a parameter, so it is killed
only where --only names it (--num_hidden_layers 4 makes it smaller).
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune_runs as runs
import torch
from one_rank import WAYS
from random_model import model_of_layers
from tables import Report, Row, ratio, require_gpus, shown
from tqdm import tqdm

from deepseek_moe.errors import exit_on_user_error

PARTS = ("train", "inference")
SETTINGS = {
    "full, ZeRO-3": f"{runs.ZERO}3.json",
    "QLoRA, ZeRO-2": f"{runs.QLORA} {runs.ZERO}2_no_offload.json",
    "LoRA, ZeRO-2": f"{runs.LORA} {runs.ZERO}2_no_offload.json",
}
ROWS, LENGTH = (16, 4, 1), 1024  # of a GPU's batch, the most first
RESERVE = 0.92  # of a GPU's memory: the rest is for CUDA, and for what the cache wastes
KILL_STEPS = 4
BATCHES, PROMPT, NEW = (1, 64), 128, 32  # of inference


def main() -> None:
    parser = runs.make_settings_parser(__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs; one and all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kill", action="store_true", help="instead: kill a rank in a save")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of a run")
    args = parser.parse_args()
    args.gpus = sorted(set(args.gpus or [1, torch.cuda.device_count()]))
    chosen = runs.choose(SETTINGS, args.only)
    require_gpus(max(2, args.gpus[-1]))
    report = Report(args)
    model = model_of_layers(args.folder, args.num_hidden_layers)
    if args.kill:
        for name in chosen:
            if "full" not in name or args.only:
                report.add("kill", killed(args, model, name))
        return
    if "train" in args.parts:
        link = measured(args, args.gpus[-1], "link")
        speed = report.contents["bytes_s"] = link.get("bytes_s")
        print(f"link: {shown(ratio(speed, 1e9))} GB/s a GPU, each way", flush=True)
        with runs.rows_file(ROWS[0] * args.gpus[-1] * (runs.STEPS + 1), LENGTH) as data:
            for row in train_rows(args, chosen, model, data):
                report.add("train", row)
    if "inference" in args.parts:
        for row in inference_rows(args, model):
            report.add("inference", row)


def measured(args: argparse.Namespace, ranks: int, what: str, *words: str) -> dict[str, Any]:
    """What one_rank.py found; nothing, if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        command = [runs.ONE_RANK, what, str(file), *words]
        runs.run(command, lambda _: file.exists(), args.timeout, ranks)
        return json.loads(file.read_text()) if file.exists() else {}


def train_rows(
    args: argparse.Namespace, chosen: list[str], model: Path, data: Path
) -> Iterator[Row]:
    """A row for each setting and number of GPUs; None: not measured."""
    first: dict[tuple[str, int], float] = {}  # the rate with the fewest GPUs, by name and rows
    todo = [(name, gpus) for name in chosen for gpus in args.gpus]
    for name, gpus in tqdm(todo, file=sys.stderr):
        rows, foretold = fitting_rows(model, name, gpus, data)
        speed, size, shares = None, None, {}
        if rows:
            steps = runs.STEPS + 1
            command = runs.command_of(model, data, rows, LENGTH, SETTINGS[name], steps)
            shares, printed = runs.profiled(command, gpus, args.timeout)
            speed, size = runs.speed_and_gigabytes(printed)
        if speed:
            speed /= gpus
            first.setdefault((name, rows), speed)
        yield {
            "name": name,
            "gpus": gpus,
            "rows": rows,
            "tokens_s": speed,
            "step_ms": ratio(1000 * rows * LENGTH, speed),
            "gigabytes": size,
            "dry_run": foretold,
            "communication": shares.get("communication"),
            "exposed": shares.get("exposed"),
            "scaling": ratio(speed, first.get((name, rows))),
        }


def fitting_rows(model: Path, name: str, gpus: int, data: Path) -> tuple[int, float | None]:
    """The most rows a GPU that the dry run says fit (adapters always do), and the GB it foretells.

    0 rows if none fit.
    """
    for rows in ROWS:
        command = runs.command_of(model, data, rows, LENGTH, SETTINGS[name], runs.STEPS)
        foretold = runs.dry_run_gigabytes(command, gpus)
        if "full" not in name or _has_room(foretold):
            return rows, foretold
    return 0, foretold


def _has_room(gigabytes: float | None) -> bool:
    room = RESERVE * torch.cuda.get_device_properties(0).total_memory / 1e9
    return gigabytes is not None and gigabytes < room


def killed(args: argparse.Namespace, model: Path, name: str) -> Row:
    """What becomes of a run that saves after every second step, of which a rank dies in its second
    save, and which is repeated; beside the same run without a death."""
    gpus = args.gpus[-1]
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        runs.rows_file(ROWS[-1] * gpus * KILL_STEPS, LENGTH) as data,
    ):
        options = runs.command_of(model, data, ROWS[-1], LENGTH, SETTINGS[name], KILL_STEPS)
        options = options.replace("--save_strategy no", "--save_strategy steps --save_steps 2")
        options += " --save_total_limit 1 --learning_rate 1e-4"

        def start(output: str, death: int) -> tuple[str, int]:
            words = [runs.ONE_RANK, "die", str(death), *options.split()]
            words += ["--output_dir", f"{folder}/{output}"]
            return runs.run(words, timeout=args.timeout, ranks=gpus)

        _, code = start("killed", death=4)
        kept = sorted(one.name for one in Path(folder, "killed").glob("checkpoint-*"))
        then, whole = losses(start("killed", death=0)[0]), losses(start("whole", death=0)[0])
    apart = [abs(then[step] / whole[step] - 1) for step in then if step in whole]
    return {
        "name": name,
        "gpus": gpus,
        "exit_code": code,
        "kept": ", ".join(kept),
        "steps_then": ", ".join(then),
        "apart": max(apart, default=None),
    }


def losses(printed: str) -> dict[str, float]:
    """The loss of each step that finetune.py printed."""
    return {i: float(loss) for i, loss in re.findall(r"step (\d+)/\d+ .*?loss ([\d.]+)", printed)}


def inference_rows(args: argparse.Namespace, model: Path) -> Iterator[Row]:
    """A row for each way, number of GPUs and batch size."""
    options = {"model": str(model), "dtype": args.dtype, "batch_sizes": BATCHES}
    options |= {"prompt_tokens": PROMPT, "new_tokens": NEW}
    todo = [("one", 1), *((way, gpus) for way in WAYS[1:] for gpus in args.gpus if gpus > 1)]
    alone: dict[str, list[list[int]]] = {}  # the tokens of one GPU, by batch size
    for way, gpus in tqdm(todo, file=sys.stderr):
        ranks = gpus if gpus > 1 else 0
        found = measured(args, ranks, "generate", json.dumps(options | {"way": way}))
        tokens = found.get("tokens", {})
        if way == "one":
            alone = tokens
        for size in map(str, BATCHES):
            same = None
            if size in tokens and size in alone:
                same = sum(map(common, tokens[size], alone[size]))
            yield {
                "way": way,
                "gpus": gpus,
                "batch_size": size,
                "tokens_s": found.get("tokens_s", {}).get(size),
                "gigabytes": found.get("gigabytes"),
                "same": same,
                "tokens": int(size) * NEW,
            }


def common(found: list[int], wanted: list[int]) -> int:
    """Tokens before the first that differs."""
    differ = (i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return next(differ, len(found))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
