"""Does training the chosen experts reach what all weights reach, and what is forgotten?

    python benchmarks/experts.py --data_path train.jsonl --eval_data_path val.jsonl \\
        --text tales.jsonl --folder /tmp/experts --jobs 8

A bundled model is fine-tuned in several ways, each with the learning rate that is best for it by
the first seed. Its task loss is that of the held-out answers, in nats a token. Its text loss is
that of held-out text like that which it was pretrained on. Means and spreads (largest less
smallest) are over the seeds. Then the model that was trained whole is pruned to half of its experts
and trained a little more.

Every result is kept in --folder as soon as it is there. A repeated command computes what is
missing. With --minutes it ends by itself after so many. The runs of --jobs are dealt out to all
GPUs.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import finetune_runs as runs
import torch
from tables import DEVICE, Report, Row, machine, make_parser, ratio
from timing import release
from tqdm import tqdm

from deepseek_moe import DeepseekConfig, load
from deepseek_moe.bundled import BUNDLED_CHAT_MODEL, BUNDLED_MODEL
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.errors import RunError, UserError, exit_on_user_error
from deepseek_moe.experts.choose import choice_as_text
from deepseek_moe.files import write_text
from deepseek_moe.perplexity import measure_loss, read_held_out

MODELS = {model.name: model for model in (BUNDLED_MODEL, BUNDLED_CHAT_MODEL)}
LENGTH, ROWS = 1024, 32
RECOVERY_STEPS = 200
TIMED_STEPS, UNTIMED_STEPS = 60, 20  # of a run that is timed, and those of them that do not count
UNTRAINED = "--use_lora True --lora_dropout 0"  # with a learning rate of 0 the model stays as it is


class Way(NamedTuple):
    options: str
    rates: tuple[float, ...]


FULL = "--single_gpu_full False"  # what trains is fp32 under AdamW, as adapters are
LORA, CHOSEN = "--use_lora True --lora_rank 16", "--train_experts {profile} --expert_share {share}"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
WAYS = {
    "all weights": Way(FULL, RATES),
    "LoRA on everything": Way(LORA, (1e-3, 2e-3, 4e-3)),
    "chosen experts": Way(f"{FULL} {CHOSEN}", RATES),
    "LoRA on chosen experts": Way(f"{LORA} {CHOSEN}", (2e-3, 4e-3, 8e-3)),
    "random experts": Way(f"{FULL} --train_experts {{random}}", RATES),
    "all routed experts": Way(
        f"{FULL} --train_experts {{profile}} --expert_share 1", (2.5e-4, *RATES[:3])
    ),
    "chosen experts, attention": Way(f"{FULL} {CHOSEN} --trainable self_attn", RATES),
}
WHOLE = "all weights"
PARTS = ("rates", "train", "cost", "prune")


class Experiment:
    """The runs of a command, whose results are files in its folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.base = args, MODELS[args.model]
        self.end = time.monotonic() + 60 * args.minutes
        self.text = read_held_out(args.text, own_tokenizer(self.base))
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = chosen.split(",") if chosen else map(str, range(torch.cuda.device_count()))
        self.deal = itertools.cycle(gpus)
        self.measuring = Lock()  # training runs side by side, text loss is measured in turn
        self.results = args.folder / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        self.config = DeepseekConfig.from_pretrained(self.base)

    def kept(self, name: str, compute: Callable[[], Row]) -> Row:
        """The result of that name, from its file if it is there."""
        file = self.results / f"{name.replace(' ', '-')}.json"
        if not file.is_file():
            write_text(file, json.dumps(compute()) + "\n", overwrite=True)
        return json.loads(file.read_text())

    def side_by_side(
        self, compute: Callable[..., Row], items: Iterable[Sequence[Any]]
    ) -> list[Row]:
        """What `compute` returns for the arguments in each of `items`."""
        items = list(items)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            found = pool.map(lambda item: compute(*item), items)
            return list(tqdm(found, total=len(items), file=sys.stderr))

    def trained(self, way: str, rate: float, seed: int) -> Row:
        """Task loss, text loss and trained parameters of a run."""

        def compute() -> Row:
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder, "run")
                row = self.train(self.base, way, rate, self.args.steps, seed, output)
                return row | self.text_loss(output)

        return self.kept(f"{way} {rate:g} seed {seed}", compute)

    def train(self, base: Path, way: str, rate: float, steps: int, seed: int, output: Path) -> Row:
        """Runs finetune.py, whose result is a whole model in `output`."""
        options = self.options_of(way, seed)
        options += " --merge_on_save True" if "--use_lora" in options else ""
        return figures_of(self.run(self.command(base, options, rate, steps, seed, output)))

    def before(self, base: Path) -> Row:
        """Both losses of a model as it is. Task loss is measured as after a training."""
        with tempfile.TemporaryDirectory() as folder:
            command = self.command(base, UNTRAINED, 0, 1, 0, Path(folder, "run"))
            return {"task_loss": figures_of(self.run(command))["task_loss"]} | self.text_loss(base)

    def text_loss(self, folder: Path) -> Row:
        with self.measuring:
            model, tokenizer = load(str(folder), "float32", str(DEVICE))
            loss = measure_loss(model, self.text, LENGTH, tokenizer.bos_token_id)
            del model
            release()
        return {"text_loss": loss.nats_per_token}

    def cost(self, way: str) -> Row:
        """Tokens/s and the most GB of a run that has the machine for itself, without evaluation."""
        with tempfile.TemporaryDirectory() as folder:
            options = f"{self.options_of(way, 0)} --logging_steps 1 --eval_steps 1000"
            command = self.command(self.base, options, 1e-6, TIMED_STEPS, 0, Path(folder, "run"))
            speed, size = runs.speed_and_gigabytes(self.run(command), TIMED_STEPS, UNTIMED_STEPS)
        return {"hardware": machine()["hardware"], "tokens_s": speed, "gigabytes": size}

    def pruned(self, rate: float, seed: int) -> Row:
        """Losses of a model that was trained whole, then pruned to half, then trained again."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            whole, half, again = (folder / kind for kind in ("whole", "half", "again"))
            trained = self.train(self.base, WHOLE, rate, self.args.steps, seed, whole)
            before = trained | self.text_loss(whole)
            profile, keep = self.profile(whole, folder), self.config.n_routed_experts // 2
            words = ["-m", "deepseek_moe.prune", "--model", whole, "--profile", profile]
            self.run([*words, "--keep", keep, "--output", half])
            after = self.before(half)
            trained = self.train(half, WHOLE, rate, RECOVERY_STEPS, seed, again)
            recovered = trained | self.text_loss(again)
        rows = {"before": before, "after": after, "recovered": recovered}
        losses = ("task_loss", "text_loss")
        return {f"{when} {loss}": row[loss] for when, row in rows.items() for loss in losses}

    def command(
        self, base: Path, options: str, rate: float, steps: int, seed: int, output: Path
    ) -> list[Any]:
        """finetune.py with an evaluation after the last step; the last of equal options counts."""
        words = f"--model_max_length {LENGTH} --per_device_train_batch_size {ROWS} "
        words += f"--per_device_eval_batch_size {ROWS} --learning_rate {rate} --seed {seed} "
        words += f"--max_steps {steps} --eval_strategy steps --eval_steps {steps} "
        words += "--lr_scheduler_type cosine --warmup_steps 0.05 --save_strategy no "
        words += f"--report_to none --logging_steps {steps} --bf16 {DEVICE.type == 'cuda'} "
        data = ["--data_path", *self.args.data_path, "--eval_data_path", *self.args.eval_data_path]
        places = ["--model_name_or_path", base, "--output_dir", output, *data]
        return ["finetune.py", *words.split(), *options.split(), *places]

    def options_of(self, way: str, seed: int) -> str:
        places = {"share": self.args.share}
        if "{profile}" in (options := WAYS[way].options):
            places["profile"] = self.args.folder / "profile" / "profile.json"
        if "{random}" in options:
            places["random"] = self.random_choice(seed)
        return options.format(**places)

    def random_choice(self, seed: int) -> Path:
        """A file of ESFT's form with as many experts in each layer as the profile chooses."""
        E, source = self.config.n_routed_experts, random.Random(seed)
        count = int(self.args.share * E + 0.5)
        layers = self.config.moe_layers
        experts = {layer: sorted(source.sample(range(E), count)) for layer in layers}
        file = self.args.folder / f"random-{seed}.json"
        return write_text(file, choice_as_text(experts), overwrite=True)

    def profile(self, model: Path, folder: Path) -> Path:
        """Measures the experts on the rows that are trained on, unless that is done."""
        file = folder / "profile" / "profile.json"
        if not file.is_file():
            script = runs.HERE.parent / "examples" / "experts.py"
            words = [script, "--model", model, "--limit", 200_000, "--output", file.parent]
            self.run([*words, "--data_path", *self.args.data_path])
        return file

    def run(self, words: list[Any]) -> str:
        """What the command prints.

        Raises:
            RunError: it failed, or it was ended because the time is over.
        """
        left = self.end - time.monotonic()
        printed, code = "", -9
        if left > 0:
            printed, code = runs.run(list(map(str, words)), timeout=left, gpu=next(self.deal, None))
        if code and time.monotonic() >= self.end:
            raise RunError("the time is over; repeat the command, which goes on")
        if code:
            print(printed[-1500:], file=sys.stderr)
            raise RunError(f"{words[0]} failed with {code}; what it said stands above")
        return printed


def figures_of(printed: str) -> Row:
    """The last evaluation in what finetune.py printed, and how many parameters trained."""
    losses = re.findall(r"evaluation: loss ([\d.]+)", printed)
    counts = re.search(r"^all +[\d,]+ +([\d,]+)", printed, re.MULTILINE)
    return {"task_loss": float(losses[-1]), "trained": int(counts[1].replace(",", ""))}


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    experiment = Experiment(args)
    report = Report(args)
    # This fills the cache of rows.
    base = experiment.kept("before", lambda: experiment.before(experiment.base))
    experiment.profile(experiment.base, args.folder)
    report.add("base", {"name": "before training"} | base)
    ways = list(WAYS) if {"rates", "train"} & set(args.parts) else [WHOLE]
    rates = report_rates(report, experiment, ways if args.parts != ["cost"] else [])
    if "train" in args.parts:
        report_training(report, experiment, rates, base)
    if "cost" in args.parts:
        for way in WAYS:
            cost = experiment.kept(f"cost {way}", lambda way=way: experiment.cost(way))
            report.add("cost", {"name": way} | cost)
    if "prune" in args.parts:
        report_pruning(report, experiment, rates[WHOLE])


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny-base", help="bundled; default tiny-base")
    add("--data_path", nargs="+", required=True, help="rows to train on, as finetune.py takes them")
    add("--eval_data_path", nargs="+", required=True, help="rows to evaluate on")
    add("--text", required=True, help="text like that of the pretraining: plain, or .jsonl")
    add("--folder", type=Path, required=True, help="results are kept here")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the report; all")
    add("--seeds", type=int, default=3, help="how many; default 3")
    add("--steps", type=int, default=500, help="of a fine-tuning; default 500")
    add("--share", type=float, default=0.25, help="of the experts of a layer; default 0.25")
    add("--jobs", type=int, default=1, help="runs at the same time; default 1")
    add("--minutes", type=float, default=math.inf, help="stop after so many")
    args = parser.parse_args()
    for files in (args.data_path, args.eval_data_path):  # finetune.py runs in another folder
        files[:] = [str(Path(file).expanduser().resolve()) for file in files]
    args.folder = args.folder.expanduser().resolve()
    refuse_other_settings(args)
    return args


def refuse_other_settings(args: argparse.Namespace) -> None:
    """Notes in the folder what decides the results.

    Raises:
        UserError: the folder has results of other settings.
    """
    names = ("model", "data_path", "eval_data_path", "text", "steps", "share")
    settings = {name: getattr(args, name) for name in names}
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "settings.json"
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise UserError(f"{args.folder} has results of other settings; give another --folder")
    write_text(file, json.dumps(settings) + "\n", overwrite=True)


def report_rates(report: Report, experiment: Experiment, ways: list[str]) -> dict[str, float]:
    """Reports the task loss of each learning rate, and returns the best rate of each way."""
    tried = [(way, rate, 0) for way in ways for rate in WAYS[way].rates]
    losses = [row["task_loss"] for row in experiment.side_by_side(experiment.trained, tried)]
    best: dict[str, float] = {}
    for (way, rate, _), _ in sorted(zip(tried, losses, strict=True), key=lambda pair: pair[1]):
        best.setdefault(way, rate)
    for (way, rate, _), loss in zip(tried, losses, strict=True):
        row = {"name": way, "rate": rate, "task_loss": loss}
        report.add("rates", row | {"best": "yes" if best[way] == rate else "no"})
    return best


def report_training(
    report: Report, experiment: Experiment, rates: dict[str, float], base: Row
) -> None:
    """A row for each way, over all seeds, with its losses beside those of all weights."""
    seeds = range(experiment.args.seeds)
    todo = [(way, rates[way], seed) for way in WAYS for seed in seeds]
    found = experiment.side_by_side(experiment.trained, todo)
    task_of_whole = None
    for way in WAYS:
        rows = [row for row, item in zip(found, todo, strict=True) if item[0] == way]
        task, text = over_seeds(rows, "task_loss"), over_seeds(rows, "text_loss")
        task_of_whole = task_of_whole or task["task_loss"]
        report.add(
            "train",
            {"name": way, "rate": rates[way], "trained": rows[0]["trained"]}
            | task
            | {"x_all": ratio(task["task_loss"], task_of_whole)}
            | text
            | {"forgotten": text["text_loss"] - base["text_loss"]},
        )


def report_pruning(report: Report, experiment: Experiment, rate: float) -> None:
    """Perplexity of the held-out answers before, after, and after some steps of training more."""
    seeds = [(seed,) for seed in range(experiment.args.seeds)]

    def pruned(seed: int) -> Row:
        return experiment.kept(f"pruned seed {seed}", lambda: experiment.pruned(rate, seed))

    rows = experiment.side_by_side(pruned, seeds)
    for row in rows:
        for when in ("before", "after", "recovered"):
            row[f"{when} perplexity"] = math.exp(row[f"{when} task_loss"])
            row[f"{when} x_before"] = row[f"{when} perplexity"] / row["before perplexity"]
    for when in ("before", "after", "recovered"):
        row = {"name": when}
        for figure in ("perplexity", "x_before", "text_loss"):
            row |= over_seeds(rows, f"{when} {figure}", figure)
        report.add("prune", row)


def over_seeds(rows: list[Row], key: str, title: str = "") -> Row:
    """Mean and spread of a figure."""
    values, title = [row[key] for row in rows], title or key
    return {title: statistics.mean(values), f"{title} spread": max(values) - min(values)}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
