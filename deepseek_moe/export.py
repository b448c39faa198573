"""Writes a checkpoint folder in the official layout, with the model's code in it.

    python -m deepseek_moe.export --model BASE --output DIR
    python -m deepseek_moe.export --model BASE --adapter DIR --output DIR
    python -m deepseek_moe.export --model BASE --deepspeed_checkpoint DIR --output DIR

The weights are the base's, or those with a LoRA adapter merged in, or what a full fine-tuning made
of them. No model is built: tensors go one at a time from file to file, and the most that is in
memory is one stack of experts and the shard being written (but all of a DeepSpeed checkpoint). The
folder appears under its name when it is complete.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from .checkpoint import ADAPTER_FILE, DTYPES, Checkpoint, base_tensors, find_checkpoint
from .checkpoint_writer import write_checkpoint
from .errors import UserError, exit_on_user_error
from .files import refuse_occupied
from .fingerprint import fingerprint, is_outdated
from .model.layout import first_few, official_parts
from .training.merge_lora import merged_tensors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deepseek_moe.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="BASE", required=True, help="a folder or a hub id")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--adapter", metavar="DIR", type=Path, help="a LoRA adapter in PEFT's format, to merge"
    )
    what.add_argument(
        "--deepspeed_checkpoint",
        metavar="DIR",
        type=Path,
        help="checkpoint-N of a full fine-tuning under ZeRO; it is unpickled, so only your own",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="a folder that is not there yet"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="of the weights; auto (the default) keeps for each tensor the base's",
    )
    parser.add_argument(
        "--max_shard_size", metavar="SIZE", default="5GB", help="of a weight file; default 5GB"
    )
    args = parser.parse_args()

    output = args.output.expanduser()
    refuse_occupied(output)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a package to do without
    with redirect_stdout(sys.stderr):  # DeepSpeed prints and logs there
        base = find_checkpoint(args.model)
        for folder in filter(None, (args.adapter, args.deepspeed_checkpoint)):
            _refuse_other_base(folder.expanduser(), base)
        if args.adapter:
            tensors = merged_tensors(base, args.adapter.expanduser())
        elif args.deepspeed_checkpoint:
            tensors = consolidated_tensors(base, args.deepspeed_checkpoint.expanduser())
        else:
            tensors = base_tensors(base)
        write_checkpoint(tensors, base, output, DTYPES.get(args.dtype), args.max_shard_size)
    print(output)


def _refuse_other_base(folder: Path, base: Path) -> None:
    """By the run.json that fine-tuning leaves in `folder` or above it, if it is there."""
    whole = folder.resolve()  # the parent of "." or of a link is another folder
    for file in (whole / "run.json", whole.parent / "run.json"):
        if file.is_file():
            try:
                trained_over = json.loads(file.read_text(encoding="utf-8"))["settings"]["model"]
            except (ValueError, KeyError, TypeError):
                continue  # a run.json of another program
            if is_outdated(trained_over):
                print(
                    f"{file} is of an older version of this code, so it was not checked that "
                    f"{folder} was trained over {base}",
                    file=sys.stderr,
                )
            elif trained_over != fingerprint(base):
                raise UserError(
                    f"{folder} was not trained over {base}, by {file}; give the --model that was"
                )
            return


def consolidated_tensors(base: Path, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and fp32 tensors from what every rank of a ZeRO-2 or 3 run saved in `folder`.

    DeepSpeed holds all ranks' shards in memory while it does so, and unpickles them.

    Raises:
        UserError: `folder` is no such checkpoint, or one of another model.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder} is a checkpoint of a LoRA run; pass it as --adapter instead")
    if not (folder / "latest").is_file():
        raise UserError(
            f"{folder} has no file 'latest', so DeepSpeed did not write it; give the "
            "checkpoint-N folder that holds global_stepN"
        )
    checkpoint = Checkpoint(base)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)
    except Exception as error:  # of any class, depending on which file is broken
        found = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} cannot be put together: {found}; use another one") from error
    wrong = [name for name, shape in checkpoint.parameters.items() if _shape(state, name) != shape]
    if wrong:
        raise UserError(
            f"{folder} is of another model: {first_few(wrong)} missing or of another shape; give "
            "the --model that was fine-tuned"
        )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in checkpoint.parameters.items():
            weight = state[name].contiguous()
            for part, where in official_parts(name, shape):
                yield part, weight[where]

    return tensors()


def _shape(state: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
