"""The tensors of a checkpoint: their names on disk and in memory, and whether all are there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.utils import cached_file

EXPERT_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""In memory a parameter [experts, out, in] stacks all experts of a layer. By its name, the matrices
of an expert on disk, which stand above each other in it."""

# transformers applies this while it loads, and backwards while it saves.
register_checkpoint_conversion_mapping(
    "deepseek",
    [
        WeightConverter(
            source_patterns=[f"mlp.experts.*.{matrix}.weight" for matrix in matrices],
            target_patterns=f"mlp.experts.{stack}",
            operations=[MergeModulelist(dim=0)] + [Concatenate(dim=1)] * (len(matrices) > 1),
        )
        for stack, matrices in EXPERT_STACKS.items()
    ],
    overwrite=True,
)

# How a weight may be stored, in the words of safetensors headers. transformers would cast anything
# else without a warning: integers and booleans become zeros and ones.
FLOATS = ("F64", "F32", "BF16", "F16")


def official_parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields the official names of a parameter in memory, each with its index in that parameter: ()
    for one that is stored as it is, else (expert, rows)."""
    prefix, _, stack = name.rpartition(".")
    if not prefix.endswith(".experts"):
        yield name, ()
        return
    matrices = EXPERT_STACKS[stack]
    rows = shape[1] // len(matrices)
    for expert in range(shape[0]):
        for number, matrix in enumerate(matrices):
            where = (expert, slice(number * rows, (number + 1) * rows))
            yield f"{prefix}.{expert}.{matrix}.weight", where


def official_tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `model` (may be on meta) has on disk."""
    return {
        official: tuple(parameter[where].shape)
        for name, parameter in model.named_parameters()  # a tied head is listed as embed_tokens
        for official, where in official_parts(name, tuple(parameter.shape))
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read from `folder`; some may be missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def refuse_wrong_checkpoint(
    path: str | Path, kwargs: dict[str, Any], model_class: type[PreTrainedModel]
) -> None:
    """`refuse_wrong_tensors` for what `from_pretrained` would read, if it is on this disk."""
    if kwargs.keys() & {"state_dict", "gguf_file", "key_mapping"}:
        return
    where = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder") if key in kwargs}
    try:
        found = cached_file(path, "config.json", local_files_only=True, **where)
    except OSError:
        return  # transformers says what it looked for
    config = kwargs.get("config")
    if config is None or isinstance(config, (str, Path)):
        config = model_class.config_class.from_pretrained(config or Path(found).parent)
    if getattr(config, "transformers_weights", None):
        raise ValueError(
            f"{found} names weights of its own ({config.transformers_weights}), which may be a "
            "pickle; take transformers_weights out"
        )
    # Files of quantised weights (the config says so) hold other tensors. Weights that are quantised
    # while they are read (the keyword) lie there like any; transformers takes any shape of them.
    if hasattr(config, "quantization_config"):
        _refuse_8_bit_floats(Path(found).parent, _stored_tensors(Path(found).parent))
    else:
        with torch.device("meta"):
            wanted = model_class(config)
        refuse_wrong_tensors(Path(found).parent, wanted)


def refuse_wrong_tensors(folder: Path, model: PreTrainedModel) -> None:
    """Compares the headers of the safetensors files in `folder` with what `model` (on meta) wants.

    Raises:
        ValueError: names the tensors that are missing, surplus, of another shape or no floats.
    """
    stored = _stored_tensors(folder)
    if not stored:
        return  # transformers says what it looked for
    _refuse_8_bit_floats(folder, stored)
    found = {name: shape for name, (_, shape) in stored.items()}
    if not any(name.startswith("model.") for name in found):  # a bare DeepseekModel
        found = {f"model.{name}": shape for name, shape in found.items()}
        found["lm_head.weight"] = (model.config.vocab_size, model.config.hidden_size)
    wanted = official_tensors(model)
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{n} {fault}" for n, (dtype, _) in stored.items() if (fault := dtype_fault(dtype))]
    for name, shape in found.items():
        if name in wanted and shape != wanted[name]:
            wrong.append(f"{name} has shape {list(shape)}, the config wants {list(wanted[name])}")
        tied_head = model.config.tie_word_embeddings and name == "lm_head.weight"
        if name not in wanted and not tied_head and "rotary_emb.inv_freq" not in name:
            wrong.append(f"{name} is not of this model")
    if wrong:
        raise ValueError(f"{folder} does not hold this model: {first_few(wrong)}")


def _stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor, from the files' headers; nothing if a file is missing."""
    files, stored = weight_files(folder), {}
    if not all(file.is_file() for file in files):
        return {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                header = tensors.get_slice(name)
                stored[name] = (header.get_dtype(), tuple(header.get_shape()))
    return stored


def _refuse_8_bit_floats(folder: Path, stored: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for name, (dtype, _) in stored.items():
        if dtype.startswith("F8"):
            raise ValueError(
                f"{folder} is an FP8 checkpoint ({name} is stored as {dtype}), which this code "
                "cannot read; get the original in bfloat16"
            )


def dtype_fault(dtype: str) -> str:
    """What is wrong with a weight that is stored as `dtype`; empty if nothing is."""
    return "" if dtype in FLOATS else f"is stored as {dtype}, not as one of {', '.join(FLOATS)}"


def first_few(findings: list[str], most: int = 4) -> str:
    """The first few of `findings` in one line, and how many more there are."""
    more = f" and {len(findings) - most} more" if len(findings) > most else ""
    return "; ".join(findings[:most]) + more
