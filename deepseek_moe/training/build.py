"""Puts together what trains: the base in its precision, adapters, and the GPU's functions."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import as_user_error
from ..model.configuration_deepseek import DeepseekConfig
from ..model.modeling_deepseek import DeepseekExperts, DeepseekForCausalLM
from .arguments import FineTuningArguments, ModelArguments, split_commas, zero_stage
from .compute.grouped_experts import GROUPED as EXPERTS
from .compute.liger import use_fused_forwards
from .quantized_base import Quantization
from .trainable import adapt, saved_whole


def build_model(
    folder: Path, options: ModelArguments, training: FineTuningArguments
) -> PreTrainedModel | PeftModel:
    """The model in `folder`, ready to train what `options` say, on this process's device.

    Weights that train are fp32 and computed with in bf16 if asked; bf16 where DeepSpeed keeps fp32
    copies of its own, or with --single_gpu_full. Frozen ones are bf16 where --bf16, or quantised.
    """
    keeps_fp32 = not (training.deepspeed or training.single_gpu_full)
    low = torch.bfloat16 if training.bf16 else torch.float32
    some_train = options.use_lora or options.trainable
    dtype = low if some_train or not keeps_fp32 else torch.float32
    wanted: dict[str, Any] = {}
    quantization = None
    if options.bits != 16:
        dtype_name = str(dtype).removeprefix("torch.")
        quantization = Quantization(
            options.bits, options.quant_type, options.double_quant, dtype_name
        )
        wanted["quantization_config"] = quantization.config(_left_alone(folder, options))
    if zero_stage(training) != 3:  # which places the weights by itself
        wanted["device_map"] = {"": training.device}
    with as_user_error(f"{folder} cannot be loaded", "get the checkpoint anew"):
        model = DeepseekForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=options.attention(dtype),
            experts_implementation=EXPERTS,
            use_safetensors=True,
            **wanted,
        )
    model.config.use_cache = False
    model = adapt(model, options)
    if keeps_fp32:  # PEFT casts adapters, but not `modules_to_save`
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.base_quantization = quantization
    for module in model.modules():
        if isinstance(module, DeepseekExperts):
            module.recompute = options.recompute_experts
    if zero_stage(training) == 3:
        # DeepSpeed 0.19 lets weights go too soon where nothing before a mixture has a gradient.
        model.enable_input_require_grads()
    if training.device.type == "cuda":
        use_fused_forwards(model)
    return model


def _left_alone(folder: Path, options: ModelArguments) -> list[str]:
    """The full names of the modules with weights that `--modules_to_save` means or that are in one
    of those: a whole layer's name would be the beginning of others'."""
    if not options.modules_to_save:
        return []
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig.from_pretrained(folder))
    saved = saved_whole(model, split_commas(options.modules_to_save))
    inside = tuple(f"{one}." for one in saved)
    return [
        one
        for one, module in model.named_modules()
        if f"{one}.".startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]
