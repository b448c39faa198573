"""What makes training fast on a GPU outside of the routed experts.

- Norms, rotary embedding and SwiGLU are Liger's kernels.
- The head computes the loss itself by Liger's fused cross-entropy. So the logits of 102,400 columns
  are never stored, and not computed for positions without a label.
- Linear layers with adapters take fewer passes over memory (fused_lora.py).

The base class of each class below is its plain twin. transformers offers no public seam for them:
its kernel mapping needs the package `kernels`, and replaces neither the projections of
`LlamaAttention` nor a head with its loss. `FusedAttention.forward` repeats that of `LlamaAttention`
(transformers 5.24, models/llama/modeling_llama.py) apart from what it replaces;
tests/training/compute/test_liger.py fails when the original changes.
"""

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

from ...model.modeling_deepseek import CACHE, DeepseekDecoderLayer, DeepseekForCausalLM, DeepseekMLP
from .fused_lora import linears
from .grouped_experts import compute_dtype, refuse_other_than_silu


def use_fused_forwards(model: nn.Module) -> None:
    """Changes how `model`, wrapped by PEFT or not, is computed, but not what.

    The one exception: adapters that share an input also share which numbers of it drop out.

    Each module gets the class of its fused twin, as torch's own `fully_shard` does it. Weights are
    used only by their own module, where ZeRO-3 has them whole.
    """
    model.train(model.training)  # PEFT's modules may be in another mode; see FusedDecoderLayer
    for module in list(model.modules()):
        if isinstance(module, DeepseekForCausalLM):
            head = module.lm_head
            # A copy of the head trains beside adapters. A head with an adapter stays as it is.
            for part in head.modules() if isinstance(head, ModulesToSaveWrapper) else [head]:
                if type(part) is nn.Linear:
                    part.__class__ = FusedHead
        elif type(module) in FUSED:
            module.__class__ = FUSED[type(module)]


class FusedNorm(LlamaRMSNorm):
    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_rms_norm

        # Not in place: the gradient that it would overwrite may be used elsewhere.
        return liger_rms_norm(hidden_BLD, self.weight, self.variance_epsilon, in_place=False)


class FusedMLP(DeepseekMLP):
    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        refuse_other_than_silu(self)
        gate, up = linears(hidden_BLD, self.gate_proj, self.up_proj)
        return linears(liger_swiglu(gate, up), self.down_proj)[0]


class FusedAttention(LlamaAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from liger_kernel.transformers.functional import liger_rope

        cache = kwargs.pop(CACHE, None)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BHLD, k_BHLD, v_BHLD = (
            out.view(heads).transpose(1, 2)
            for out in linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHLD, k_BHLD = liger_rope(q_BHLD, k_BHLD, *position_embeddings)
        if cache is not None:
            k_BHLD, v_BHLD = cache.update(k_BHLD, v_BHLD, self.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out_BLHD, weights = attend(
            self, q_BHLD, k_BHLD, v_BHLD, attention_mask,
            dropout=dropout, scaling=self.scaling, **kwargs,
        )  # fmt: skip
        return linears(out_BLHD.flatten(-2).contiguous(), self.o_proj)[0], weights


class FusedDecoderLayer(DeepseekDecoderLayer):
    def train(self, mode: bool = True) -> "FusedDecoderLayer":
        """Does nothing if the layer is in this mode already. Trainer calls it at each step, and
        the walk through thousands of modules would take longer than many a kernel."""
        return self if self.training == mode else super().train(mode)


class FusedHead(nn.Linear):
    computes_loss = True  # `DeepseekForCausalLM.forward` asks for it

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        labels_BL: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The logits or, with labels, the loss that `ForCausalLMLoss` of transformers computes.

        Labels are shifted here, and -100 is not counted. It is the sum over `num_items_in_batch`,
        or the mean if that is None.
        """
        if labels_BL is None:
            return super().forward(hidden_BLD)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        next_T = F.pad(labels_BL, (0, 1), value=-100)[:, 1:].flatten()
        asked_N = (next_T != -100).nonzero().flatten()
        if not len(asked_N):  # a part of a step in which nothing is trained; all have gradients
            return (hidden_BLD.sum() + self.weight.sum()) * 0.0
        dtype = compute_dtype(hidden_BLD)
        total = liger_fused_linear_cross_entropy(
            hidden_BLD.flatten(0, 1)[asked_N].to(dtype),
            self.weight.to(dtype),
            next_T[asked_N],
            reduction="sum",
            # The head's gradient is a sum over pieces of the batch. bf16 would round it each time.
            # Each piece reads and writes all of it, so that fewer, larger pieces are faster.
            accum_dtype=torch.float32,
            chunk_mem_const=4,
        )
        return total / (len(asked_N) if num_items_in_batch is None else num_items_in_batch)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaRMSNorm: FusedNorm,
    LlamaAttention: FusedAttention,
    DeepseekMLP: FusedMLP,
    DeepseekDecoderLayer: FusedDecoderLayer,
}
