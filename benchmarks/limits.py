"""What no way of computing this model can beat.

Bytes and operations follow from the config; how fast the machine reads and multiplies is measured.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from tables import DEVICE
from timing import median_seconds

from deepseek_moe import DeepseekConfig
from deepseek_moe.decode.int_quantizer import HEAD_BITS
from deepseek_moe.kernels.int_weights import GROUP, Weight


class LayerNumbers(NamedTuple):
    """How many numbers the weights of a layer have."""

    kv: int  # key and value projections
    dense: int  # query and output projections, dense or shared experts
    small: int  # router and norms, which are never quantised
    expert: int  # one routed expert


def layer_numbers(config: DeepseekConfig) -> list[LayerNumbers]:
    D, F = config.hidden_size, config.moe_intermediate_size
    kv = 2 * D * config.num_key_value_heads * config.head_dim
    moe_dense, router = 2 * D * D + 3 * D * F * config.n_shared_experts, D * config.n_routed_experts
    dense = LayerNumbers(kv, 2 * D * D + 3 * D * config.intermediate_size, 2 * D, 0)
    moe = LayerNumbers(kv, moe_dense, router + 2 * D, 3 * D * F)
    return [moe if config.is_moe_layer(i) else dense for i in range(config.num_hidden_layers)]


def step_bytes(
    config: DeepseekConfig, batch: int, length: float, itemsize: int, bits: int | None
) -> float:
    """Bytes that one step of `batch` sequences must read.

    These are every weight once that some token needs, and the keys and values of `length` positions
    of each sequence. `itemsize` is the bytes of a number of the model's dtype, `bits` the size of a
    quantised weight. Each token chooses evenly and independently, so that E (1 - (1 - K / E)^batch)
    experts of a layer are expected.
    """
    each = itemsize if bits is None else bits / 8 + itemsize / GROUP
    head = itemsize if bits is None else HEAD_BITS / 8 + itemsize / GROUP
    E, K = config.n_routed_experts, config.num_experts_per_tok
    experts = E * (1 - (1 - K / E) ** batch)
    read = config.vocab_size * config.hidden_size * head + config.hidden_size * itemsize
    for n in layer_numbers(config):
        read += (n.kv + n.dense + experts * n.expert) * each + n.small * itemsize
    cached = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return read + batch * length * cached * itemsize


def prompt_flops(config: DeepseekConfig, length: int) -> float:
    """Operations that fill the cache with a prompt of `length` tokens and score the next one.

    A product and its sum are 2. Only the last token needs the head, and more than keys and values
    of the last layer. Position p attends to p + 1 positions.
    """
    layers, D = layer_numbers(config), config.hidden_size
    rest = [n.dense + n.small - 2 * D + config.num_experts_per_tok * n.expert for n in layers]
    each_token = sum(n.kv for n in layers) + sum(rest[:-1])
    last_token = rest[-1] + config.vocab_size * D
    seen = (len(layers) - 1) * length * (length + 1) / 2 + length
    return 2 * (each_token * length + last_token) + 4 * D * seen


def training_flops(config: DeepseekConfig, length: int) -> float:
    """Operations of a token's forward and backward pass: 6 for each weight that it passes, and for
    each of the (length + 1) / 2 positions that it attends to on average."""
    layers, D = layer_numbers(config), config.hidden_size
    passed = sum(n.kv + n.dense + n.small + config.num_experts_per_tok * n.expert for n in layers)
    attended = len(layers) * 2 * D * (length + 1) / 2
    return 6 * (passed + config.vocab_size * D + attended)


def read_bandwidth() -> float:
    """Bytes a second that a product of a large matrix and a vector reads.

    It is the best of torch's ways and of this repository's kernel. The matrices are far larger than
    the caches and take turns.
    """
    on_gpu = DEVICE.type == "cuda"
    options = {"device": DEVICE, "dtype": torch.bfloat16 if on_gpu else torch.float32}
    matrices = [torch.randn(2**19 if on_gpu else 2**13, 2048, **options) for _ in range(2)]
    x, long_x = torch.randn(2048, **options), torch.randn(8192, **options)
    ways: list[Callable[[torch.Tensor], object]] = [
        lambda matrix: torch.mv(matrix, x),
        lambda matrix: torch.mv(matrix.view(-1, 8192), long_x),
    ]
    if on_gpu:
        from deepseek_moe.kernels.decode import triton_ops

        ways.append(lambda matrix: triton_ops.linear(x[None], Weight(matrix)))
    turns = 8 * matrices  # so that one wait for the GPU is nothing beside them
    read = sum(matrix.nbytes for matrix in turns)
    with torch.inference_mode():
        seconds = [median_seconds(lambda way=way: [way(turn) for turn in turns]) for way in ways]
    return read / min(seconds)


def product_rate() -> float:
    """Operations a second of a square matrix product, in bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 10 * 2 * n**3 / median_seconds(lambda: [a @ b for _ in range(10)])
