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
from transformers.models.llama import modeling_llama as llama

from ..kernels import runs_triton
from ..model import modeling_deepseek as deepseek
from ..model.configuration_deepseek import DeepseekConfig
from .decoder import joined_view
from .quantized import QuantizedExperts, QuantizedLinear

SUPPORTED_MODULES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (),
    nn.Embedding: ("max_norm",),
    nn.ModuleList: (),
    nn.SiLU: (),
    SiLUActivation: (),
    QuantizedLinear: ("bits",),
    QuantizedExperts: ("bits",),
    llama.LlamaAttention: ("head_dim", "scaling", "is_causal"),
    llama.LlamaRMSNorm: ("variance_epsilon",),
    llama.LlamaRotaryEmbedding: ("rope_type", "attention_scaling"),
    deepseek.DeepseekGate: ("top_k", "norm_topk_prob"),
    deepseek.DeepseekExperts: (),
    deepseek.DeepseekMLP: (),
    deepseek.DeepseekMoE: (),
    deepseek.DeepseekDecoderLayer: (),
    deepseek.DeepseekModel: (),
    deepseek.DeepseekForCausalLM: (),
}
"""The modules that the decoder knows, and what their forwards compute with besides tensors."""
FORWARDS = {kind: kind.forward for kind in SUPPORTED_MODULES}
CONFIG_FIELDS = ("vocab_size", "max_position_embeddings", "hidden_size", "num_attention_heads",
                 "num_key_value_heads")  # fmt: skip
"""The fields of the config that the engine and the decoder read."""
HARMLESS_HOOKS = "transformers.utils.output_capturing"
"""transformers leaves hooks of this module behind when it was asked for hidden states once. They
change no result, so a model with them stays supported."""


def is_supported(model: PreTrainedModel) -> bool:
    """Whether the engine takes `model`: one of this architecture, whole and as it was loaded, in
    bf16 or fp16 or int8 or int4, of sizes that the kernels take, on one NVIDIA GPU."""
    return (
        runs_triton(model.device)
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
        and model.dtype in (torch.bfloat16, torch.float16)
        and find_unsupported(model) is None
        and fits_kernels(model.config)
    )


def fits_kernels(config: DeepseekConfig) -> bool:
    """Whether the kernels take these sizes."""
    aligned = config.hidden_size % 64 == config.moe_intermediate_size % 8 == 0
    return aligned and config.head_dim in (32, 64, 128)


def find_unsupported(model: PreTrainedModel) -> str | None:
    """The first thing in `model` that the decoder does not compute, such as an adapter, a hook, a
    replaced forward, a sharded weight, or sizes that do not fit each other. None without any."""
    return next(_all_unsupported(model), None)


def signature_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that the engine was built from, to be compared with what is there at a later call.

    It tells apart modules (also their names and order), replaced forwards, hooks, numbers in
    modules and in the config, and the address of each tensor. What an optimizer changes in place
    leaves it as it is, because the engine reads that anew. Whoever keeps a signature must keep the
    tensors too, or their addresses may be given to others. It keeps the modules itself.
    """
    config = getattr(model, "config", None)
    numbers = tuple(getattr(config, field, None) for field in CONFIG_FIELDS)
    modules = [(name, *_signature_of_module(module)) for name, module in model.named_modules()]
    return [(numbers, _has_global_hooks()), *modules]


def _signature_of_module(module: nn.Module) -> Iterator[Any]:
    yield from (module, _computes_otherwise(module))
    yield from (getattr(module, name) for name in SUPPORTED_MODULES.get(type(module), ()))
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        yield type(tensor)
        if type(tensor) in (nn.Parameter, torch.Tensor):  # other kinds may have no address
            yield (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    for buffer in module.buffers(recurse=False):
        if not buffer.is_inference():  # the decoder keeps what it has computed from its numbers
            yield buffer._version


def _computes_otherwise(module: nn.Module) -> bool:
    """Whether a call of `module` computes, or may compute, something else than the decoder does."""
    kind = type(module)
    if FORWARDS.get(kind) is not kind.forward or "forward" in vars(module):
        return True
    # torch has no public list of hooks; these are in torch/nn/modules/module.py.
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != HARMLESS_HOOKS for hook in hooks)


def _has_global_hooks() -> bool:
    """Whether torch calls hooks at every module. Of these, too, it has no public list."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _all_unsupported(model: PreTrainedModel) -> Iterator[str]:
    if not isinstance(model, deepseek.DeepseekForCausalLM):
        yield f"it is a {type(model).__name__}"
    if _has_global_hooks():
        yield "torch has hooks for all modules"
    for name, module in model.named_modules():
        if type(module) not in SUPPORTED_MODULES:
            yield f"{name} is a {type(module).__module__}.{type(module).__name__}"
        elif _computes_otherwise(module):
            yield f"{name or 'the model'} has a hook or another forward"
    for name, p in model.named_parameters():
        if type(p.data) is not torch.Tensor or p.numel() == 0:
            yield f"{name} is not stored whole, as a plain tensor"
        elif p.device != model.device or p.dtype not in (model.dtype, torch.int32):
            yield f"{name} is {p.dtype} on {p.device}"
    rows = {len(model.lm_head.weight), len(model.model.embed_tokens.weight)}
    if rows != {model.config.vocab_size}:
        yield f"embedding or head do not have {model.config.vocab_size} rows, as the config says"
    # From here on all modules are of known kinds, or the caller has stopped.
    for name, module in model.named_modules():
        if not _is_as_assumed(module, model):
            yield f"{name} has numbers or memory that the engine does not take"


def _is_as_assumed(module: nn.Module, model: deepseek.DeepseekForCausalLM) -> bool:
    config = model.config
    match module:
        case nn.Linear() | QuantizedLinear():
            return module.bias is None
        case nn.Embedding():
            return module.max_norm is None
        case llama.LlamaRMSNorm():
            return module.variance_epsilon == model.model.norm.variance_epsilon
        case llama.LlamaRotaryEmbedding():
            return module.rope_type in ("default", "linear")
        case deepseek.DeepseekMLP():
            return _can_be_joined(module.gate_proj, module.up_proj)
        case llama.LlamaAttention():
            q, k, v, width = module.q_proj, module.k_proj, module.v_proj, config.head_dim
            heads = [len(linear.weight) / width for linear in (q, k, v)]
            return (
                (module.head_dim, module.scaling, module.is_causal) == (width, width**-0.5, True)
                and heads == [config.num_attention_heads] + 2 * [config.num_key_value_heads]
                and _can_be_joined(q, k, v)
            )
    return True


def _can_be_joined(*linears: nn.Module) -> bool:
    """Whether the decoder may lay their weights side by side in new memory. It must not tear one
    out of a larger tensor, whose owner, like DeepSpeed's ZeRO, writes its steps there."""
    if len({(type(one), getattr(one, "bits", None)) for one in linears}) != 1:
        return False
    for name in ("weight", "weight_scale"):
        tensors = [getattr(one, name).data for one in linears if hasattr(one, name)]
        joined = sum(tensor.nbytes for tensor in tensors)  # by an earlier engine
        torn = any(x.untyped_storage().nbytes() not in (x.nbytes, joined) for x in tensors)
        if torn and joined_view(tensors) is None:
            return False
    return True
