"""Writes checkpoint folders in the official layout, with the model's code in them."""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.hub import convert_file_size_to_int

from .checkpoint import DTYPES, Checkpoint, own_tokenizer
from .checksums import KEY, checksum
from .errors import RunError, UserError, as_user_error
from .files import complete_or_absent, free_bytes_at, readable_size, refuse_occupied, write_aside
from .model import modeling_deepseek
from .model.layout import first_few
from .model.modeling_deepseek import DeepseekForCausalLM

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
}


def write_checkpoint(
    tensors: Iterator[tuple[str, torch.Tensor]],
    base: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str = "5GB",
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint that is complete or absent. All but the tensors comes from `base`.

    Args:
        tensors: pairs of official name and tensor, each name once, in any order.
        base: its config, and which tensors there must be; its folder has the tokenizer.
        folder: it does not exist, or is empty.
        dtype: of all tensors; None keeps each tensor's dtype in `base`.
        max_shard_size: of a weight file, in bytes or as "5GB"; 0 gives each tensor its own file.
        notes: other text files to write, by their names.

    Raises:
        UserError: a tensor is missing, not of this model or not finite, or `folder` is in use.
        RunError: `folder` cannot be written, for example because the disk is full, or another
            process has filled it meanwhile.
    """
    refuse_occupied(folder)
    try:
        limit = convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size {max_shard_size!r} is no size; use 5GB, 200MB") from error
    config = base.config
    config.architectures = [DeepseekForCausalLM.__name__]
    config.dtype = dtype or config.dtype
    with as_user_error(f"{base.folder / 'config.json'} cannot be used", "mend the field"):
        config.validate()  # as `save_pretrained` does
    tokenizer = own_tokenizer(base.folder)
    generation_config = base.folder / "generation_config.json"
    _refuse_full_disk(base, folder, dtype)
    try:
        with complete_or_absent(folder) as aside:
            config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            if generation_config.is_file():
                shutil.copyfile(generation_config, aside / generation_config.name)
            else:
                GenerationConfig.from_model_config(config).save_pretrained(aside)
            add_code(aside)
            for name, content in (notes or {}).items():
                (aside / name).write_text(content, encoding="utf-8")
            write_shards(_checked(tensors, base, dtype), aside, limit)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written: {error}; free space, or move it") from error


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds where a command writes its checkpoint, and how."""
    add, says = parser.add_argument, "a folder that is not there yet"
    add("--output", metavar="DIR", type=path_of, required=True, help=says)
    says = "of the weights; auto (the default) keeps each tensor's dtype in BASE"
    add("--dtype", default="auto", choices=["auto", *DTYPES], help=says)
    add("--max_shard_size", metavar="SIZE", default="5GB", help="of a weight file; default 5GB")


def path_of(name: str) -> Path:
    """For argparse: a path in which ~ may stand for the user's home."""
    return Path(name).expanduser()


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

    There, `from_pretrained(folder, trust_remote_code=True)` runs it. Where this package is
    imported, its own classes load the folder. The tokenizer needs no code: tokenizer.json says
    where BOS goes.
    """
    module = Path(modeling_deepseek.__file__)
    for file in {module, *map(Path, get_relative_import_files(module))}:
        write_aside(folder / file.name, file.read_text(encoding="utf-8"))
    config = folder / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
    write_aside(config, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _checked(
    tensors: Iterator[tuple[str, torch.Tensor]], checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, cast to their dtype, with a progress bar. Wrong ones raise a UserError."""
    missing = dict(checkpoint.official)
    for name, tensor in tqdm(tensors, "write", len(missing), unit="tensor", file=sys.stderr):
        if missing.pop(name, None) != tuple(tensor.shape):
            raise UserError(f"{name} {list(tensor.shape)} is not of this base; give its own base")
        yield name, cast_finite(name, tensor, dtype or checkpoint.dtype(name))
    if missing:
        raise UserError(f"the model lacks {first_few(list(missing))}; give its own base")


def cast_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the tensor on the host in `dtype`. Raises a UserError if it is not finite then.

    It is cast and looked at where it is, which on a GPU takes no time beside the way to the host.
    """
    cast = tensor.detach().to(dtype, copy=True).contiguous()
    if not cast.isfinite().all():
        raise UserError(
            f"{name} holds NaN or inf as {str(dtype).removeprefix('torch.')}; use another "
            "--dtype or an earlier checkpoint"
        )
    return cast.cpu()


def write_shards(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, limit: int, stem: str = "model"
) -> None:
    """Writes files of up to `limit` bytes in the order of the tensors; 0 gives each its own file.

    At most the tensors of one file and the next one are in memory. (The planner of huggingface_hub
    needs all tensors at once.) The names of the files begin with `stem`. Threads compute checksums
    while the next tensors are made.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    sums: dict[str, Future[str]] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"{len(shards)}.safetensors"
        file.touch()
        usual = file.stat().st_mode
        digits = {name: future.result() for name, future in sums.items()}
        save_file(shard, file, metadata={"format": "pt", KEY: json.dumps(digits)})
        file.chmod(usual)  # safetensors lets only the owner read it
        shards.append(list(shard))
        shard.clear()
        sums.clear()

    with ThreadPoolExecutor() as pool:
        for name, tensor in tensors:
            if shard and size + tensor.nbytes > limit:
                flush()
                size = 0
            shard[name], sums[name] = tensor, pool.submit(checksum, tensor)
            size += tensor.nbytes
            total += tensor.nbytes
        flush()
    if len(shards) == 1:
        os.replace(folder / "0.safetensors", folder / f"{stem}.safetensors")
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"{number}.safetensors", folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
