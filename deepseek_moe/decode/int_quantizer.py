"""How transformers loads a checkpoint in int8 or int4, for decoding, where reading the weights is
what takes the time.

It is an original checkpoint; each weight is quantised as soon as it is read, and experts before the
next ones are read. So loading takes little more memory than the model that it makes. The linears of
the layers and the routed experts are quantised, and the head, always to 8 bits. Router, norms and
embedding keep their dtype, and so does a head that is the embedding (`tie_word_embeddings`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError
from ..kernels.int_weights import GROUP, shifts, words_and_groups
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import EXPERT_STACKS
from ..model.modeling_deepseek import DeepseekExperts, DeepseekForCausalLM
from .quantized import QuantizedExperts, QuantizedLinear

BITS = {"int8": 8, "int4": 4}
HEAD_BITS = 8
"""The head stays in 8 bits, because its errors go straight into the logits: 8 bits cost the bundled
model 0.0001 nats a token at most, 4 bits 0.009. Each step reads all of it (0.42 GB of the 16B model
in bf16)."""
METHOD = "deepseek_int"  # the name under which transformers knows it
# The value of largest magnitude in a group lies this many steps from 0, at the end of the range
# that has one more level. In 4 bits, half a step more and less are tried too, and the least squared
# error is kept: the bundled model then loses 0.018 nats a token, not 0.023.
STEPS = {8: (128.0,), 4: (8.0, 7.5, 8.5)}
NUMBERS_AT_ONCE = 2**22
"""`quantize` makes several copies in fp32, of this many numbers at once: 200 MB at most."""


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words [..., O, W] and scales [..., O, G] of a weight [..., O, I].

    Raises:
        ValueError: I is no multiple of P.
    """
    rows_RI = weight.detach().flatten(0, -2)
    R, I = rows_RI.shape  # noqa: E741
    W, G = words_and_groups(I, bits)
    words_RW = torch.empty(R, W, dtype=torch.int32, device=weight.device)
    scale_RG = torch.empty(R, G, dtype=weight.dtype, device=weight.device)
    step = max(1, NUMBERS_AT_ONCE // I)
    for at in range(0, R, step):
        some = slice(at, at + step)
        words_RW[some], scale_RG[some] = _quantize_rows(rows_RI[some], bits)
    return words_RW.view(*weight.shape[:-1], W), scale_RG.view(*weight.shape[:-1], G)


def _quantize_rows(weight_RI: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    P, half = 32 // bits, 2 ** (bits - 1)
    W, G = words_and_groups(weight_RI.shape[-1], bits)
    width = GROUP // P
    x = F.pad(weight_RI.float().unflatten(-1, (P, W)), (0, G * width - W))
    x = x.unflatten(-1, (G, width))  # [R, P, G, width]: dimensions 1 and 3 share a scale

    def levels(scale: torch.Tensor) -> torch.Tensor:
        return (x / scale.where(scale != 0, 1.0)).round().clamp(-half, half - 1)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (levels(scale) * scale - x).square().sum(dim=(1, 3), keepdim=True)

    high, low = x.amax(dim=(1, 3), keepdim=True), x.amin(dim=(1, 3), keepdim=True)
    largest = torch.where(high > -low, high, low)
    # The scale is rounded to the stored dtype first, since values are multiplied with that.
    tried = torch.stack([(largest / -n).to(weight_RI.dtype).float() for n in STEPS[bits]])
    best = torch.stack([error(scale) for scale in tried]).argmin(dim=0, keepdim=True)
    scale = tried.gather(0, best).squeeze(0)  # [R, 1, G, 1]
    stored_RPW = (levels(scale) + half).to(torch.int32).flatten(-2)[..., :W]
    # The values of a word share no bit, so their sum joins them.
    words_RW = (stored_RPW << shifts(bits, x.device)).sum(dim=1, dtype=torch.int32)
    return words_RW, scale.flatten(1).to(weight_RI.dtype)


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
    """For `from_pretrained(quantization_config=)` of an original checkpoint; `bits` is 4 or 8."""

    quantizes_experts = True  # DeepseekForCausalLM.from_pretrained asks

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

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Experts are not stacked before they are quantised. (5.23 passes the model, too.)"""
        others = [one for one in weight_conversions if not isinstance(one, WeightConverter)]
        return others + [
            _Unread(
                source_patterns=[f"mlp.experts.*.{matrix}.weight" for matrix in matrices],
                target_patterns=f"mlp.experts.{stack}",
                operations=[_QuantizeExperts()],
            )
            for stack, matrices in EXPERT_STACKS.items()
        ]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert isinstance(model, DeepseekForCausalLM)
        replace_quantized(model, self.quantization_config.bits)


def replace_quantized(model: DeepseekForCausalLM, bits: int) -> list[nn.Module]:
    """Puts modules for words and scales in the places of those that are quantised; returns them."""
    replaced = []
    for name, module in list(model.named_modules()):
        head = module is model.lm_head
        if head and model.config.tie_word_embeddings:
            continue
        if isinstance(module, nn.Linear):
            replaced.append(QuantizedLinear(module, HEAD_BITS if head else bits))
        elif isinstance(module, DeepseekExperts):
            replaced.append(QuantizedExperts(module, bits))
        else:
            continue
        model.set_submodule(name, replaced[-1])
    return replaced


class _Quantize(ConversionOps):
    """The step of transformers' loading in which a weight becomes words and scales."""

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        if len(input_dict) > 1:  # by `_QuantizeExperts`
            return input_dict
        [(name, value)] = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        return _parameters(name, *quantize(weight, _bits_of(model, name)))


class _Unread(WeightConverter):
    """Hands on functions that read the tensors, as transformers keeps them where it quantises."""

    def materialize_tensors(self) -> dict[str, list[Callable[[], torch.Tensor]]]:
        unread = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return unread


class _QuantizeExperts(ConversionOps):
    """The step in which the matrices of all experts of a layer are read and quantised, one after
    another, or several of small experts."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, nn.Parameter]:
        module, stack = get_module_from_name(model, full_layer_name)
        E, O, I = getattr(module, stack).shape  # noqa: E741
        W, G = words_and_groups(I, module.bits)
        rows = O // len(source_patterns)
        together = max(1, NUMBERS_AT_ONCE // (rows * I))
        words_EOW = scale_EOG = None
        for number, pattern in enumerate(source_patterns):
            some = slice(number * rows, (number + 1) * rows)
            for at in range(0, E, together):
                unread = input_dict[pattern][at : at + together]
                words, scale = quantize(torch.stack([read() for read in unread]), module.bits)
                if words_EOW is None:
                    words_EOW, scale_EOG = words.new_empty(E, O, W), scale.new_empty(E, O, G)
                words_EOW[at : at + together, some] = words
                scale_EOG[at : at + together, some] = scale
        return _parameters(target_patterns[0], words_EOW, scale_EOG)


def _parameters(name: str, words: torch.Tensor, scale: torch.Tensor) -> dict[str, nn.Parameter]:
    new = {name: words, f"{name}_scale": scale}
    return {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in new.items()}


def _bits_of(model: PreTrainedModel, param_name: str) -> int:
    """The bits of a parameter that is quantised or will be."""
    return get_module_from_name(model, param_name)[0].bits
