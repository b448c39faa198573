"""Weights in 8 or 4 bits for decoding, where reading them is what takes the time.

A word of 32 bits holds P = 4 (int8) or 8 (int4) values of one row, a row of I columns has W = I / P
words, and value j of word w, in the bits from j * bits on, is column j * W + w: a kernel that reads
a tile of words shifts it P times and has P tiles of columns, nothing to shuffle. Values are stored
plus 2 ** (bits - 1), so never negative. GW = 64 / P words side by side, 64 values, share a scale;
the last group of a row may be smaller.

    weight [..., O, I]  ~  (stored - 2 ** (bits - 1)) * scale
    packed int32 [..., O, W], scale [..., O, G] in the weight's dtype, G = ceil(W / GW)

`unpack` and the modules here are plain, exact and slow: the reference of every kernel. The linears
of the layers and the routed experts are packed, and the head, always in 8 bits. Router, norms and
embedding are left alone, and so is a head that is the embedding (`tie_word_embeddings`).

Letters: E experts, O out, I in, R rows, P values a word, W words a row, G groups a row, T tokens,
K picks a token, D hidden.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError
from ..kernels.int_weights import GROUP, HEAD_BITS, _words_and_groups, pack, unpack
from ..model.configuration_deepseek import DeepseekConfig
from ..model.modeling_deepseek import DeepseekExperts, DeepseekForCausalLM

METHOD = "deepseek_packed"  # transformers' name for it


def _empty_packed(weight: torch.Tensor, bits: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters of the shapes that `pack(weight, bits)` returns, on its device."""
    W, G = _words_and_groups(weight.shape[-1], bits)
    packed = torch.empty(*weight.shape[:-1], W, dtype=torch.int32, device=weight.device)
    scale = torch.empty(*weight.shape[:-1], G, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(packed, requires_grad=False), nn.Parameter(scale, requires_grad=False)


class PackedLinear(nn.Module):
    """In place of `linear`: `weight` int32 [O, W] and `weight_scale` [O, G], both still empty."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.weight_scale = _empty_packed(linear.weight, bits)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, unpack(self.weight, self.weight_scale, self.bits, x.dtype), self.bias)


class PackedExperts(nn.Module):
    """In place of `experts`: int32 `gate_up_proj` [E, 2F, W] and `down_proj` [E, D, W], and their
    `gate_up_proj_scale` and `down_proj_scale`, all still empty.

    transformers' other ways through the experts (`experts_implementation`) cannot read these words
    and do not apply: `forward` is always this loop.
    """

    def __init__(self, experts: DeepseekExperts, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.gate_up_proj, self.gate_up_proj_scale = _empty_packed(experts.gate_up_proj, bits)
        self.down_proj, self.down_proj_scale = _empty_packed(experts.down_proj, bits)

    def forward(
        self, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """As `DeepseekExperts.forward`; one expert is unpacked at a time."""
        out_TD = torch.zeros_like(hidden_TD, dtype=weights_TK.dtype)
        for expert in index_TK.unique().tolist():
            token, pick = torch.where(index_TK == expert)
            gate_up_OI = self._unpack("gate_up_proj", expert, hidden_TD.dtype)
            gate, up = F.linear(hidden_TD[token], gate_up_OI).chunk(2, dim=-1)
            down_OI = self._unpack("down_proj", expert, hidden_TD.dtype)
            out = F.linear(self.act_fn(gate) * up, down_OI)
            out_TD.index_add_(0, token, out * weights_TK[token, pick, None])
        return out_TD.to(hidden_TD.dtype)

    def _unpack(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        packed, scale = getattr(self, name), getattr(self, f"{name}_scale")
        return unpack(packed[expert], scale[expert], self.bits, dtype)


def packed_bytes(numbers: int, config: DeepseekConfig, bits: int, dtype: torch.dtype) -> int:
    """Bytes of a model of `numbers` parameters, those of a tied head counted once, as embedding. It
    counts router and norms (0.02 % of the 16B model's numbers) as packed, though they are not."""
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    inside = numbers - embedding - head
    scales = (inside + head) // GROUP
    return (inside * bits + head * HEAD_BITS) // 8 + (embedding + scales) * dtype.itemsize


@register_quantization_config(METHOD)
class PackingConfig(QuantizationConfigMixin):
    """For `from_pretrained(quantization_config=)` of an original checkpoint of this architecture;
    `bits` is 4 or 8."""

    def __init__(self, bits: int) -> None:
        self.quant_method = METHOD
        self.bits = bits


@register_quantizer(METHOD)
class PackingQuantizer(HfQuantizer):
    """Packs each weight on its device as soon as it is read."""

    is_trainable = False

    def is_serializable(self) -> bool:  # asked by save_pretrained, whose own error helps nobody
        raise UserError(
            "a model with packed weights cannot be saved; save the original, loaded without "
            "quantization"
        )

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        module, attribute = get_module_from_name(model, param_name)
        return hasattr(module, f"{attribute}_scale")

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        """Bytes of a number of the unpacked weight, whose shape the parameter still has."""
        packed = self.param_needs_quantization(model, param_name)
        return _bits_of(model, param_name) / 8 if packed else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert isinstance(model, DeepseekForCausalLM)
        bits = self.quantization_config.bits
        for name, module in list(model.named_modules()):
            head = module is model.lm_head
            if head and model.config.tie_word_embeddings:
                continue
            if isinstance(module, nn.Linear):
                packed, weights = PackedLinear(module, HEAD_BITS if head else bits), ("weight",)
            elif isinstance(module, DeepseekExperts):
                packed, weights = PackedExperts(module, bits), ("gate_up_proj", "down_proj")
            else:
                continue
            # What is read is cast to the dtype of the parameter that is there, so not yet int32.
            for weight in weights:
                setattr(packed, weight, getattr(module, weight))
            model.set_submodule(name, packed)


class _Pack(ConversionOps):
    """A step of transformers' loading: a weight becomes words and scales."""

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        [(name, value)] = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        packed, scale = pack(weight, _bits_of(model, name))
        return {
            name: nn.Parameter(packed, requires_grad=False),
            f"{name}_scale": nn.Parameter(scale, requires_grad=False),
        }


def _bits_of(model: PreTrainedModel, param_name: str) -> int:
    """Of a parameter that is packed or will be."""
    return get_module_from_name(model, param_name)[0].bits
