"""What makes training fast outside the experts (fused_experts.py): Liger's kernels for norms,
rotary embedding and SwiGLU; its cross-entropy fused with the head, so that the logits of 102,400
columns are never stored, nor computed for positions that no label asks for; and adapters of linear
layers in fewer passes over memory.

They take sequences of any length without compiling again. The plain twins are the modules' own
`forward`, which they replace in one model, and the loss over logits in modeling_deepseek.py.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    eager_attention_forward,
)

from .modeling_deepseek import DeepseekForCausalLM, DeepseekMLP


def accelerate(model: nn.Module) -> None:
    """Changes how `model`, PEFT's or not, is computed on a GPU, and nothing of what.

    Not for weights that ZeRO-3 divides: they are whole only inside their modules.
    """
    forwards = {LlamaRMSNorm: _norm, LlamaAttention: _attention, DeepseekMLP: _mlp}
    for module in model.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, nn.Linear):
            module.forward = MethodType(_low_rank, module)
        if isinstance(module, DeepseekForCausalLM) and isinstance(module.lm_head, nn.Linear):
            module.linear_loss = linear_cross_entropy


def _norm(self: LlamaRMSNorm, hidden_BLD: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: the gradient that it would overwrite may be another's too.
    return liger_rms_norm(hidden_BLD, self.weight, self.variance_epsilon, in_place=False)


def _mlp(self: DeepseekMLP, hidden_BLD: torch.Tensor, routing: Any = None) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(hidden_BLD), self.up_proj(hidden_BLD)))


def _attention(
    self: LlamaAttention,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`LlamaAttention.forward` but for the rotation."""
    from liger_kernel.transformers.functional import liger_rope

    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q_BHLD, k_BHLD, v_BHLD = (
        linear(hidden_states).view(heads).transpose(1, 2)
        for linear in (self.q_proj, self.k_proj, self.v_proj)
    )
    q_BHLD, k_BHLD = liger_rope(q_BHLD, k_BHLD, *position_embeddings)
    if past_key_values is not None:
        k_BHLD, v_BHLD = past_key_values.update(k_BHLD, v_BHLD, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )
    dropout = self.attention_dropout if self.training else 0.0
    out_BLHD, weights = attend(
        self, q_BHLD, k_BHLD, v_BHLD, attention_mask,
        dropout=dropout, scaling=self.scaling, **kwargs,
    )  # fmt: skip
    return self.o_proj(out_BLHD.flatten(-2).contiguous()), weights


def _low_rank(self: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's forward of a linear layer, in fewer passes: one adapter's product is added by the
    product itself, with B scaled before, and in the dtype of the layer from the start."""
    names = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(names) != 1 or self.lora_variant:
        return type(self).forward(self, x, *args, **kwargs)
    out, (name,) = self.base_layer(x), names
    a_RI = self.lora_A[name].weight.to(out.dtype)
    b_OR = (self.lora_B[name].weight * self.scaling[name]).to(out.dtype)
    low = F.linear(self.lora_dropout[name](x.to(out.dtype)), a_RI)
    return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), b_OR.T).view_as(out)


def linear_cross_entropy(
    hidden_BLD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BL: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The loss of transformers' `ForCausalLMLoss` over hidden @ weight^T: labels are shifted here,
    -100 is not counted; the sum over `num_items_in_batch`, or the mean."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    next_T = F.pad(labels_BL, (0, 1), value=-100)[:, 1:].flatten()
    asked_N = (next_T != -100).nonzero().flatten()
    if not len(asked_N):  # a part of a step in which nothing is trained
        return hidden_BLD.sum() * 0.0
    device = hidden_BLD.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_BLD.dtype
    hidden_ND = hidden_BLD.flatten(0, 1)[asked_N].to(dtype)
    total = liger_fused_linear_cross_entropy(
        hidden_ND,
        weight_VD.to(dtype),
        next_T[asked_N],
        reduction="sum",
        # The head's gradient is a sum over pieces of the batch: bf16 would round it each time, and
        # each reads and writes all of it, so that fewer, larger pieces are faster.
        accum_dtype=torch.float32,
        chunk_mem_const=4,
    )
    count = len(asked_N) if num_items_in_batch is None else num_items_in_batch
    return total / count
