"""From a folder or a hub id to a model that is ready to generate, and its tokenizer.

transformers' `from_pretrained` loads the weights. This module first refuses those that are broken
or do not fit into memory.
"""

import math
import sys

import torch

from ..checkpoint import DTYPES, find_checkpoint, own_tokenizer, read_config
from ..checksums import verified_meanwhile
from ..errors import UserError, as_user_error
from ..memory import free_memory
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import official_tensors, weight_files
from ..model.modeling_deepseek import DeepseekForCausalLM
from ..model.tokenization_deepseek import DeepseekTokenizer
from .compile_ahead import compile_ahead
from .int_quantizer import BITS, IntConfig, quantized_bytes

CONTEXT = 4096  # tokens for whose cache `auto` leaves room
WORK = 0.8e9
"""Bytes that `auto` leaves for what a step or a prompt takes, and for gaps between tensors."""


def load(
    model: str, dtype: str = "auto", device: str = "auto", quantization: str | None = None
) -> tuple[DeepseekForCausalLM, DeepseekTokenizer]:
    """The model, ready to generate, and its tokenizer. Nothing of the checkpoint is executed.

    Args:
        model: a folder in the official layout, or a hub id.
        dtype: float32, bfloat16, float16; auto takes the checkpoint's on a GPU. On a CPU auto takes
            float32 (faster there than bfloat16 on most) if it fits, else bfloat16.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        quantization: int8 or int4 quantises the weights of the layers while they are read
            (int_quantizer.py), and the head to int8; None leaves them as they are. auto takes the
            first of None, int8 and int4 that fits (`pick_quantization`), and says so on stderr.

    Raises:
        UserError: an argument or the checkpoint cannot be used, or memory is too small.
    """
    if quantization == "auto":
        quantization = pick_quantization(model, dtype, device)
    if quantization is not None and quantization not in BITS:
        raise UserError(f"quantization {quantization} is unknown; use auto, {' or '.join(BITS)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is unknown; use auto, {', '.join(DTYPES)}")
    folder = find_checkpoint(model)
    place = _device(device)
    config = read_config(folder)
    tokenizer = own_tokenizer(folder)  # first, since the weights take longer
    number_type = _choose_dtype(dtype, place, config, quantization)
    bits = BITS[quantization] if quantization else None
    threads = compile_ahead(config, number_type, bits, place)
    unread = as_user_error(f"{folder} cannot be loaded", "get the checkpoint anew")
    with unread, verified_meanwhile(weight_files(folder)):
        network = DeepseekForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=number_type,
            device_map=place,
            use_safetensors=True,
            quantization_config=IntConfig(bits) if bits else None,
        )
    if threads:
        threads.shutdown()
    return network.eval(), tokenizer


def pick_quantization(model: str, dtype: str = "auto", device: str = "auto") -> str | None:
    """None, int8 or int4: the first with which the weights, the cache of CONTEXT tokens and WORK
    fit into the free memory (memory.py), and int4 if none does. It is said on stderr.

    Raises:
        UserError: as for `load`.
    """
    folder, place = find_checkpoint(model), _device(device)
    config, free = read_config(folder), free_memory(place)
    stored = DTYPES.get(dtype) or config.dtype or torch.bfloat16
    positions = min(CONTEXT, config.max_position_embeddings)
    heads = config.num_hidden_layers * config.num_key_value_heads
    cache = 2 * positions * heads * config.head_dim * stored.itemsize
    for picked in (None, *BITS):
        size = _bytes_of_weights(config, picked, stored)
        if size + cache + WORK <= free:
            break
    name = picked or f"none, {str(stored).removeprefix('torch.')}"
    print(
        f"quantization: {name}, {size / 1e9:.2f} GB of weights; {place} has {free / 1e9:.1f} GB "
        f"free, of which {positions} tokens take {cache / 1e9:.2f}",
        file=sys.stderr,
    )
    return picked


def _bytes_of_weights(config: DeepseekConfig, quantization: str | None, dtype: torch.dtype) -> int:
    numbers = sum(math.prod(shape) for _, shape in official_tensors(config))
    if quantization is None:
        return numbers * dtype.itemsize
    return quantized_bytes(numbers, config, BITS[quantization], dtype)


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    mps = int(torch.backends.mps.is_available())
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": mps}.get(place.type)
    if found is None:
        raise UserError(f"device {device} is unknown; use auto, cpu or cuda")
    if (place.index or 0) >= found:
        raise UserError(f"device {device} was asked for, but {found} GPUs were found; use cpu")
    return torch.device("cuda", place.index or 0) if place.type == "cuda" else place


def _choose_dtype(
    dtype: str, device: torch.device, config: DeepseekConfig, quantization: str | None
) -> torch.dtype:
    """The dtype of that name, or what `load` says of auto.

    Raises:
        UserError: the weights do not fit into the free memory of `device`.
    """

    def size(number_type: torch.dtype) -> int:
        return _bytes_of_weights(config, quantization, number_type)

    free = free_memory(device)
    if dtype != "auto":
        chosen = DTYPES[dtype]
    elif device.type == "cpu":
        chosen = torch.float32 if size(torch.float32) < free else torch.bfloat16
    else:
        chosen = config.dtype or torch.bfloat16
    if size(chosen) > free:
        smaller = "" if quantization else "--dtype bfloat16, --quantization int4, "
        stored_as = quantization or str(chosen).removeprefix("torch.")
        raise UserError(
            f"the weights need {size(chosen) / 1e9:.1f} GB as {stored_as}, but {device} has "
            f"{free / 1e9:.1f} GB free; use {smaller}another device, or a smaller model"
        )
    return chosen
