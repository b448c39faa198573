"""A short text that tells one base model from another: what a run or an adapter belongs to."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .errors import as_user_error
from .model.configuration_deepseek import DeepseekConfig
from .model.layout import weight_files

FORMAT = "tensors:"
"""How a fingerprint begins. Those of older versions have no such mark: 16 hexadecimal digits."""

SAMPLE = 4096  # bytes that are read at one place of a tensor
STRIDE = 8 * 2**20  # bytes of a tensor for each place, so that large ones are read at several

# Fields of the config that the numbers in a forward or backward pass do not depend on.
NOT_COMPUTED = {
    *("use_cache", "initializer_range", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def fingerprint(folder: Path) -> str:
    """A hash of every tensor's name, dtype, shape and a sample of its bytes, and of the config.

    A sample is 4 KB from the middle of each 8 MB, which is 22 MB of the 16B model. A smaller change
    inside of a tensor is not noticed. How the tensors are divided into files, their order, and
    fields of the config that change no number do not count: a copy with other shards is the same
    model.

    Raises:
        UserError: the config or a weight file is broken.
    """
    with as_user_error(f"{folder / 'config.json'} cannot be used", "mend the field"):
        fields = _computed_fields(folder)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    found: dict[str, bytes] = {}
    for file in weight_files(folder):
        with as_user_error(f"{file} is truncated or corrupt", "get it anew"):
            found |= dict(_describe_tensors(file))
    for name in sorted(found):
        tied_head = fields.get("tie_word_embeddings") and name == "lm_head.weight"
        if not tied_head and "rotary_emb.inv_freq" not in name:  # may be stored or left out
            digest.update(found[name])
    return FORMAT + digest.hexdigest()[:32]


def is_outdated(recorded: object) -> bool:
    """Whether `recorded`, from a run.json, is a fingerprint of an older version of this code."""
    return isinstance(recorded, str) and not recorded.startswith(FORMAT)


def _computed_fields(folder: Path) -> dict[str, Any]:
    """The fields that decide numbers, with this architecture's defaults; all of another one's."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if fields.get("model_type") == DeepseekConfig.model_type:
        config = DeepseekConfig.from_pretrained(folder)
        names = DeepseekConfig.__annotations__.keys() - NOT_COMPUTED
        fields = {name: getattr(config, name) for name in names}
    return json.loads(json.dumps(fields), parse_int=float)  # 10000 is 10000.0


def _describe_tensors(file: Path) -> Iterator[tuple[str, bytes]]:
    """Each tensor's name, and what of it goes into the hash; in the order in the file, so that a
    disk reads it in one direction."""
    # safetensors checks the header, and that the file is whole.
    with safe_open(file, framework="pt"), file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            described = repr((name, tensor["dtype"], tensor["shape"])).encode()
            yield name, described + b"".join(_samples(handle.fileno(), begin, end))


def _samples(file: int, begin: int, end: int) -> Iterator[bytes]:
    """The bytes in the middle of each of the equal parts of `begin` to `end` (all, if few)."""
    size = end - begin
    parts = max(1, -(-size // STRIDE))
    for part in range(parts):
        middle = begin + size * (2 * part + 1) // (2 * parts)
        start = max(begin, middle - SAMPLE // 2)
        yield os.pread(file, min(SAMPLE, end - start), start)
