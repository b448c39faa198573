"""Continues text.

    python examples/completion.py --prompt "Once upon a time" --max_new_tokens 100
    python examples/completion.py --model deepseek-ai/deepseek-moe-16b-base --prompt "..."
    python examples/completion.py --prompts_file prompts.jsonl --output_file completions.jsonl

The text goes to stdout as it is made, everything else to stderr.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from deepseek_moe.chat import TextStream
from deepseek_moe.checkpoint import load
from deepseek_moe.cli import (
    add_model_options,
    add_sampling_options,
    check_prompt,
    check_writable,
    one_line_errors,
    sampler_of,
    write_text,
)
from deepseek_moe.errors import UserError
from deepseek_moe.generation import Generator


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues text with DeepSeek-MoE.")
    add_model_options(parser)
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument(
        "--prompts_file", type=Path, help='one prompt a line: text, "text" or {"prompt": "text"}'
    )
    parser.add_argument("--output_file", type=Path, help="JSON lines of prompt and completion")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts continued together")
    add_sampling_options(parser, max_new_tokens=100)
    args = parser.parse_args()

    prompts = read_prompts(args.prompt, args.prompts_file)
    if args.batch_size < 1:
        raise UserError(f"batch_size is {args.batch_size}; it must be 1 or more")
    if args.output_file:
        check_writable(args.output_file)
    sample = sampler_of(args)
    model, tokenizer = load(
        args.model, args.dtype, args.device, args.trust_remote_code, args.quantization
    )
    generator = Generator(model)
    encoded = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    options = (args.max_new_tokens, sample, {tokenizer.eos_token_id})

    start, made = time.perf_counter(), 0
    if len(prompts) == 1 and not args.output_file:
        steps = generator.stream(encoded, *options)
        print(prompts[0], end="", flush=True)
        text = TextStream(tokenizer)
        for (token,) in steps:
            print(text.add(token), end="", flush=True)
            made += 1
        print()
    else:
        completions = []
        batches = range(0, len(prompts), args.batch_size)
        for at in tqdm(batches, unit="batch", disable=len(batches) == 1):
            ids = generator.generate(encoded[at : at + args.batch_size], *options)
            made += sum(map(len, ids))
            completions += tokenizer.batch_decode(ids, skip_special_tokens=True)
        if args.output_file:
            write_text(args.output_file, as_json_lines(prompts, completions))
        else:
            print("\n\n".join(map("".join, zip(prompts, completions, strict=True))))
    seconds = time.perf_counter() - start
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s", file=sys.stderr)


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


def as_json_lines(prompts: list[str], completions: list[str]) -> str:
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    with one_line_errors():
        main()
