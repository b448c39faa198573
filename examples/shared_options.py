"""The options that both examples share.

This file imports only the standard library, so that --help and wrong options answer at once.
"""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1] / "models"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_model_options(parser: argparse.ArgumentParser, bundled: str) -> None:
    """Adds the options of `load`. The default is a model in the folder models/."""
    parser.add_argument(
        "--model",
        default=str(MODELS / bundled),
        help=f"a folder or a hub id; the default is models/{bundled}",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: the checkpoint's on a GPU; float32 on a CPU if it fits, else bfloat16",
    )
    parser.add_argument(
        "--quantization",
        choices=["int8", "int4"],
        help="quantise the weights of the layers to 8 or 4 bits while they are read",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds --max_new_tokens and the arguments of `make_sampler`."""
    parser.add_argument("--max_new_tokens", type=positive, default=max_new_tokens)
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


def sampling_arguments(args: argparse.Namespace) -> dict[str, float | int | None]:
    """The arguments of `make_sampler`."""
    return {name: getattr(args, name) for name in SAMPLING}


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it is {number}; it must be 1 or more")
    return number


@contextmanager
def ctrl_c_leaves() -> Iterator[None]:
    """Ends the process after Ctrl-C with exit code 130 and without a traceback.

    This is for imports: the modules that are imported could catch a KeyboardInterrupt.
    """
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
