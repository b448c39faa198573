"""The attention implementation "varlen": inside each example of a packed row, without a mask.

It is the flash attention that comes with PyTorch for NVIDIA GPUs. Its plain twin is "sdpa" with the
mask of all positions by all others that transformers derives from `position_ids`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

VARLEN = "varlen"


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of query, key and value [B, heads, L, width], in bf16 or fp16.

    `cu_seq_lens_q` has the position among all B * L where each example begins, and where the last
    one ends. Without it, each row is one example. Returns [B, L, heads, width].
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    B, _, L, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    causal = (-1, 0)  # all positions to the left, none to the right
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    out = varlen_attn(query, key, value, *bounds, scale=scaling, window_size=causal)
    return out.unflatten(0, (B, L)), None


def varlen_mask(
    *, attention_mask: torch.Tensor | None, q_length: int, kv_length: int, **kwargs: Any
) -> torch.Tensor | None:
    """None in training, so that the mask of a packed row is never made. With padding or a cache, as
    when generating, it is the mask of sdpa."""
    if attention_mask is None and q_length == kv_length:
        return None
    lengths = {"q_length": q_length, "kv_length": kv_length}
    return sdpa_mask(attention_mask=attention_mask, **lengths, **kwargs)


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, varlen_mask)
