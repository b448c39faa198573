"""Compiles the kernels of decoding while the weights are read.

Compiling takes seconds a kernel, and one after another the kernels would be compiled where a text
first needs them. What is compiled depends on sizes and types only. So a model of few layers without
weights goes through the decoder here, which notes the kernels, and threads compile them: most of it
is done outside of Python.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..kernels import has_triton
from ..kernels.int_weights import words_and_groups
from ..model.configuration_deepseek import DeepseekConfig
from ..model.modeling_deepseek import DeepseekForCausalLM
from .decoder import Decoder, StaticCache
from .int_quantizer import replace_quantized
from .supported import fits_kernels

if TYPE_CHECKING:
    from ..kernels.plan import Launch

PROMPTS = (8, 32, 64, 128)
"""Lengths of prompts, from each of which on attention has larger tiles; others of up to 200 tokens
take the same kernels."""
CAPACITY = 1024  # as other capacities, a multiple of 16, which is what a kernel is compiled for
THREADS = 16
LOADING = Lock()


def compile_ahead(
    config: DeepseekConfig, dtype: torch.dtype, bits: int | None, device: torch.device
) -> ThreadPoolExecutor | None:
    """Begins to compile what a short prompt and the steps after it launch on the GPU `device`.

    Args:
        bits: of quantised weights, else None.

    Returns:
        The threads, whose `shutdown` waits for the last kernel; None if none is to be compiled.
    """
    takes = dtype in (torch.bfloat16, torch.float16) and fits_kernels(config)
    if device.type != "cuda" or not has_triton() or not takes:
        return None
    threads = ThreadPoolExecutor(THREADS)
    with suppress(Exception):  # A model that the decoder does not take says so elsewhere.
        for launch in launches_of(config, dtype, bits).values():
            threads.submit(_compile, launch, device)
    return threads


def _compile(launch: "Launch", device: torch.device) -> None:
    kernel, grid, args, options = launch
    # What cannot be compiled here will be reported where it is launched.
    with suppress(Exception), torch.cuda.device(device):
        compiled = kernel.warmup(*args, grid=grid, **options)
        # Triton 3.6 compiles a module of C for each kernel, which starts it, and all of these have
        # one name. Where two are loaded at once, a kernel may be given the module of the other.
        with LOADING:
            _ = compiled.run  # which loads it


def kind_of(launch: "Launch") -> tuple[Any, ...]:
    """What a kernel is compiled for: the types of its arguments, and what Triton asks of integers.

    Addresses count too. Those here are multiples of 16, as are all that the decoder makes.
    """
    kernel, _, args, options = launch

    def kind(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.dtype
        return (x == 1, x % 16 == 0) if isinstance(x, int) else type(x)

    return kernel, *map(kind, args), *options.items()


@torch.inference_mode()
def launches_of(
    config: DeepseekConfig, dtype: torch.dtype, bits: int | None
) -> "dict[tuple[Any, ...], Launch]":
    """One launch of each kind, of those in prompts and in a step of one token."""
    from ..kernels.decode import triton_ops
    from ..kernels.plan import planned

    fields = config.to_dict()
    # The last layer of a prompt takes its last token only, so one with experts comes before it.
    fields["num_hidden_layers"] = min(config.num_hidden_layers, config.first_k_dense_replace + 2)
    small = DeepseekConfig(**fields)
    with torch.device("meta"):
        model = DeepseekForCausalLM(small).to(dtype)
        if bits:
            _without_words(replace_quantized(model, bits))
        token = planned.set([])
        try:
            decoder, cache = Decoder(model, triton_ops), StaticCache(model, 1, CAPACITY)
            for length in PROMPTS:
                ids, *place = torch.empty(3, length, dtype=torch.int32)
                decoder.logits(decoder.prefill(ids, *place, cache, [length], [length - 1]))
            # Two tensors: of one the second row would not begin at a multiple of 16.
            position, slot = (torch.empty(1, dtype=torch.int32) for _ in range(2))
            ids = torch.empty(1, dtype=torch.int64)
            decoder.step(ids, position, slot, cache)
            seen = torch.empty(1, small.vocab_size, dtype=torch.bool)
            triton_ops.advance(ids, ids, position, seen, CAPACITY - 1)
            launches = planned.get()
        finally:
            planned.reset(token)
    return {kind_of(launch): launch for launch in launches}


def _without_words(modules: list[nn.Module]) -> None:
    """Gives quantised modules on meta the words that they have after a checkpoint was read."""
    for module in modules:
        for name, scale in list(module.named_parameters(recurse=False)):
            if name.endswith("_scale"):
                *rows, columns = getattr(module, name.removesuffix("_scale")).shape
                words, _ = words_and_groups(columns, module.bits)
                words = scale.new_empty(*rows, words, dtype=torch.int32)
                words = nn.Parameter(words, requires_grad=False)
                setattr(module, name.removesuffix("_scale"), words)
