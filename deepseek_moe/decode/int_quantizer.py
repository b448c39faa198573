"""A model in int8 or int4 for decoding, where reading the weights is what takes the time.

transformers reads an original checkpoint, and each weight is quantised as soon as it is there. The
linears of the layers and the routed experts are quantised, and the head, always to 8 bits. Router,
norms and embedding keep their dtype, and so does a head that is the embedding
(`tie_word_embeddings`). kernels/int_weights.py describes the format.

The modules here are exact and slow: they are the reference of every kernel.

Letters: E experts, O out, I in, W words a row, G groups a row, T tokens, K picks a token, D hidden.
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
from ..kernels.int_weights import GROUP, HEAD_BITS, dequantize, quantize, words_and_groups
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import EXPERT_STACKS
from ..model.modeling_deepseek import DeepseekExperts, DeepseekForCausalLM, loop_over_experts

METHOD = "deepseek_int"  # the name under which transformers knows it


class _Quantized(nn.Module):
    """Takes the place of `module`, whose `weights` become words [..., O, W], each with a parameter
    of its scales [..., O, G] beside it. Both are empty until the checkpoint is read."""

    def __init__(self, module: nn.Module, weights: tuple[str, ...], bits: int) -> None:
        super().__init__()
        self.bits = bits
        for name in weights:
            weight = getattr(module, name)
            *stack, columns = weight.shape
            W, G = words_and_groups(columns, bits)
            words = torch.empty(*stack, W, dtype=torch.int32, device=weight.device)
            scale = torch.empty(*stack, G, dtype=weight.dtype, device=weight.device)
            setattr(self, name, nn.Parameter(words, requires_grad=False))
            setattr(self, f"{name}_scale", nn.Parameter(scale, requires_grad=False))


class QuantizedLinear(_Quantized):
    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__(linear, ("weight",), bits)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize(self.weight, self.weight_scale, self.bits, x.dtype)
        return F.linear(x, weight, self.bias)


class QuantizedExperts(_Quantized):
    """It always loops over the experts: transformers' other ways through them
    (`experts_implementation`) cannot read words, so they do not apply."""

    def __init__(self, experts: DeepseekExperts, bits: int) -> None:
        super().__init__(experts, tuple(EXPERT_STACKS), bits)
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn

    def forward(
        self, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """As `DeepseekExperts.forward`."""
        return loop_over_experts(self, hidden_TD, index_TK, weights_TK)

    def matrices(self, expert: int) -> tuple[torch.Tensor, ...]:
        """As `DeepseekExperts.matrices`; only these two are ever held in full."""
        stacks = [(getattr(self, name), getattr(self, f"{name}_scale")) for name in EXPERT_STACKS]
        return tuple(
            dequantize(words[expert], scale[expert], self.bits, scale.dtype)
            for words, scale in stacks
        )


def quantized_bytes(numbers: int, config: DeepseekConfig, bits: int, dtype: torch.dtype) -> int:
    """Bytes of a model of `numbers` parameters. Those of a tied head count once, as embedding.

    Router and norms count as quantised, though they are not: 0.02 % of the 16B model's numbers.
    """
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    inside = numbers - embedding - head
    scales = (inside + head) // GROUP
    return (inside * bits + head * HEAD_BITS) // 8 + (embedding + scales) * dtype.itemsize


@register_quantization_config(METHOD)
class IntConfig(QuantizationConfigMixin):
    """For `from_pretrained(quantization_config=)` of an original checkpoint of this architecture;
    `bits` is 4 or 8."""

    def __init__(self, bits: int) -> None:
        self.quant_method = METHOD
        self.bits = bits


@register_quantizer(METHOD)
class IntQuantizer(HfQuantizer):
    """What transformers asks and calls while it loads a checkpoint with an `IntConfig`."""

    is_trainable = False

    def is_serializable(self) -> bool:
        """Refuses here, because the message with which save_pretrained refuses helps nobody."""
        raise UserError(
            "a model with quantised weights cannot be saved; save the original, loaded without "
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
        """Bytes of one number of the weight, whose full shape the parameter still has."""
        quantized = self.param_needs_quantization(model, param_name)
        return _bits_of(model, param_name) / 8 if quantized else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert isinstance(model, DeepseekForCausalLM)
        bits = self.quantization_config.bits
        for name, module in list(model.named_modules()):
            head = module is model.lm_head
            if head and model.config.tie_word_embeddings:
                continue
            if isinstance(module, nn.Linear):
                quantized = QuantizedLinear(module, HEAD_BITS if head else bits)
            elif isinstance(module, DeepseekExperts):
                quantized = QuantizedExperts(module, bits)
            else:
                continue
            # transformers casts what it reads to the dtype of the parameter that is there, which
            # must not be int32 yet.
            for weight in ("weight", *EXPERT_STACKS):
                if hasattr(quantized, weight):
                    setattr(quantized, weight, getattr(module, weight))
            model.set_submodule(name, quantized)


class _Quantize(ConversionOps):
    """The step of transformers' loading in which a weight becomes words and scales."""

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        [(name, value)] = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        words, scale = quantize(weight, _bits_of(model, name))
        return {
            name: nn.Parameter(words, requires_grad=False),
            f"{name}_scale": nn.Parameter(scale, requires_grad=False),
        }


def _bits_of(model: PreTrainedModel, param_name: str) -> int:
    """The bits of a parameter that is quantised or will be."""
    return get_module_from_name(model, param_name)[0].bits
