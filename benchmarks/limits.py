"""What no way of computing this model can beat.

Bytes and operations follow from the config; how fast the machine reads and multiplies is measured.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import median_seconds

from deepseek_moe import DeepseekConfig
from deepseek_moe.kernels.int_weights import GROUP, HEAD_BITS


class LayerNumbers(NamedTuple):
    """How many numbers the weights of a layer have."""

    kv: int  # key and value projections
    dense: int  # query and output projections, dense or shared experts
    small: int  # router and norms, which are never quantised
    expert: int  # one routed expert


def layer_numbers(config: DeepseekConfig, i: int) -> LayerNumbers:
    """Of layer `i`."""
    D, F = config.hidden_size, config.moe_intermediate_size
    kv = 2 * D * config.num_key_value_heads * config.head_dim
    if not config.is_moe_layer(i):
        return LayerNumbers(kv, 2 * D * D + 3 * D * config.intermediate_size, 2 * D, 0)
    shared = 3 * D * F * (config.n_shared_experts or 0)
    return LayerNumbers(kv, 2 * D * D + shared, D * config.n_routed_experts + 2 * D, 3 * D * F)


def distinct_experts(config: DeepseekConfig, tokens: int) -> float:
    """The expected number of a layer's experts that at least one of `tokens` tokens chooses.

    Each token chooses evenly and independently: E (1 - (1 - K / E)^tokens).
    """
    E, K = config.n_routed_experts, config.num_experts_per_tok
    return E * (1 - (1 - K / E) ** tokens)


def step_bytes(
    config: DeepseekConfig, batch: int, length: float, itemsize: int = 2, bits: int | None = None
) -> float:
    """Bytes that one step of `batch` sequences must read.

    These are every weight once that some token needs, and the keys and values of `length` positions
    of each sequence. `itemsize` is the bytes of a number of the model's dtype, `bits` the size of a
    quantised weight.
    """
    each = itemsize if bits is None else bits / 8 + itemsize / GROUP
    head = itemsize if bits is None else HEAD_BITS / 8 + itemsize / GROUP
    read = config.vocab_size * config.hidden_size * head + config.hidden_size * itemsize
    for i in range(config.num_hidden_layers):
        layer = layer_numbers(config, i)
        experts = layer.expert * distinct_experts(config, batch) if layer.expert else 0
        read += (layer.kv + layer.dense + experts) * each + layer.small * itemsize
    kv_heads, layers = config.num_key_value_heads, config.num_hidden_layers
    return read + batch * length * 2 * kv_heads * config.head_dim * itemsize * layers


def prompt_flops(config: DeepseekConfig, lengths: list[int]) -> float:
    """Operations that fill the cache with prompts of these lengths and score the next tokens.

    A product and its sum are 2. Only the last tokens need the head, and more than keys and values
    of the last layer. Position p attends to p + 1 positions.
    """
    layers = [layer_numbers(config, i) for i in range(config.num_hidden_layers)]
    K, D = config.num_experts_per_tok or 0, config.hidden_size
    rest = [n.dense + n.small - 2 * D + K * n.expert for n in layers]
    each_token = sum(n.kv for n in layers) + sum(rest[:-1])
    each_prompt = rest[-1] + config.vocab_size * D
    seen = sum((len(layers) - 1) * L * (L + 1) / 2 + L for L in lengths)
    return 2 * (each_token * sum(lengths) + each_prompt * len(lengths)) + 4 * D * seen


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a product of a large matrix and a vector reads.

    It is the best of torch's ways and of this repository's kernel. The matrices are far larger than
    the caches and take turns.
    """
    on_gpu = device.type == "cuda"
    rows, dtype = (2**19, torch.bfloat16) if on_gpu else (2**13, torch.float32)
    matrices = [torch.randn(rows, 2048, device=device, dtype=dtype) for _ in range(2)]
    x, long_x = (torch.randn(n, device=device, dtype=dtype) for n in (2048, 8192))
    ways: list[Callable[[torch.Tensor], object]] = [
        lambda matrix: torch.mv(matrix, x),
        lambda matrix: torch.mv(matrix.view(-1, 8192), long_x),
    ]
    if on_gpu:
        from deepseek_moe.kernels.decode import triton_ops
        from deepseek_moe.kernels.int_weights import Weight

        ways.append(lambda matrix: triton_ops.linear(x[None], Weight(matrix)))
    turns = 8 * matrices  # so that one wait for the GPU is nothing beside them
    read = sum(matrix.nbytes for matrix in turns)
    with torch.inference_mode():
        return max(
            read / median_seconds(lambda way=way: [way(matrix) for matrix in turns], device)
            for way in ways
        )


def product_rate(device: torch.device) -> float:
    """Operations a second of a square matrix product, in bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 10 * 2 * n**3 / median_seconds(lambda: [a @ b for _ in range(10)], device)
