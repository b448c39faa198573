"""Writes a checkpoint folder in the official layout, with the model's code in it.

    python -m deepseek_moe.export --model BASE --output DIR
    python -m deepseek_moe.export --model BASE --adapter DIR --output DIR
    python -m deepseek_moe.export --model BASE --delta DIR --output DIR
    python -m deepseek_moe.export --model BASE --deepspeed_checkpoint DIR --output DIR

The weights are those of the base, or those with a LoRA adapter merged in, or with what a training
of chosen experts has changed, or those of a full fine-tuning under DeepSpeed. Tensors go one at a
time from file to file: memory holds one stack of experts and the file that is being written, or all
of a DeepSpeed checkpoint.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch

from .checkpoint import DTYPES, Checkpoint, find_checkpoint, refuse_other_base
from .checkpoint_writer import add_output_options, path_of, write_checkpoint
from .checksums import CHECKSUMS, find_damage
from .delta import STEM, delta_tensors, refuse_delta_of_another, whole_tensors
from .errors import UserError, as_user_error, exit_on_user_error
from .files import refuse_occupied
from .model.layout import first_few, official_parts
from .model_card import model_card, record_of_run
from .training.adapter_config import ADAPTER_FILE
from .training.merge_lora import merged_tensors


def main() -> None:
    args = parse_arguments()
    refuse_occupied(args.output)
    # It warns of a package that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints to stdout
        base = find_checkpoint(args.model)
        for folder in filter(None, (args.adapter, args.deepspeed_checkpoint)):
            refuse_other_base(folder, base)
        for folder in filter(None, (args.adapter, args.delta, args.deepspeed_checkpoint)):
            if damage := find_damage([folder / CHECKSUMS, *folder.glob("global_step*/*.pt")]):
                raise UserError(f"{damage}; give another checkpoint")
        checkpoint = Checkpoint(base)
        if args.adapter:
            tensors = merged_tensors(base, args.adapter)
            made = "The base model with a LoRA adapter merged in."
        elif args.delta:
            refuse_delta_of_another(args.delta, base)
            tensors = whole_tensors(base, delta_tensors(args.delta))
            made = "The base model with the experts that were fine-tuned."
        elif args.deepspeed_checkpoint:
            tensors = consolidated_tensors(base, args.deepspeed_checkpoint)
            made = "The base model, fine-tuned."
        else:
            tensors = checkpoint.tensors()
            made = "The weights of the base model, as they are."
        trained = args.adapter or args.delta or args.deepspeed_checkpoint
        card = model_card(made, args.model, base, record_of_run(trained) if trained else None)
        dtype = DTYPES.get(args.dtype)
        write_checkpoint(tensors, checkpoint, args.output, dtype, args.max_shard_size, card)
    print(args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deepseek_moe.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="BASE", required=True, help="a folder or a hub id")
    source = parser.add_mutually_exclusive_group()
    folder = {"metavar": "DIR", "type": path_of}
    source.add_argument("--adapter", help="a LoRA adapter, to merge", **folder)
    source.add_argument("--delta", help="what a training of chosen experts has changed", **folder)
    says = "checkpoint-N of a full fine-tuning under ZeRO; it is unpickled, so only your own"
    source.add_argument("--deepspeed_checkpoint", help=says, **folder)
    add_output_options(parser)
    return parser.parse_args()


def consolidated_tensors(base: Path, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and fp32 tensors of what a run under ZeRO-2 or ZeRO-3 saved in `folder`.

    DeepSpeed unpickles the shards of all ranks, and holds them in memory.

    Raises:
        UserError: `folder` is no such checkpoint, or one of another model.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder} is a checkpoint of a LoRA run; pass it as --adapter instead")
    if any(folder.glob(f"{STEM}*.safetensors")):
        raise UserError(f"{folder} is a checkpoint of chosen experts; pass it as --delta instead")
    if not (folder / "latest").is_file():
        raise UserError(
            f"{folder} has no file 'latest', so DeepSpeed did not write it; give the "
            "checkpoint-N folder that holds global_stepN"
        )
    checkpoint = Checkpoint(base)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with as_user_error(f"{folder} cannot be put together", "use another one"):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), lazy_mode=True)
    wrong = [
        name
        for name, shape in checkpoint.parameters.items()
        if name not in state or tuple(state[name].shape) != shape
    ]
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


if __name__ == "__main__":
    with exit_on_user_error():
        main()
