"""What makes training fast outside the experts (fused_experts.py): Liger's kernels for norms,
rotary embedding and SwiGLU; its cross-entropy fused with the head, so that the logits of 102,400
columns are never stored, nor computed for positions that no label asks for; and adapted linear
layers in fewer passes over memory (fused_lora.py).

They take sequences of any length without compiling again. The plain twins are the modules' own
`forward`, which they replace in one model, and the loss over logits in modeling_deepseek.py.
"""

from types import MethodType
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    eager_attention_forward,
)

from ...model.modeling_deepseek import DeepseekForCausalLM, DeepseekMLP
from .fused_lora import linears
from .grouped_experts import compute_dtype


def use_fused_forwards(model: nn.Module) -> None:
    """Changes how `model`, PEFT's or not, is computed on a GPU, and nothing of what (but that
    adapters which share an input share what drops out of it).

    Weights that ZeRO-3 divides are used inside their own modules only, where they are whole.
    """
    forwards = {LlamaRMSNorm: _norm, LlamaAttention: _attention, DeepseekMLP: _mlp}
    for module in model.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
        if isinstance(module, DeepseekForCausalLM):
            heads = _heads(module.lm_head)
            module.head_has_loss = bool(heads)
            for head in heads:
                head.forward = MethodType(_head, head)
    model.train(model.training)  # all of it, for PEFT's part and the rest may differ
    model.train = MethodType(_train, model)


def _heads(head: nn.Module) -> list[nn.Linear]:
    """The head, and its copy that trains, if any; empty if it has an adapter."""
    heads = [head]
    if isinstance(head, ModulesToSaveWrapper):  # which passes all arguments on
        heads = [head.original_module, *head.modules_to_save.values()]
    return heads if all(isinstance(one, nn.Linear) for one in heads) else []


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Without a walk through thousands of modules where it changes nothing: at each step."""
    return self if self.training == mode else type(self).train(self, mode)


def _norm(self: LlamaRMSNorm, hidden_BLD: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: the gradient that it would overwrite may be another's too.
    return liger_rms_norm(hidden_BLD, self.weight, self.variance_epsilon, in_place=False)


def _mlp(self: DeepseekMLP, hidden_BLD: torch.Tensor, routing: Any = None) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    gate, up = linears(hidden_BLD, self.gate_proj, self.up_proj)
    return linears(liger_swiglu(gate, up), self.down_proj)[0]


def _attention(
    self: LlamaAttention,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`LlamaAttention.forward` but for the rotation and the linear layers."""
    from liger_kernel.transformers.functional import liger_rope

    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q_BHLD, k_BHLD, v_BHLD = (
        out.view(heads).transpose(1, 2)
        for out in linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
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
    return linears(out_BLHD.flatten(-2).contiguous(), self.o_proj)[0], weights


def _head(
    self: nn.Linear, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """Logits, or the loss of `labels_BL`."""
    if labels_BL is None:
        return F.linear(hidden_BLD, self.weight)
    return linear_cross_entropy(hidden_BLD, self.weight, labels_BL, **kwargs)


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
    if not len(asked_N):  # a part of a step in which nothing is trained; all have gradients still
        return (hidden_BLD.sum() + weight_VD.sum()) * 0.0
    dtype = compute_dtype(hidden_BLD)
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
