"""What tests share that make the settings of a run from the options of finetune.py."""

from collections.abc import Sequence

from finetune_options import parse_options

from deepseek_moe.training.arguments import Arguments
from deepseek_moe.training.options import make_arguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    return make_arguments(parse_options(argv))


def parse(words: str = "") -> Arguments:
    """The settings of a run over some data, with options as they are typed."""
    return parse_arguments(["--data_path", "x", "--output_dir", "out", *words.split()])
