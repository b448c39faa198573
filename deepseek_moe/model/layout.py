"""The tensors of a checkpoint: their names on disk and in memory, and whether all are there."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig
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

FIRST_FEW = 4  # findings are named in one line

# How a weight may be stored, in the words of safetensors headers. transformers would cast anything
# else without a warning: integers and booleans become zeros and ones.
FLOATS = ("F64", "F32", "BF16", "F16")


def official_parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields the official names of a parameter in memory, each with its index in that parameter: ()
    for one that is stored as it is, else (expert, rows)."""
    *_, stack = name.rpartition(".")
    if stack not in EXPERT_STACKS:
        yield name, ()
        return
    matrices = EXPERT_STACKS[stack]
    prefix, rows = name.removesuffix(stack), shape[1] // len(matrices)
    for expert in range(shape[0]):
        for number, matrix in enumerate(matrices):
            where = expert, slice(number * rows, (number + 1) * rows)
            yield f"{prefix}{expert}.{matrix}.weight", where


def stack_official_experts(
    experts: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Lets `load_state_dict` take experts by their official names, as they stand in files.

    It is a pre-hook of torch's `load_state_dict`, which passes True as `strict`, whatever its
    caller asked for. Trainers and scripts hand the content of files to that method, some of them
    file by file: the experts that are there are filled, and the others are reported as missing.
    With `assign`, the stack takes the dtype and device of the given tensors, as torch's own
    parameters do. Of a stack on meta, experts that no file has filled yet are NaN.

    Raises:
        ValueError: the state dict is an adapter with LoRA on the linears of single experts.
    """
    own = [name for name in state_dict if name.startswith(prefix)]
    refuse_adapters_of_experts(own)
    assign = local_metadata.get("assign_to_params_buffers", False)
    for stack in EXPERT_STACKS:
        parameter = getattr(experts, stack)
        if parameter.dim() != 3:  # divided by DeepSpeed's ZeRO-3; torch says what is missing
            continue
        places = dict(official_parts(f"{prefix}{stack}", tuple(parameter.shape)))
        given = next((state_dict[name] for name in places if name in state_dict), None)
        if given is None:
            continue
        like = {"dtype": given.dtype, "device": given.device}
        if parameter.is_meta:
            filled = torch.full(parameter.shape, math.nan, **like)
        else:
            filled = parameter.detach().to(copy=True, **(like if assign else {}))
        for name, where in places.items():
            if name not in state_dict:
                missing_keys.append(name)
                continue
            tensor, place = state_dict.pop(name), filled[where]
            if tensor.shape == place.shape:
                place.copy_(tensor)
            else:
                error_msgs.append(
                    f"size mismatch for {name}: it has shape {list(tensor.shape)}, the model wants "
                    f"{list(place.shape)}."
                )
        state_dict[f"{prefix}{stack}"] = filled


def refuse_adapters_of_experts(names: Iterable[str]) -> None:
    """Refuses LoRA on experts for which the model has no place. PEFT would leave it out, silently.

    Such adapters come from transformers 4, where each expert had linears of its own.

    Args:
        names: tensors that belong to no parameter of the model.

    Raises:
        ValueError: one of them is LoRA on an expert.
    """
    for name in names:
        if re.search(r"(^|\.)experts\.(.*\.)?lora_", name):
            raise ValueError(
                "this adapter has LoRA on the linears of single experts, for which stacked experts "
                "have no place; merge it into its base: python -m deepseek_moe.export --model BASE "
                "--adapter ADAPTER --output FOLDER"
            )


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files that transformers would read from `folder`; some may be missing.

    Their names begin with `stem`. A file may be a link to anywhere, as in the hub's cache.

    Raises:
        ValueError: the index is broken, or names what is no safetensors file inside of `folder`.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file() or not index.is_file():
        return [folder / f"{stem}.safetensors"]
    try:
        fields = json.loads(index.read_text(encoding="utf-8"))
        names = set(fields["weight_map"].values())
        dict(fields.get("metadata") or {})  # which transformers fills
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weight files") from error
    for name in names:
        path = PureWindowsPath(str(name))  # it knows the separators of all systems
        named = isinstance(name, str) and name.isprintable() and len(name.encode()) < 256
        if not named or path.anchor or ".." in path.parts or path.suffix != ".safetensors":
            raise ValueError(f"{index} names {str(name)[:80]!r}, no weight file in its folder")
    if not names:
        raise ValueError(f"{index} names no weight file")
    return [folder / name for name in sorted(names)]


def refuse_wrong_checkpoint(
    path: str | Path,
    kwargs: dict[str, Any],
    config_class: type[PreTrainedConfig],
    free: tuple[str, ...] = (),
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
        config = config_class.from_pretrained(config or Path(found).parent)
    if getattr(config, "transformers_weights", None) is not None:
        raise ValueError(
            f"{found} names weights of its own ({config.transformers_weights}), which may be a "
            "pickle; take transformers_weights out"
        )
    refuse_wrong_tensors(Path(found).parent, config, free)


def refuse_wrong_tensors(
    folder: Path, config: PreTrainedConfig, free: tuple[str, ...] = ()
) -> None:
    """Compares the headers of the safetensors files in `folder` with what `config` wants.

    No model is built. Whatever sizes the config claims, the first few tensors that are not as it
    says end the comparison. Tensors whose names begin with one of `free` are not compared. A bare
    `DeepseekModel`, whose names do not begin with "model.", needs no head.

    Raises:
        ValueError: names the tensors that are missing, surplus, of another shape or no floats.
    """
    stored = _stored_tensors(folder)
    if not stored:
        return  # transformers says what it looked for
    for name, (dtype, _) in stored.items():
        if dtype.startswith("F8"):
            raise ValueError(
                f"{folder} is an FP8 checkpoint ({name} is stored as {dtype}), which this code "
                "cannot read; get the original in bfloat16"
            )
    found = {name: shape for name, (_, shape) in stored.items() if not name.startswith(free)}
    is_bare = not any(name.startswith("model.") for name in stored)
    wanted, wrong = set(), []
    for name, shape in official_tensors(config):
        name = name.removeprefix("model.") if is_bare else name
        if name.startswith(free) or (is_bare and name == "lm_head.weight"):
            continue
        wanted.add(name)
        if found.get(name) != shape:
            is_there = f"has shape {list(found[name])}" if name in found else "is missing"
            wrong.append(f"{name} {is_there}, the config wants {list(shape)}")
            if len(wrong) == FIRST_FEW:
                break
    if not wrong:  # else `wanted` may not be whole
        faults = ((name, dtype_fault(dtype)) for name, (dtype, _) in stored.items())
        wrong = [f"{name} {fault}" for name, fault in faults if fault]
        is_tied = config.tie_word_embeddings
        for name in found:
            tied_head = is_tied and name == "lm_head.weight"
            if name not in wanted and not tied_head and "rotary_emb.inv_freq" not in name:
                wrong.append(f"{name} is not of this model")
        if is_tied and not wrong and not _is_tied(folder):
            wrong.append("lm_head.weight is not the embedding, though config.json ties them")
    if wrong:
        raise ValueError(f"{folder} does not hold this model: {first_few(wrong)}")


def official_tensors(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint of a causal model has on disk, in the order
    of the model's parameters."""
    D, head = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, D)
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}."
        for name, shape in (("q", (q, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, q))):
            yield f"{layer}self_attn.{name}_proj.weight", shape
            if config.attention_bias:
                yield f"{layer}self_attn.{name}_proj.bias", shape[:1]
        if config.is_moe_layer(number):
            F, experts = config.moe_intermediate_size, range(config.n_routed_experts)
            yield f"{layer}mlp.gate.weight", (config.n_routed_experts, D)
            for expert in experts:
                yield f"{layer}mlp.experts.{expert}.gate_proj.weight", (F, D)
                yield f"{layer}mlp.experts.{expert}.up_proj.weight", (F, D)
            for expert in experts:
                yield f"{layer}mlp.experts.{expert}.down_proj.weight", (D, F)
            mlp, width = "mlp.shared_experts", F * (config.n_shared_experts or 0)
        else:
            mlp, width = "mlp", config.intermediate_size
        if width:
            yield f"{layer}{mlp}.gate_proj.weight", (width, D)
            yield f"{layer}{mlp}.up_proj.weight", (width, D)
            yield f"{layer}{mlp}.down_proj.weight", (D, width)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{norm}.weight", (D,)
    yield "model.norm.weight", (D,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, D)


def _is_tied(folder: Path) -> bool:
    """Whether the files hold no head but the embedding. Another one would be lost in a save."""
    ends: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = {"lm_head.weight", "model.embed_tokens.weight"} & set(tensors.keys())
            ends |= {name: tensors.get_tensor(name).float() for name in names}
    return len(ends) < 2 or torch.equal(*ends.values())


def _stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor, from the files' headers; nothing if a file is missing."""
    files, stored = weight_files(folder), {}
    if not all(file.is_file() for file in files):
        return {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    header = tensors.get_slice(name)
                    stored[name] = (header.get_dtype(), tuple(header.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is truncated or corrupt ({error})") from error
    return stored


def dtype_fault(dtype: str) -> str:
    """What is wrong with a weight that is stored as `dtype`; empty if nothing is."""
    return "" if dtype in FLOATS else f"is stored as {dtype}, not as one of {', '.join(FLOATS)}"


def first_few(findings: list[str]) -> str:
    """The first few of `findings` in one line, and how many more there are."""
    more = f" and {len(findings) - FIRST_FEW} more" if len(findings) > FIRST_FEW else ""
    return "; ".join(findings[:FIRST_FEW]) + more
