"""How much GPU memory a fine-tuning run takes, reckoned before any weight is loaded.

Letters: T tokens a device and micro-batch, N = T*K picks, D hidden size, F expert width,
V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import add_lora, choose, parameter_table
from .arguments import (
    ALL_LINEARS,
    FineTuningArguments,
    ModelArguments,
    deepspeed_settings,
    names,
)
from .configuration_deepseek import DeepseekConfig
from .modeling_deepseek import DeepseekForCausalLM
from .quantization import STACKS


@dataclass
class Memory:
    """Bytes a device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def meta_model(folder: Path, options: ModelArguments) -> Any:
    """The model that would train, adapters and all, without its numbers."""
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig.from_pretrained(folder))
        if options.use_lora:
            return add_lora(
                model,
                names(options.trainable or ALL_LINEARS),
                options.lora_rank,
                options.lora_alpha,
                options.lora_dropout,
                names(options.modules_to_save),
            )
        if options.trainable:
            choose(model, names(options.trainable))
    return model


def estimate(
    model: nn.Module, options: ModelArguments, training: FineTuningArguments, length: int
) -> Memory:
    """What a step on rows of `length` tokens takes at its peak."""
    zero = deepspeed_settings(training).get("zero_optimization", {})
    stage, ranks = zero.get("stage", 0), training.world_size
    low = 2 if training.bf16 else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(_stored(name, p, options, training, low) for name, p in model.named_parameters())
    return Memory(
        weights=stored,
        gradients=trained * (low if training.deepspeed else 4),
        optimizer=trained * 8,
        activations=0.0,
    )


def _stored(
    name: str,
    parameter: nn.Parameter,
    options: ModelArguments,
    training: FineTuningArguments,
    low: int,
) -> float:
    """Bytes of a parameter where it is kept for computing."""
    if parameter.requires_grad:
        return parameter.numel() * (low if training.deepspeed else 4)
    if options.bits == 16 or not _quantised(name):
        return parameter.numel() * low
    scales = 4 / 64 if not options.double_quant else 1 / 64 + 4 / 64 / 256
    return parameter.numel() * (options.bits / 8 + (scales if options.bits == 4 else 0))


def _quantised(name: str) -> bool:
    return name.endswith(STACKS) or (".layers." in name and "_proj" in name)
