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
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.hub import convert_file_size_to_int

from .checkpoint import DTYPES, locate, own_tokenizer
from .cli import one_line_errors
from .errors import RunError, UserError
from .fingerprint import fingerprint, is_outdated
from .merge import ADAPTER_FILE, Checkpoint, base_tensors, merged_tensors, official_parts
from .modeling_deepseek import DeepseekForCausalLM
from .weights import name_some
from .writing import (
    complete_or_absent,
    free_bytes_at,
    readable_size,
    refuse_occupied,
    write_aside,
)

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
}


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
        base = locate(args.model)
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
            f"{folder} is of another model: {name_some(wrong)} missing or of another shape; give "
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


def write_checkpoint(
    tensors: Iterator[tuple[str, torch.Tensor]],
    base: Path,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Makes a complete checkpoint of `tensors`; all else in it comes from `base`.

    Args:
        tensors: official names, each once, in any order.
        folder: not there yet, or empty.
        dtype: of all tensors; None keeps for each the one that it has in `base`.
        max_shard_size: of a weight file, in bytes or as "5GB"; 0 gives each tensor its own.

    Raises:
        UserError: tensors are missing, not of this model or not finite, or `folder` is in use.
        RunError: `folder` cannot be written, for example because the disk is full, or was filled
            by another process meanwhile.
    """
    refuse_occupied(folder)
    try:
        limit = convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size {max_shard_size!r} is no size; use 5GB, 200MB") from error
    checkpoint = Checkpoint(base)
    config = checkpoint.config
    config.architectures = [DeepseekForCausalLM.__name__]
    config.dtype = dtype or config.dtype
    tokenizer = own_tokenizer(base)
    _refuse_full_disk(checkpoint, folder, dtype)
    try:
        with complete_or_absent(folder) as aside:
            config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            if (base / "generation_config.json").is_file():
                shutil.copyfile(base / "generation_config.json", aside / "generation_config.json")
            else:
                GenerationConfig.from_model_config(config).save_pretrained(aside)
            add_code(aside)
            write_shards(_checked(tensors, checkpoint, dtype), aside, limit)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written: {error}; free space, or move it") from error


def _refuse_full_disk(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    need = sum(
        math.prod(shape) * (dtype or checkpoint.dtype(name)).itemsize
        for name, shape in checkpoint.official.items()
    )
    free = free_bytes_at(folder)
    if need > free:
        raise RunError(
            f"{folder} cannot be written: its weights take {readable_size(need)}, and "
            f"{readable_size(free)} are free; free space, or give another folder"
        )


def add_code(folder: Path) -> None:
    """Adds the model's code to a checkpoint folder, for machines without this package.

    There `from_pretrained(folder, trust_remote_code=True)` loads it with transformers alone; with
    this package imported the folder loads natively, and its code is not run. The tokenizer needs
    none: tokenizer.json itself says where BOS goes, to every engine.
    """
    module = Path(__file__).with_name("modeling_deepseek.py")
    for file in {module, *map(Path, get_relative_import_files(module))}:
        write_aside(folder / file.name, file.read_text(encoding="utf-8"))
    config = folder / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
    write_aside(config, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _checked(
    tensors: Iterator[tuple[str, torch.Tensor]], checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors`, cast, with a progress bar; every one that there must be and no other, or fails."""
    missing = dict(checkpoint.official)
    for name, tensor in tqdm(tensors, "export", len(missing), unit="tensor", file=sys.stderr):
        if missing.pop(name, None) != tuple(tensor.shape):
            raise UserError(f"{name} {list(tensor.shape)} is not of this base; give its own base")
        wanted = dtype or checkpoint.dtype(name)
        cast = tensor.detach().to("cpu", wanted, copy=True).contiguous()
        if not cast.isfinite().all():
            raise UserError(
                f"{name} holds NaN or inf as {str(wanted).removeprefix('torch.')}; use another "
                "--dtype or an earlier checkpoint"
            )
        yield name, cast
    if missing:
        raise UserError(f"the model lacks {name_some(list(missing))}; give its own base")


def write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, limit: int) -> None:
    """Fills files of up to `limit` bytes in the order of the tensors; 0 gives each its own file.

    A full file and the tensor after it are in memory at most. `folder` holds config.json already,
    whose permissions the files get.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", file)  # safetensors lets only the owner read
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "0.safetensors", folder / "model.safetensors")
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"{number}.safetensors", folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
