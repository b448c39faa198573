"""How transformers loads a checkpoint in int8 or int4, for decoding, where reading the weights is
what takes the time.

It is an original checkpoint; each weight is quantised as soon as it is read. The linears of the
layers and the routed experts are quantised, and the head, always to 8 bits. Router, norms and
embedding keep their dtype, and so does a head that is the embedding (`tie_word_embeddings`).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError
from ..kernels.int_weights import GROUP, HEAD_BITS, quantize
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import EXPERT_STACKS
from ..model.modeling_deepseek import DeepseekExperts, DeepseekForCausalLM
from .quantized import QuantizedExperts, QuantizedLinear

METHOD = "deepseek_int"  # the name under which transformers knows it


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
