"""Continues text.

    python examples/completion.py --prompt "Once upon a time" --max_new_tokens 100
    python examples/completion.py --model deepseek-ai/deepseek-moe-16b-base --prompt "..."
    python examples/completion.py --prompts_file prompts.jsonl --output_file completions.jsonl

The text goes to stdout as it is made, everything else to stderr.
"""

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deepseek_moe.chat import TextStream
from deepseek_moe.checkpoint import find_checkpoint
from deepseek_moe.decode.completion_file import CompletionFile
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.decode.options import (
    add_model_options,
    add_sampling_options,
    check_prompt,
    noted_interrupts,
    sampler_of,
)
from deepseek_moe.decode.sampling import Sampler, Sampling
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.fingerprint import fingerprint

DECISIVE = ("dtype", "quantization", "max_new_tokens", "temperature", "top_k", "top_p", "min_p")
DECISIVE += ("repetition_penalty", "seed")


def main() -> None:
    args = parse_arguments()
    prompts = read_prompts(args.prompt, args.prompts_file)
    sample = sampler_of(args)
    output = None
    if args.output_file:
        settings = settings_of(args, prompts)
        output = CompletionFile(
            args.output_file, prompts, settings, args.batch_size, args.overwrite
        )
        if output.finished:
            print(f"{output} already", file=sys.stderr)
            return
    model, tokenizer = load(args.model, args.dtype, args.device, args.quantization)
    generator = Generator(model)
    encoded = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    options = (args.max_new_tokens, sample, {tokenizer.eos_token_id})
    steps = generator.stream(encoded, *options)  # refuses any prompt before the work on the first

    start, made = time.perf_counter(), 0
    if len(prompts) == 1 and not output:
        print(prompts[0], end="", flush=True)
        text = TextStream(tokenizer)
        for (token,) in steps:
            print(text.add(token), end="", flush=True)
            made += 1
        print()
    else:
        for at, ids in batches(generator, encoded, options, args.batch_size, output):
            made += sum(map(len, ids))
            completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
            if output:
                output.add(completions)
            else:
                texts = map("".join, zip(prompts[at : at + len(ids)], completions, strict=True))
                tqdm.write(("\n" if at else "") + "\n\n".join(texts), file=sys.stdout)
                sys.stdout.flush()
    seconds = time.perf_counter() - start
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continues text with DeepSeek-MoE.")
    add_model_options(parser)
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument(
        "--prompts_file", type=Path, help='one prompt a line: text, "text" or {"prompt": "text"}'
    )
    parser.add_argument(
        "--output_file",
        type=Path,
        help="JSON lines of prompt and completion; repeating an interrupted command goes on in it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin the output file anew, whatever is in it"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="prompts continued together")
    add_sampling_options(parser, max_new_tokens=100)
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"batch_size is {args.batch_size}; it must be 1 or more")
    if args.output_file and args.prompts_file and same(args.output_file, args.prompts_file):
        raise UserError("the output file is the prompts file; give another --output_file")
    return args


def same(file: Path, other: Path) -> bool:
    return file.exists() and other.exists() and file.samefile(other)


def settings_of(args: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """All that decides the completions: where nothing is drawn, batches of any size may follow."""
    folder = find_checkpoint(args.model)
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    tokenizer = b"".join(file.read_bytes() for file in files if file.is_file())
    return {
        "model": fingerprint(folder),
        "tokenizer": hashlib.sha256(tokenizer).hexdigest()[:16],
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        **{name: getattr(args, name) for name in DECISIVE},
        "batch_size": args.batch_size if args.temperature else None,
    }


def batches(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    options: tuple[int, Sampler, Collection[int]],
    size: int,
    output: CompletionFile | None,
) -> Iterator[tuple[int, list[list[int]]]]:
    """The place of the first prompt and the new ids of each batch that is not in `output` yet.

    Ctrl-C and SIGTERM end the process, between two steps.
    """
    _, sample, _ = options
    if output:
        output.start()
    begin = output.done if output else 0
    with (
        noted_interrupts(signal.SIGINT, signal.SIGTERM) as stopped,
        tqdm(total=len(prompts), initial=begin, unit="prompt", disable=len(prompts) <= size) as bar,
    ):
        for at in range(begin, len(prompts), size):
            if isinstance(sample, Sampling) and sample.seed is not None:
                seed = seed_of_batch(sample.seed, at // size)
                sample.generator(generator.model.device).manual_seed(seed)
            batch = prompts[at : at + size]
            new: list[list[int]] = [[] for _ in batch]
            for step in generator.stream(batch, *options):
                if stopped:
                    break
                for ids, token in zip(new, step, strict=True):
                    ids.extend([] if token is None else [token])
            if stopped:
                break
            yield at, new
            bar.update(len(batch))
        else:
            return
    if output:
        print(f"stopped: {output}; {output.remedy}", file=sys.stderr)
    sys.exit(128 + stopped[0])


def seed_of_batch(seed: int, number: int) -> int:
    """Of its own, so that a batch draws the same whether those before it were made now or not."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line and the file; a default where neither is given.

    Raises:
        UserError: a prompt is empty, or the file cannot be read.
    """
    prompts = list(given or [])
    if file:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}; give a UTF-8 text file") from error
        prompts += [parse(line, f"{file} line {n}") for n, line in enumerate(lines, 1) if line]
        if not prompts:
            raise UserError(f"{file} is empty; write one prompt a line")
    return [check_prompt(prompt) for prompt in prompts or ["Once upon a time"]]


def parse(line: str, where: str) -> str:
    if line[0] not in '{"':
        return line
    try:
        row = json.loads(line)
    except ValueError as error:
        if line[0] == '"':  # text that begins with a quotation mark
            return line
        raise UserError(f'{where} is no JSON ({error}); write {{"prompt": "..."}}') from error
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str):
        raise UserError(f'{where} has no text under "prompt"; write {{"prompt": "..."}}')
    return prompt


if __name__ == "__main__":
    with exit_on_user_error():
        main()
