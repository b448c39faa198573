"""What the example scripts share: options, checks of what a person typed, errors of one line."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import UserError
from .sampling import Sampler, make_sampler
from .writing import write_aside

MODELS = Path(__file__).resolve().parents[1] / "models"
BUNDLED_MODEL, BUNDLED_CHAT = MODELS / "tiny-base", MODELS / "tiny-chat"


def add_model_options(parser: argparse.ArgumentParser, default: Path = BUNDLED_MODEL) -> None:
    """--model, --dtype, --quantization, --device, --trust_remote_code."""
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
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that comes with a checkpoint of another architecture",
    )


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


def check_writable(name: str | Path, overwrite: bool = True) -> Path:
    """The file, or a UserError if it could not be written, or is there and must not be."""
    try:
        file = Path(name).expanduser()
        writable = os.access(file.absolute().parent, os.W_OK)
        writable &= file.is_file() or not file.exists()  # no folder, no device
    except (OSError, RuntimeError, ValueError):  # no such user, name too long, ...
        writable = False
    if not writable:
        raise UserError(f"{name} cannot be written; give a file in a folder that exists")
    if not overwrite and file.exists():
        raise UserError(_is_there(name))
    return file


def write_text(name: str | Path, text: str, overwrite: bool = False) -> Path:
    """Writes a file that is never half there; a UserError if it fails, or if the file is there
    already and `overwrite` is False."""
    file = check_writable(name, overwrite)
    try:
        write_aside(file, text, overwrite)
    except FileExistsError as error:
        raise UserError(_is_there(name)) from error
    except OSError as error:
        raise UserError(f"{name} cannot be written: {error.strerror}; choose another") from error
    return file


def _is_there(name: str | Path) -> str:
    return f"{name} is there already; choose another name, or add --overwrite"


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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints a `UserError`, or memory that ran out, as one line and leaves with its exit code (2:
    wrong use)."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        leave(str(error), error.exit_code)
    except (torch.OutOfMemoryError, MemoryError) as error:
        found = str(error).split(". ")[0] or "out of memory"
        leave(f"{found}; use a smaller batch, fewer tokens, --dtype bfloat16 or another GPU")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def leave(message: str, exit_code: int = 2) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)
