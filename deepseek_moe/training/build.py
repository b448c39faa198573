"""Puts together what trains: the base in its precision, adapters, and the GPU's functions."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import as_user_error
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import weight_files
from ..model.modeling_deepseek import DeepseekForCausalLM
from .arguments import FineTuningArguments, ModelArguments, split_commas
from .chosen_experts import order_of_experts, read_trained
from .compute.grouped_experts import GROUPED, RECOMPUTED
from .compute.liger import use_fused_forwards
from .deepspeed_file import zero_stage
from .quantized_base import Quantization
from .trainable import adapt, freeze_all_but, saved_whole


def build_model(
    folder: Path, options: ModelArguments, training: FineTuningArguments
) -> PreTrainedModel | PeftModel:
    """The model in `folder`, ready to train what `options` say, on this process's device.

    Weights that train are fp32 and computed with in bf16 if asked; bf16 where DeepSpeed keeps fp32
    copies of its own, or with --single_gpu_full. Frozen ones are bf16 where --bf16, or quantised.
    """
    model = _load_base(folder, options, training)
    model.config.use_cache = False
    model = adapt(model, options)
    for parameter in model.parameters():  # PEFT casts adapters only, not --modules_to_save.
        if parameter.requires_grad and training.keeps_fp32:
            parameter.data = parameter.data.float()
    if options.train_chosen_whole and options.bits != 16:
        read_trained(model, weight_files(folder))  # as they were before they were quantised
    if zero_stage(training) == 3:
        # DeepSpeed 0.19 lets weights go too soon where nothing before a mixture has a gradient.
        model.enable_input_require_grads()
    if training.device.type == "cuda":
        use_fused_forwards(model)
    return model


def quantization_of(options: ModelArguments, training: FineTuningArguments) -> Quantization | None:
    """How the base is stored under the adapters; None if it is not quantised."""
    if options.bits == 16:
        return None
    dtype = str(_loaded_dtype(options, training)).removeprefix("torch.")
    return Quantization(options.bits, options.quant_type, options.double_quant, dtype)


def _loaded_dtype(options: ModelArguments, training: FineTuningArguments) -> torch.dtype:
    if not training.bf16:
        return torch.float32
    all_train = not (options.use_lora or options.trainable or options.chosen_experts)
    return torch.float32 if all_train and training.keeps_fp32 else torch.bfloat16


def _load_base(
    folder: Path, options: ModelArguments, training: FineTuningArguments
) -> DeepseekForCausalLM:
    dtype = _loaded_dtype(options, training)
    wanted = {
        "dtype": dtype,
        "attn_implementation": options.attention(dtype),
        "experts_implementation": RECOMPUTED if options.recompute_experts else GROUPED,
        "use_safetensors": True,
    }
    if quantization := quantization_of(options, training):
        skip, order = _left_alone(folder, options), order_of_stacks(folder, options)
        wanted["quantization_config"] = quantization.config(skip, order)
    if zero_stage(training) != 3:  # Stage 3 places the weights by itself.
        wanted["device_map"] = {"": training.device}
    with as_user_error(f"{folder} cannot be loaded", "get the checkpoint anew"):
        return DeepseekForCausalLM.from_pretrained(folder, **wanted)


def _left_alone(folder: Path, options: ModelArguments) -> list[str]:
    """Full names of every weight-bearing module inside `--modules_to_save`, or `--trainable` beside
    chosen experts, which is not quantised.

    The names of modules around them would not do: bitsandbytes matches names by their beginnings.
    """
    beside_experts = options.trainable and not options.use_lora
    if not (options.modules_to_save or beside_experts):
        return []
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig.from_pretrained(folder))
    if beside_experts:
        freeze_all_but(model, split_commas(options.trainable), options.chosen_experts)
        trained = [name for name, one in model.named_parameters() if one.requires_grad]
        return [name.rpartition(".")[0] for name in trained]
    saved = saved_whole(model, split_commas(options.modules_to_save))
    inside = tuple(f"{one}." for one in saved)
    return [
        one
        for one, module in model.named_modules()
        if f"{one}.".startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]


def order_of_stacks(folder: Path, options: ModelArguments) -> dict[str, list[int]]:
    """The order of the experts in each layer of which some train whole, by the experts' names."""
    if not options.train_chosen_whole:
        return {}
    config = DeepseekConfig.from_pretrained(folder)
    return {
        f"model.layers.{number}.mlp.experts": order_of_experts(
            chosen, config.n_routed_experts
        ).tolist()
        for number, chosen in options.chosen_experts.items()
    }
