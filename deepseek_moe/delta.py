"""A delta: the tensors that a fine-tuning has changed of its base, under their official names.

    delta.safetensors    or delta-00001-of-00003.safetensors ... and delta.safetensors.index.json
    delta.json           {"base": the fingerprint of the base}

A checkpoint of a run has no delta.json. The run.json of its run names the base.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from .checkpoint import Checkpoint, fingerprint, refuse_other_base
from .checkpoint_writer import cast_finite, write_shards
from .checksums import VerifiedFile
from .errors import UserError, as_user_error
from .files import write_aside
from .json_file import read_object
from .model.layout import weight_files

STEM = "delta"
DELTA_FILE = "delta.json"
Tensors = Iterator[tuple[str, torch.Tensor]]


def delta_tensors(folder: Path) -> Tensors:
    """The official names and tensors of a delta, each read when it is asked for.

    Raises:
        UserError: there is none in `folder`, or a file of it is missing or broken.
    """
    remedy = "give a folder that finetune.py --train_experts wrote"
    with as_user_error(f"{folder} holds no delta that can be read", remedy):
        files = weight_files(folder, STEM)
    opened = []
    for file in files:
        with as_user_error(f"{file} is no delta that can be read", remedy):
            opened.append(VerifiedFile(file))
    return ((name, file.get_tensor(name)) for file in opened for name in file.keys())  # noqa: SIM118


def write_delta(tensors: Tensors, base: Path, folder: Path, shard_bytes: int) -> None:
    """Writes `tensors` into `folder` with the dtypes that they have in `base`, and which it is.

    Raises:
        UserError: a number is not finite.
    """
    checkpoint = Checkpoint(base)
    cast = ((name, cast_finite(name, x, checkpoint.dtype(name))) for name, x in tensors)
    folder.mkdir(parents=True)
    write_shards(cast, folder, shard_bytes, STEM)
    write_aside(folder / DELTA_FILE, json.dumps({"base": fingerprint(base)}) + "\n")


def whole_tensors(base: Path, changed: Tensors) -> Tensors:
    """Yields all official names and tensors of a model: those that `changed`, then the base's."""
    checkpoint, seen = Checkpoint(base), set()
    for name, tensor in changed:
        seen.add(name)
        yield name, tensor
    for name in checkpoint.official:
        if name not in seen:
            yield name, checkpoint.tensor(name)


def refuse_delta_of_another(folder: Path, base: Path) -> None:
    """Raises a UserError if the delta in `folder` is known to be that of another base."""
    file = folder / DELTA_FILE
    if not file.is_file():  # a checkpoint of a run
        return refuse_other_base(folder, base)
    recorded = read_object(file, "get the delta anew").get("base")
    if recorded != fingerprint(base):
        raise UserError(f"{file} is of a delta over another model than {base}; give its --model")
