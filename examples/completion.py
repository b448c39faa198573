"""Continues text.

    python examples/completion.py --prompt "Once upon a time" --max_new_tokens 100
    python examples/completion.py --model deepseek-ai/deepseek-moe-16b-base --prompt "..."
    python examples/completion.py --prompts_file prompts.jsonl --output_file completions.jsonl
    python examples/completion.py < story.txt

The text goes to stdout as it is made, everything else to stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_options import (
    OptionParser,
    add_model_options,
    add_sampling_options,
    add_weight_options,
    ctrl_c_leaves,
    load_model,
    positive,
    sampling_arguments,
    standard_input,
    stdin_is_piped,
)
from tqdm import tqdm


def main() -> None:
    args = parse_arguments()
    with ctrl_c_leaves():  # these imports take seconds
        from deepseek_moe.bundled import BUNDLED_MODEL
        from deepseek_moe.decode.completion_file import CompletionFile, hash_inputs
        from deepseek_moe.decode.load import pick_quantization
        from deepseek_moe.decode.prompts import TimedGenerator, complete_in_batches, read_prompts
        from deepseek_moe.decode.sampling import Sampling
        from deepseek_moe.decode.texts import TextStream, end_ids
        from deepseek_moe.errors import exit_on_user_error

    with exit_on_user_error():
        prompts = read_prompts(given_prompts(args), args.prompts_file)
        sample = Sampling(**sampling_arguments(args))
        name, output = args.model or str(BUNDLED_MODEL), None
        if args.output_file:
            if args.quantization == "auto":  # what it picks decides the completions
                args.quantization = pick_quantization(name, args.dtype, args.device)
            made_from = hash_inputs(name, prompts) | settings_of(args)
            output = CompletionFile(
                args.output_file, prompts, made_from, args.batch_size, args.overwrite
            )
            if output.finished:
                print(f"{output} already", file=sys.stderr)
                return
        model, tokenizer = load_model(args, name)
        generator = TimedGenerator(model)
        encoded = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
        options = (args.max_new_tokens, sample, end_ids(tokenizer, model))
        steps = generator.stream(encoded, *options)  # refuses a prompt that is too long
        early = 0
        if len(prompts) == 1 and not output:
            text = TextStream(tokenizer)
            print(prompts[0], end="", flush=True)
            for (token,) in steps:
                print(text.add(token), end="", flush=True)
            print()
            early = int(generator.made < args.max_new_tokens)
        else:
            batches = complete_in_batches(generator, encoded, *options, args.batch_size, output)
            for at, ids in batches:
                early += sum(len(new) < args.max_new_tokens for new in ids)
                completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
                if output:
                    output.add(completions)
                else:
                    print_batch(at, prompts[at:], completions)
        said = f"{early} of {len(prompts)} texts ended, or filled the context of "
        said += f"{generator.context} tokens, before --max_new_tokens {args.max_new_tokens}"
        print(generator, *([said] if early else []), sep="; ", file=sys.stderr)


def given_prompts(args: argparse.Namespace) -> list[str]:
    """Those of --prompt, with what is piped in."""
    given = [piped_text() if one == "-" else one for one in args.prompt]
    if not given and not args.prompts_file and stdin_is_piped():
        given = [text] if (text := piped_text()) else []
    return given


def piped_text() -> str:
    """All of stdin but the newline that `echo` and editors put at the end."""
    return standard_input().read().removesuffix("\n")


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(description="Continues text with DeepSeek-MoE.")
    add_model_options(parser, bundled="models/tiny-base")
    add_weight_options(parser)
    says = "text to continue; may be repeated; - (or none, if something is piped in) reads stdin"
    parser.add_argument("--prompt", action="append", default=[], help=says)
    says = 'one prompt a line: text, "text" or {"prompt": "text"}'
    parser.add_argument("--prompts_file", type=Path, help=says)
    says = "JSON lines of prompt and completion; repeating an interrupted command goes on in it"
    parser.add_argument("--output_file", type=Path, help=says)
    says = "begin the output file anew, whatever is in it"
    parser.add_argument("--overwrite", action="store_true", help=says)
    says = "prompts continued together"
    parser.add_argument("--batch_size", type=positive, default=16, help=says)
    add_sampling_options(parser, max_new_tokens=100)
    args = parser.parse_args()
    output, prompts = args.output_file, args.prompts_file
    if output and prompts and output.exists() and prompts.exists() and output.samefile(prompts):
        parser.error("the output file is the prompts file; give another --output_file")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is written, besides the model and the prompts."""
    settings = sampling_arguments(args)
    settings |= {name: getattr(args, name) for name in ("dtype", "quantization", "max_new_tokens")}
    if args.adapter:
        from deepseek_moe.training.adapter_config import hash_adapter

        settings["adapter"] = hash_adapter(args.adapter)
    # Where nothing is drawn, batches may be of any size.
    return settings | {"batch_size": args.batch_size if args.temperature else None}


def print_batch(at: int, prompts: Sequence[str], completions: Sequence[str]) -> None:
    """Prints completions, with an empty line between two of them."""
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=False), at):
        tqdm.write(("\n" if number else "") + prompt + completion, file=sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
