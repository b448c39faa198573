"""Measures how much each expert of a DeepSeek-MoE model is used on some text, and shows it.

    python examples/experts.py --data_path train.jsonl --output profiles
    python examples/experts.py --data_path maths=train.jsonl --text tales=t.txt --output profiles
    python examples/experts.py --prompt "Once upon a time" --output profiles

profiles/profile.json holds what was measured on all data together, and heatmap.html and heatmap.png
show it. Several sets of data have a file profile-NAME.json each, and differences.json says how far
each is from the first. Prompts are shown in the terminal, each token in the colour of its top
expert at a layer, and for all layers in prompt.html.

Tables and prompts go to stdout, everything else to stderr.
"""

import argparse
from pathlib import Path
from typing import Any

from shared_options import OptionParser, add_model_options, ctrl_c_leaves, positive


def main() -> None:
    args = parse_arguments()
    with ctrl_c_leaves():  # these imports take seconds
        from measurement import run

        from deepseek_moe.errors import exit_on_user_error
    with exit_on_user_error():
        run(args)


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(description="Measures how much each expert of a model is used.")
    add_model_options(parser, bundled="models/tiny-base")
    several: dict[str, Any] = {"action": "append", "default": []}
    files: dict[str, Any] = {"nargs": "+", "metavar": "FILE"} | several
    says = (
        "a set of data, as finetune.py takes it; repeated, it gives more sets; NAME=FILE names it"
    )
    parser.add_argument("--data_path", help=says, **files)
    says = "a set of plain text, cut into windows of max_length; repeated and named alike"
    parser.add_argument("--text", help=says, **files)
    parser.add_argument("--prompt", help="a text; all prompts are one set", **several)
    says = "the layer by which prompts are coloured in the terminal; default the middle one"
    parser.add_argument("--layer", type=int, help=says)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the files")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    says = "tokens of a window or an example, which is cut; default 1024, or the context if smaller"
    names = ("--max_length", "--model_max_length")  # finetune.py has the second
    parser.add_argument(*names, dest="max_length", type=positive, help=says)
    says = "take the first so many tokens of each set"
    parser.add_argument("--limit", type=positive, help=says)
    says = "windows or examples that are read together; default 16"
    parser.add_argument("--batch_size", type=positive, default=16, help=says)
    says = "your names of the fields: instruction=query,output=text"
    parser.add_argument("--columns", default="", help=says)
    says = "leave out unusable rows instead of stopping"
    choice: dict[str, Any] = {"nargs": "?", "choices": ["True", "False"]}
    parser.add_argument("--skip_bad_rows", const="True", default="False", help=says, **choice)
    parser.add_argument("--cache_dir", help="where prepared data are kept")
    args = parser.parse_args()
    if not (args.data_path or args.text or args.prompt):
        parser.error("there is nothing to measure; give --data_path, --text or --prompt")
    if args.layer is not None and not args.prompt:
        parser.error("--layer has no effect without --prompt; add a prompt")
    return args


if __name__ == "__main__":
    main()
