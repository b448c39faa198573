"""The frozen base of QLoRA: linear layers and routed experts in 4 or 8 bits.

bitsandbytes replaces only nn.Linear, and would leave the stacked experts, 91 % of this model, as
they are. Here transformers' quantizer for bitsandbytes takes them too, and quantises each stack on
its device as soon as it is read. Router, norms, embedding and head stay as they are.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from ..errors import UserError, first_words
from ..json_file import read_object, run_records
from ..kernels.training import ops_for, torch_ops
from ..model.layout import EXPERT_STACKS
from .offload import HostStack

QUANTIZATION_FILE = "base_quantization.json"
EXPERT_WEIGHTS = tuple(f"experts.{stack}" for stack in EXPERT_STACKS)


@dataclass(frozen=True)
class Quantization:
    """How the base is stored.

    In 4 bits, `quant_type` is nf4 or fp4, and `double_quant` quantises the scales too. In 8 bits,
    each row has one scale. The weights had `dtype` before, and are computed with in it.
    """

    bits: int
    quant_type: str = "nf4"
    double_quant: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(f"bits is {self.bits}; use 4, 8, or 16 for none")
        if self.quant_type not in ("nf4", "fp4"):
            raise UserError(f"quant_type is {self.quant_type!r}; use nf4 or fp4")
        is_dtype = self.dtype in ("float32", "bfloat16", "float16")
        if not is_dtype or type(self.double_quant) is not bool:
            raise ValueError(f"it has dtype {self.dtype!r} and double_quant {self.double_quant!r}")

    @classmethod
    def load(cls, folder: Path) -> "Quantization | None":
        """How the base of the adapter in `folder` is quantised, or None if it is not."""
        file = folder / QUANTIZATION_FILE
        if not file.is_file():
            _refuse_lost(file)
            return None
        fields = read_object(file, "get the adapter anew")
        try:
            if lost := sorted(cls.__annotations__.keys() - fields.keys()):
                raise ValueError(f"it lacks {', '.join(lost)}")
            return cls(**fields)
        except (ValueError, TypeError) as error:
            found = first_words(error).partition(";")[0]
            raise UserError(f"{file} cannot be used: {found}; get the adapter anew") from error

    def save(self, folder: Path) -> None:
        (folder / QUANTIZATION_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def config(
        self, skip: list[str], order: dict[str, list[int]] | None = None, offload: bool = False
    ) -> "ExpertsTooConfig":
        """The `quantization_config` of `from_pretrained`.

        Args:
            skip: full names of linears and experts that are left alone.
            order: by the full names of experts, their numbers in the order that the stacks get.
            offload: whether the stacks go to host memory, each as soon as it is quantised.
        """
        return ExpertsTooConfig(
            order=order or {},
            offload=offload,
            load_in_4bit=self.bits == 4,
            load_in_8bit=self.bits == 8,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.dtype,
            llm_int8_skip_modules=["lm_head", *skip],
        )

    def quantize(self, weight: torch.Tensor) -> nn.Parameter:
        """A weight [out, in], or a stack of them [E, out, in], as a parameter of bitsandbytes."""
        if self.bits == 4:
            options = {"quant_type": self.quant_type, "compress_statistics": self.double_quant}
            parameter = bnb.nn.Params4bit(weight.detach().contiguous(), False, **options)
            return parameter.to(weight.device)
        rows = weight.detach().half().flatten(0, -2)  # in fp16, as bitsandbytes does for linears
        data, scale, _ = bnb.functional.int8_vectorwise_quant(rows)
        data, scale = data.view(weight.shape), scale.view(*weight.shape[:-1], 1)
        return bnb.nn.Int8Params(data, False, has_fp16_weights=False, CB=data, SCB=scale)

    def roundtrip(self, weight: torch.Tensor) -> torch.Tensor:
        """What a quantised module computes with instead of `weight`, in `dtype`."""
        dtype = getattr(torch, self.dtype)
        return dequantize(self.quantize(weight.to(dtype)), dtype)


def _refuse_lost(file: Path) -> None:
    """Refuses an adapter without its `file` if a run.json says that its base was quantised."""
    for note, record in run_records(file.parent):
        if record["settings"].get("bits") in (4, 8):
            raise UserError(f"{file} is missing, and by {note} there was one; get it anew")


def dequantize(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a parameter, quantised or not, as a tensor of its full shape."""
    if isinstance(parameter, HostStack):
        with parameter.on_device() as packed:
            return _dequantize_4bit(packed, parameter.quant_state).to(dtype)
    if isinstance(parameter, bnb.nn.Params4bit):
        packed = parameter.as_subclass(torch.Tensor)  # attributes of their subclass are slow
        return _dequantize_4bit(packed, parameter.quant_state).to(dtype)
    if isinstance(parameter, bnb.nn.Int8Params):
        return parameter.data.to(dtype) * (parameter.SCB / 127).to(dtype)
    return parameter.to(dtype)


def _dequantize_4bit(packed: torch.Tensor, state: bnb.functional.QuantState) -> torch.Tensor:
    """`bnb.functional.dequantize_4bit`, on a GPU as one kernel, where bitsandbytes starts three.

    QLoRA on small batches waits for the host to start kernels, and each layer dequantises its
    weights in both passes.
    """
    ops = ops_for(packed.device)
    if ops is torch_ops:
        return _dequantize_by_blocks(packed, state)
    return ops.unpack_4bit(packed, state)


def _dequantize_by_blocks(packed: torch.Tensor, state: bnb.functional.QuantState) -> torch.Tensor:
    """`bnb.functional.dequantize_4bit` with one row for each scale.

    A scale belongs to a block of 64 numbers, and a block may begin in one row of a weight and end
    in the next. On CPUs with AVX-512, bitsandbytes 0.50.2 starts every row with a new scale, so
    that weights whose rows are a multiple of 16 long, but not of 64, come out wrong by a quarter.
    """
    numbers, size = state.shape.numel(), state.blocksize
    blocks = copy.copy(state)
    blocks.shape = torch.Size((numbers,) if numbers % size else (numbers // size, size))
    return bnb.functional.dequantize_4bit(packed, blocks).reshape(state.shape)


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, but on a CPU it always computes with `dequantize`.

    On CPUs with AVX512-BF16 the original's `forward` (bitsandbytes 0.50.2, nn/modules.py, line 613)
    packs its weight anew in the first evaluation and rounds the scales to bf16 for good. Training
    would go on over another base. It also fails for widths that are no multiples of 32 and 64.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        dtype = self.compute_dtype or x.dtype
        out = _FrozenLinear.apply(x.to(dtype), self.weight)
        return (out if self.bias is None else out + self.bias.to(dtype)).to(x.dtype)


class _FrozenLinear(torch.autograd.Function):
    """x [..., I] times W^T [I, O]. Each of the two passes dequantises W, which is never kept in
    full."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: nn.Parameter) -> torch.Tensor:
        ctx.weight_OI = weight_OI  # the module's own parameter, not a copy
        return nn.functional.linear(x, dequantize(weight_OI, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ dequantize(ctx.weight_OI, grad.dtype), None


# DeepSpeed's ZeRO-3 divides parameters among the ranks and marks them with `ds_id` and `ds_shape`
# (deepspeed/runtime/zero/partition_parameters.py, `Init._convert_to_deepspeed_param`).
# tests/training/test_quantized_base.py fails if it names them otherwise.


def is_quantized(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params)


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds the parameter, which is whole only inside the forward of its module."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape before the parameter was quantised to 4 bits or divided by ZeRO-3."""
    if isinstance(parameter, bnb.nn.Params4bit):
        return parameter.quant_state.shape
    return getattr(parameter, "ds_shape", parameter.shape)


class _QuantizeExperts(ConversionOps):
    """A step of transformers' loading that quantises the experts, and leaves the linears to
    bitsandbytes' own step. `config` has the arguments of `Quantization.config`."""

    def __init__(
        self, quantization: Quantization, config: "ExpertsTooConfig", linears: ConversionOps
    ) -> None:
        self.quantization, self.config, self.linears = quantization, config, linears

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        [(name, value)] = input_dict.items()
        if not name.endswith(EXPERT_WEIGHTS):
            return self.linears.convert(input_dict, **kwargs)
        stack = value[0] if isinstance(value, list) else value
        if order_E := self.config.order.get(name.rpartition(".")[0]):
            stack = stack[order_E]
        stored = self.quantization.quantize(stack)
        return {name: HostStack.of(stored) if self.config.offload else stored}


class _ExpertsToo:
    """Makes a quantizer of transformers take the stacked experts as well as the linears."""

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        if param_name.endswith(EXPERT_WEIGHTS):
            return param_name.rpartition(".")[0] not in self.modules_to_not_convert
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        config = self.quantization_config
        quantization = Quantization(
            4 if config.load_in_4bit else 8,
            config.bnb_4bit_quant_type,
            config.bnb_4bit_use_double_quant,
        )
        return _QuantizeExperts(quantization, config, super().get_quantize_ops())

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        """Bytes a number on the GPU, for which transformers makes room before it loads."""
        if self.quantization_config.offload and param_name.endswith(EXPERT_WEIGHTS):
            return 0.0
        return super().param_element_size(model, param_name, param)

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that Trainer takes a model without adapters: chosen experts train beside it."""
        return True


@register_quantization_config("experts_too_4bit")
@register_quantization_config("experts_too_8bit")
class ExpertsTooConfig(BitsAndBytesConfig):
    """Names the quantizers below instead of transformers' own."""

    quantizes_experts = True  # DeepseekForCausalLM.from_pretrained asks

    def __init__(self, order: dict[str, list[int]], offload: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.order, self.offload = order, offload
        self.quant_method = f"experts_too_{4 if self.load_in_4bit else 8}bit"


@register_quantizer("experts_too_4bit")
class ExpertsToo4bitQuantizer(_ExpertsToo, Bnb4BitHfQuantizer):
    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        for module in model.modules():
            if type(module) is bnb.nn.Linear4bit:  # made by transformers, without its weight yet
                module.__class__ = Linear4bit


@register_quantizer("experts_too_8bit")
class ExpertsToo8bitQuantizer(_ExpertsToo, Bnb8BitHfQuantizer):
    pass
