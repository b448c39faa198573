"""The options that the examples share, and what they make of them."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import BUNDLED_MODEL
from .sampling import Sampler, make_sampler


def add_model_options(parser: argparse.ArgumentParser, default: Path = BUNDLED_MODEL) -> None:
    """--model, --dtype, --quantization, --device."""
    parser.add_argument("--model", default=str(default), help="a folder or a hub id")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: the checkpoint's on a GPU; float32 on a CPU if it fits, else bfloat16",
    )
    parser.add_argument(
        "--quantization",
        choices=["int8", "int4"],
        help="pack the weights of the layers into 8 or 4 bits while they are read",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """--max_new_tokens, and what `sampler_of` takes: --temperature, --top_k, --top_p, --min_p,
    --repetition_penalty, --seed."""
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="0 (default) keeps all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="keep the likeliest that reach it together"
    )
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.0,
        help="drop what is less likely than this x the likeliest",
    )
    parser.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1 makes what is in the prompt or answer less likely, below 1 likelier",
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def sampler_of(args: argparse.Namespace) -> Sampler:
    """The sampler that the options of `add_sampling_options` ask for.

    Raises:
        UserError: a value that no distribution has, or nothing to sample.
    """
    if args.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {args.max_new_tokens}; it must be 1 or more")
    return make_sampler(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed
    )


def check_prompt(prompt: str) -> str:
    """`prompt`, or a UserError if it is empty or not text."""
    if not prompt.strip():
        raise UserError("the prompt is empty; give it some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt {prompt[:40]!a} is not UTF-8; convert it") from error
    return prompt


@contextmanager
def noted_interrupts(*numbers: int) -> Iterator[list[int]]:
    """Signals (Ctrl-C, unless `numbers` are given) become entries of the list, to be looked at
    between tokens; a second one interrupts. (As an exception a signal comes anywhere, and Python
    drops one that comes in a destructor.)"""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = {number: signal.signal(number, note) for number in numbers or (signal.SIGINT,)}
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
