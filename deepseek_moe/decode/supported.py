"""Which models the engine computes, and how it notices that one has changed.

The decoder (decoder.py) calls no module of the model. It reads their weights and numbers once, and
computes by itself what their forwards would. So it takes a model only if it knows every module in
it, and what it has read holds only as long as the model's signature stays the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ..model.modeling_deepseek import (
    DeepseekDecoderLayer,
    DeepseekExperts,
    DeepseekForCausalLM,
    DeepseekGate,
    DeepseekMLP,
    DeepseekModel,
    DeepseekMoE,
)
from .decoder import as_one
from .int_quantizer import QuantizedExperts, QuantizedLinear

SUPPORTED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (),
    nn.Embedding: ("max_norm",),
    nn.ModuleList: (),
    nn.SiLU: (),
    SiLUActivation: (),
    QuantizedLinear: ("bits",),
    QuantizedExperts: ("bits",),
    LlamaAttention: ("head_dim", "scaling", "is_causal"),
    LlamaRMSNorm: ("variance_epsilon",),
    LlamaRotaryEmbedding: ("rope_type", "attention_scaling"),
    DeepseekGate: ("top_k", "norm_topk_prob"),
    DeepseekExperts: (),
    DeepseekMLP: (),
    DeepseekMoE: (),
    DeepseekDecoderLayer: (),
    DeepseekModel: (),
    DeepseekForCausalLM: (),
}
"""The modules that the decoder knows, and what their forwards compute with besides tensors."""
FORWARDS = {kind: kind.forward for kind in SUPPORTED}
HARMLESS = "transformers.utils.output_capturing"
"""Hooks of this module are allowed. transformers adds them when it is asked for hidden states, and
they change no result."""
CONFIG = ("vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads",
          "num_key_value_heads")  # fmt: skip
"""The fields of the config that the engine and the decoder read."""


def signature_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that the engine was built from, to be compared with what is there at a later call.

    It tells apart: modules (also their names and order), replaced forwards, hooks, numbers in
    modules and in the config, and which memory each tensor has. A change of the numbers in that
    memory, as an optimizer makes it, leaves the signature as it is, and the engine reads the new
    ones.

    It names memory by its address. So whoever keeps a signature must keep the tensors too (see
    `tensors_of`), or their addresses may be given to others. The modules are kept by it.
    """
    config = getattr(model, "config", None)
    numbers = tuple(getattr(config, field, None) for field in CONFIG)
    modules = [(name, *_signature_of_one(module)) for name, module in model.named_modules()]
    return [(numbers, _global_hooks()), *modules]


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """The memory of all parameters and buffers, which stays allocated while this list is kept."""
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def _signature_of_one(module: nn.Module) -> tuple[Any, ...]:
    found: list[Any] = [module, _is_foreign(module)]
    for name in SUPPORTED.get(type(module), ()):
        found.append(getattr(module, name))
    for tensor in module._parameters.values():
        if type(tensor) is nn.Parameter:
            found += (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        else:  # none, or some library's own kind, which may have no address
            found.append(type(tensor))
    for buffer in module._buffers.values():
        found.append(type(buffer))
        if type(buffer) is torch.Tensor:
            found += (buffer.data_ptr(), buffer.shape, buffer.dtype, buffer.device)
            if not buffer.is_inference():  # the decoder keeps what it has computed from the numbers
                found.append(buffer._version)
    return tuple(found)


def _is_foreign(module: nn.Module) -> bool:
    """Whether to call `module` is, or may be, something else than the decoder computes for it."""
    kind = type(module)
    if FORWARDS.get(kind) is not kind.forward or "forward" in vars(module):
        return True
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != HARMLESS for hook in hooks)


def _global_hooks() -> bool:
    """Whether torch calls hooks at every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def unknown_in(model: PreTrainedModel) -> str | None:
    """Describes the first thing in `model` that the decoder does not compute.

    Returns None if there is nothing: no adapter, hook, replaced forward, sharded or otherwise
    quantised weight, and all sizes fit each other.
    """
    return next(_all_unknown(model), None)


def _all_unknown(model: PreTrainedModel) -> Iterator[str]:
    if not isinstance(model, DeepseekForCausalLM):
        yield f"it is a {type(model).__name__}"
    if _global_hooks():
        yield "torch has hooks for all modules"
    for name, module in model.named_modules():
        if type(module) not in SUPPORTED:
            yield f"{name} is a {type(module).__module__}.{type(module).__name__}"
        elif _is_foreign(module):
            yield f"{name or 'the model'} has a hook or another forward"
    for name, p in model.named_parameters():
        if type(p.data) is not torch.Tensor or p.numel() == 0:
            yield f"{name} is not stored whole, as a plain tensor"
        elif p.device != model.device or p.dtype not in (model.dtype, torch.int32):
            yield f"{name} is {p.dtype} on {p.device}"
    rows = {len(model.lm_head.weight), len(model.model.embed_tokens.weight)}
    if rows != {model.config.vocab_size}:
        yield f"embedding or head do not have {model.config.vocab_size} rows, as the config says"
    # From here on all modules are of the known kinds, or the caller has stopped.
    for name, module in model.named_modules():
        if not _is_as_assumed(module, model):
            yield f"{name} has numbers or memory that the engine does not take"


def _is_as_assumed(module: nn.Module, model: DeepseekForCausalLM) -> bool:
    config = model.config
    match module:
        case nn.Linear() | QuantizedLinear():
            return module.bias is None
        case nn.Embedding():
            return module.max_norm is None
        case LlamaRMSNorm():
            return module.variance_epsilon == model.model.norm.variance_epsilon
        case LlamaRotaryEmbedding():
            return module.rope_type in ("default", "linear")
        case DeepseekMoE():
            return module.shared_experts is not None
        case DeepseekMLP():
            return _can_be_one(module.gate_proj, module.up_proj)
        case LlamaAttention():
            q, k, v, width = module.q_proj, module.k_proj, module.v_proj, config.head_dim
            heads = [len(linear.weight) / width for linear in (q, k, v)]
            few = config.num_key_value_heads
            return (
                (module.head_dim, module.scaling, module.is_causal) == (width, width**-0.5, True)
                and heads == [config.num_attention_heads, few, few]
                and _can_be_one(q, k, v)
            )
    return True


def _can_be_one(*linears: nn.Module) -> bool:
    """Whether the decoder may lay their weights side by side.

    It must not tear one out of a larger tensor. Such a tensor is somebody's who writes into it: of
    DeepSpeed's ZeRO, for example, whose steps would not reach the model any more.
    """
    if len({(type(one), getattr(one, "bits", None)) for one in linears}) != 1:
        return False
    for name in ("weight", "weight_scale"):
        tensors = [getattr(one, name).data for one in linears if hasattr(one, name)]
        whole = sum(tensor.nbytes for tensor in tensors)  # of an engine before, or a part of it
        sizes = [(tensor.untyped_storage().nbytes(), tensor.nbytes) for tensor in tensors]
        torn = any(memory not in (own, whole) for memory, own in sizes)
        if torn and as_one(tensors) is None:
            return False
    return True


def is_supported(model: PreTrainedModel) -> bool:
    """Whether the kernels compute all that `model` does: the decoder does, and the sizes are some
    that the kernels take."""
    config = model.config
    return (
        unknown_in(model) is None
        and config.head_dim in (32, 64, 128)
        and config.hidden_size % 64 == config.moe_intermediate_size % 8 == 0
    )
