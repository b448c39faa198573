"""Measures a model: tasks of lm-evaluation-harness, and perplexity on a text.

    python examples/evaluate.py --tasks arc_easy,hellaswag --num_fewshot 5 --limit 200
    python examples/evaluate.py --model deepseek-ai/deepseek-moe-16b-base --preset olmes
    python examples/evaluate.py --perplexity book.txt --output_file scores.json

Tables go to stdout, everything else to stderr.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from shared_options import (
    OptionParser,
    add_model_options,
    add_weight_options,
    ctrl_c_leaves,
    load_model,
    positive,
)

WINDOW = 2048  # tokens, as papers of compression take them


def main() -> None:
    args = parse_arguments()
    with ctrl_c_leaves():  # these imports take seconds
        from deepseek_moe.errors import exit_on_user_error
    with exit_on_user_error():
        run(args)


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(description="Measures a model by tasks and by the perplexity of a text.")
    add_model_options(parser, bundled="models/tiny-base")
    add_weight_options(parser)
    add = parser.add_argument
    add("--tasks", help="of lm-evaluation-harness, with commas between them; mmlu_* is a pattern")
    add("--num_fewshot", type=whole, help="examples before each question; default: the task's own")
    says = "tasks and shots nearest to a publication, whose figures are printed beside"
    add("--preset", choices=["paper", "olmes"], help=says)
    add("--limit", type=positive, help="take the first so many questions of each task")
    add("--include_path", type=Path, help="a folder of your own tasks in YAML")
    says = "write prompts as conversations, by the model's chat template"
    add("--apply_chat_template", action="store_true", help=says)
    says = 'a text whose perplexity is measured: plain, or .jsonl with a "text" in each line'
    add("--perplexity", metavar="FILE", help=says)
    says = f"tokens of a window of it; default {WINDOW}; the model's context where that is shorter"
    add("--window", type=positive, help=says)
    says = "JSON of all figures; repeating an interrupted command goes on"
    add("--output_file", type=Path, help=says)
    add("--overwrite", action="store_true", help="replace an output file")
    args = parser.parse_args()
    if not (args.tasks or args.preset or args.perplexity):
        parser.error("there is nothing to measure; give --tasks, --preset or --perplexity")
    if args.preset and (args.tasks or args.num_fewshot is not None):
        parser.error("--preset chooses tasks and shots itself; leave out --tasks and --num_fewshot")
    needs = {"num_fewshot": args.tasks, "window": args.perplexity}
    needs |= dict.fromkeys(
        ["limit", "include_path", "apply_chat_template"], args.tasks or args.preset
    )
    for name, needed in needs.items():
        if getattr(args, name) not in (None, False) and not needed:
            parser.error(f"--{name} has no effect here; --help says what it belongs to")
    if args.window == 1:
        parser.error("--window is 1, which is BOS alone; give 2 or more")
    return args


def whole(text: str) -> int:
    """For argparse: a whole number of at least 0."""
    return positive(text) if text != "0" else 0


def run(args: argparse.Namespace) -> None:
    """Refuses what the user can mend before any weight is loaded."""
    from deepseek_moe.bundled import BUNDLED_MODEL
    from deepseek_moe.checkpoint import find_checkpoint, own_tokenizer, read_config
    from deepseek_moe.decode.load import pick_quantization
    from deepseek_moe.files import check_writable, write_text
    from deepseek_moe.perplexity import read_held_out

    name = args.model or str(BUNDLED_MODEL)
    if args.output_file:
        check_writable(args.output_file, args.overwrite)
    folder = find_checkpoint(name)
    window = min(args.window or WINDOW, read_config(folder).max_position_embeddings)
    text = read_held_out(args.perplexity, own_tokenizer(folder)) if args.perplexity else None
    tasks = tasks_of(args) if args.tasks or args.preset else None
    if args.quantization == "auto":  # what it picks decides the figures
        args.quantization = pick_quantization(name, args.dtype, args.device)
    model, tokenizer = load_model(args, name)
    answers = answers_file(args, name, model) if args.output_file and tasks else None
    report: dict[str, Any] = {
        "model": args.model or f"models/{BUNDLED_MODEL.name}",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    for option in ("adapter", "quantization", "limit", "apply_chat_template"):
        report[option] = getattr(args, option)
    report |= dict.fromkeys(["perplexity", "bits_per_byte", "tokens", "bytes", "window"])
    report |= {"tasks": {}, "preset": []}
    if tasks:
        measure_tasks(args, model, tokenizer, tasks, answers, report)
    if text:
        from deepseek_moe.perplexity import measure_loss

        loss = measure_loss(model, text, window, tokenizer.bos_token_id)
        report |= {"perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte}
        report |= {"tokens": loss.tokens, "bytes": loss.bytes, "window": window}
        print_perplexity(report)
    if args.output_file:
        write_text(args.output_file, json.dumps(report, indent=1) + "\n", args.overwrite)
    if answers:
        answers.unlink(missing_ok=True)


def tasks_of(args: argparse.Namespace) -> dict[str, Any]:
    from deepseek_moe.errors import UserError
    from deepseek_moe.evaluate.presets import PRESETS

    # Some tasks import a library that has the name of this file, and its folder comes first.
    own = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != own]
    try:
        from deepseek_moe.evaluate.tasks import load_tasks
    except ModuleNotFoundError as error:
        raise UserError(f'tasks need lm_eval ({error}); pip install "lm_eval[math]"') from error
    if args.preset:
        shots = {row.task: row.shots for row in PRESETS[args.preset] if row.task}
    else:
        shots = dict.fromkeys(args.tasks.split(","), args.num_fewshot)
    return load_tasks(shots, args.include_path)


def answers_file(args: argparse.Namespace, name: str, model: Any) -> Path:
    """Where the answers to single requests are kept until the output file is written.

    Its name has a hash of what decides an answer: the model and its numbers. So a run of other
    tasks finds those of the same requests, and a run of another model finds none.
    """
    from deepseek_moe.decode.completion_file import hash_inputs
    from deepseek_moe.training.adapter_config import hash_adapter

    made_by = hash_inputs(name, ()) | {"adapter": args.adapter and hash_adapter(args.adapter)}
    made_by |= {"dtype": str(model.dtype), "device": model.device.type}
    made_by["quantization"] = args.quantization
    mark = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]
    file = args.output_file.with_name(f"{args.output_file.name}.{mark}.answers")
    if file.exists():
        print(f"goes on with the answers in {file}", file=sys.stderr)
    return file


def measure_tasks(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    answers: Path | None,
    report: dict[str, Any],
) -> None:
    """Runs the tasks, prints their figures, and puts them into the report."""
    from deepseek_moe import Generator
    from deepseek_moe.evaluate.harness import EngineLM
    from deepseek_moe.evaluate.presets import NOTES, beside_published
    from deepseek_moe.evaluate.tasks import run_tasks

    lm = EngineLM(Generator(model), tokenizer)
    report["tasks"] = run_tasks(lm, tasks, args.limit, args.apply_chat_template, answers)
    if not args.preset:
        print_results(report["tasks"])
        return
    other = [f"the first {args.limit} questions of each task"] if args.limit else []
    other += ["as conversations"] if args.apply_chat_template else []
    report["preset"] = beside_published(args.preset, report["tasks"], "; ".join(other))
    print_preset(report["preset"])
    print(f"\n{NOTES[args.preset]}")


def print_results(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'task':40} {'shots':>5} {'questions':>9}  {'metric':28} {'value':>9} {'error':>7}")
    for task, figures in results.items():
        for metric, value in figures.items():
            if "," in metric and "_stderr," not in metric:
                error = figures.get(metric.replace(",", "_stderr,"))
                error = "" if error is None else f"{error:.4f}"
                shots, count = figures["num_fewshot"], figures["sample_len"]
                print(f"{task:40} {shots:>5} {count:>9}  {metric:28} {value:9.4f} {error:>7}")


def print_preset(lines: list[dict[str, Any]]) -> None:
    """A setting that is known to differ has a star and says how."""
    print(f"{'benchmark':17} {'shots':>5} {'published':>9} {'measured':>8}   {'task, metric':44}")
    for line in lines:
        digits = 2 if line["benchmark"] == "Pile" else 1
        measured = "-" if line["measured"] is None else f"{line['measured']:.{digits}f}"
        setting = f"{line['task']} {line['metric']}" if line["task"] else ""
        figures = f"{line['shots']:>5} {line['published']:>9} {measured:>8}"
        star = "*" if line["differs"] else " "
        print(f"{line['benchmark']:17} {figures} {star} {setting:44} {line['differs']}".rstrip())


def print_perplexity(report: dict[str, Any]) -> None:
    print(f"perplexity {report['perplexity']:.4f}, bits a byte {report['bits_per_byte']:.4f}")
    print(
        f"over {report['tokens']:,} tokens ({report['bytes']:,} bytes), in windows of "
        f"{report['window']:,} tokens: each begins with BOS, and none overlap"
    )


if __name__ == "__main__":
    main()
