"""The options that the examples share, and the model that they name.

To import this file takes only the standard library, so that --help and wrong options answer at
once.
"""

import argparse
import difflib
import os
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
DRAWN = ("top_k", "top_p", "min_p", "seed")  # those that say how tokens are drawn


class OptionParser(argparse.ArgumentParser):
    """Takes --max-new-tokens for --max_new_tokens, and says more about options that are wrong."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        known = [option for action in self._actions for option in action.option_strings]
        words = [_with_underscores(word, known) for word in words]
        found, unknown = self.parse_known_args(words, namespace)
        if sys.stdout is None:
            self.exit(2, "error: the standard output is closed; send it to a file or /dev/null\n")
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options"
            self.error(f"there is no option {name}; {hint}")
        for name in DRAWN if "temperature" in found and not found.temperature else ():
            if getattr(found, name) != self.get_default(name):
                self.error(f"--{name} has no effect without --temperature; add --temperature 1")
        if "adapter" in found and found.adapter and found.quantization:
            self.error(
                "an adapter cannot be merged into quantised weights; merge it with python -m "
                "deepseek_moe.export --adapter first, and give the result as --model"
            )
        return found


def _with_underscores(word: str, options: Sequence[str]) -> str:
    """`word` as the option is spelled that it names or abbreviates; another word as it is."""
    name, equals, value = word.partition("=")
    spelled = "--" + name[2:].replace("-", "_")
    known = word.startswith("--") and any(option.startswith(spelled) for option in options)
    return spelled + equals + value if known else word


def add_model_options(parser: OptionParser, bundled: str) -> None:
    """Adds which model, and where. Without --model the caller takes the `bundled` model."""
    says = f"a folder or a hub id; the default is {bundled}"
    parser.add_argument("--model", help=says)
    says = "auto: the checkpoint's on a GPU; float32 on a CPU if it fits, else bfloat16"
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help=says)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_weight_options(parser: OptionParser) -> None:
    """Adds what is done to the weights while they are loaded."""
    says = "the folder of a LoRA adapter, which is merged into the model in memory"
    parser.add_argument("--adapter", help=says)
    says = "quantise the weights of the layers to 8 or 4 bits while they are read; auto: if memory"
    says += " is too small for more"
    parser.add_argument("--quantization", choices=["auto", "int8", "int4"], help=says)


def add_sampling_options(parser: OptionParser, max_new_tokens: int) -> None:
    """Adds --max_new_tokens and the arguments of `Sampling`, whose defaults are greedy."""
    penalty = "above 1 makes what is in the prompt or answer less likely, below 1 likelier"
    for name, kind, default, says in (
        ("max_new_tokens", positive, max_new_tokens, f"default {max_new_tokens}"),
        ("temperature", float, 0.0, "0 (default) is greedy"),
        ("top_k", int, 0, "0 (default) keeps all"),
        ("top_p", float, 1.0, "keep the likeliest that reach it together"),
        ("min_p", float, 0.0, "drop what is less likely than this x the likeliest"),
        ("repetition_penalty", float, 1.0, penalty),
        ("seed", int, None, "makes sampling repeatable"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=says)


def load_model(args: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """The model `name` as the options say, with --adapter merged in, and its tokenizer."""
    from deepseek_moe import load
    from deepseek_moe.checkpoint import find_checkpoint
    from deepseek_moe.errors import as_user_error

    model, tokenizer = load(name, args.dtype, args.device, args.quantization)
    if args.adapter:
        with as_user_error("--adapter cannot be used", "give the folder of a LoRA adapter"):
            from deepseek_moe.training.merge_lora import merge_into

            merge_into(model, find_checkpoint(name), Path(args.adapter))
    return model, tokenizer


def sampling_arguments(args: argparse.Namespace) -> dict[str, float | int | None]:
    """The arguments of `Sampling`."""
    return {name: getattr(args, name) for name in SAMPLING}


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it is {number}; it must be 1 or more")
    return number


def standard_input() -> TextIO:
    """stdin as UTF-8. Bytes that are not UTF-8 become text that `check_prompt` refuses.

    Raises:
        UserError: it is closed.
    """
    from deepseek_moe.errors import UserError

    if sys.stdin is None:
        raise UserError("the standard input is closed; pipe some text in, or give it as --prompt")
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def stdin_is_piped() -> bool:
    """Whether stdin is a pipe or a file; not a terminal, and not /dev/null."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    kind = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind)


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
