"""The memory that a fine-tuning run would take, without loading a weight.

Weights and optimizer states stay all the time. A step adds to them one of these peaks:

- the loss: what layers keep (with checkpointing their inputs), and what the head computes with
- the start of the backward pass: what layers keep, and what the last one computes with
- the end of the backward pass: nearly all gradients, and what one layer computes with
- the optimizer's step: all gradients
- evaluation: the logits of a batch, and those of a row in fp32

Where passes are replayed (compute/replayed_model.py), gradients stay all the time too. A run that
has no room for it is not replayed, and takes less. For offloaded experts that less is estimated.

With --single_gpu_full each weight is stepped in the backward pass. Then there are only the first
two peaks and evaluation, with the gradient of one tensor.

Layers keep what the code saves for the backward pass. The constants below were fitted to figures
that `benchmarks/memory.py` and `benchmarks/train.py` measured. Letters: K experts a token, D hidden
size, F expert width. Tokens are those of a device and micro-batch.
"""

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..files import readable_size
from ..kernels.optimizer.torch_ops import ADAMW_BLOCK
from ..model.configuration_deepseek import DeepseekConfig
from .arguments import FineTuningArguments, ModelArguments, optimizer_name
from .chosen_experts import is_of_chosen
from .compute.replayed_model import MOST_TOKENS
from .deepspeed_file import zero_settings
from .expert_lora import zeros_left_out
from .offload import BUFFERS
from .quantized_base import full_shape

CUDA = 0.5e9  # bytes beside PyTorch's
LOGITS = 0.5  # bytes a logit: the fused loss has only a part of them at a time
IN_BACKWARD = 2 * (1 + 4 / ADAMW_BLOCK)  # bytes a weight: two averages in 8 bits, and their scales
HEAD = 10  # bytes a weight of the head: the loss computes its gradient


@dataclass
class Memory:
    """Bytes of a device at the highest peak. CUDA itself takes about 0.5 GB more. `activations` are
    all that comes and goes: ZeRO's buckets, dequantised weights, and buffers of offloaded experts,
    which are in pinned `host` memory."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations


def estimate(
    model: nn.Module, options: ModelArguments, training: FineTuningArguments, tokens: int
) -> Memory:
    """The memory at the peak of a step. `tokens` are those of a device and micro-batch, padding
    included."""
    config, low = model.config, training.number_bytes
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    trained, largest = sum(sizes), max(sizes, default=0)
    weights = sum(_stored(name, p, options, training) for name, p in model.named_parameters())
    optimizer, gradients, stepping = optimizer_bytes(training) * trained, 4 * trained, 0
    copies = _computing_copies(model, options, training)
    offloaded = [p.numel() / 2 for name, p in model.named_parameters() if _off(name, p, options)]
    layers = len(offloaded) / 2  # each has two stacks
    copies += BUFFERS * sum(offloaded) / layers if offloaded else 0
    zero = zero_settings(training)
    stage, ranks = zero.get("stage", 0), max(1, training.world_size)
    if stage:  # The ranks divide the bf16 gradients and the fp32 weights and states.
        off = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        optimizer = 0 if off else 12 * trained / ranks
        gradients = 0 if off else trained * low / ranks
        at_once = min(trained / ranks, zero.get("sub_group_size", 1e9) if stage == 3 else math.inf)
        stepping = 0 if off else (low + 4) * at_once  # gradients in one piece, and again in fp32
        stepping += 8 * largest / ranks  # Its norm is taken in fp64.
        copies += bucket_numbers(zero, config.hidden_size) * low
    if stage == 3:
        weights = 0 if zero.get("offload_param") else weights / ranks
        number = sum(p.numel() for p in model.parameters())
        # As much again is on its way.
        copies += 2 * low * min(zero.get("stage3_max_live_parameters", 1e9), number)
    kept, layer, temporary = _activations(config, options, training)
    again = training.gradient_checkpointing
    at_loss = kept * tokens + (0 if again else copies)
    head = any("lm_head" in n and p.requires_grad for n, p in model.named_parameters())
    if head or (training.single_gpu_full and not options.train_chosen_whole):
        at_loss += HEAD * config.vocab_size * config.hidden_size
    at_start = (kept + temporary + (layer if again else 0)) * tokens + copies
    at_evaluation = _logits(config, training, tokens)
    if training.single_gpu_full:
        gradients = low * largest
        peaks = dict.fromkeys([at_evaluation, at_loss, at_start + gradients], gradients)
    else:
        at_loss += LOGITS * config.vocab_size * tokens
        at_end = gradients * (1 - 2 / config.num_hidden_layers) + copies
        at_end += (layer + temporary) * tokens
        stays = gradients if _is_replayed(options, training, tokens) else 0
        peaks = {one + stays: stays for one in (at_evaluation, at_loss, at_start)}
        peaks |= dict.fromkeys([at_end, gradients + stepping], gradients)
    peak = max(peaks)
    return Memory(weights, optimizer, peaks[peak], peak - peaks[peak], sum(offloaded))


def _is_replayed(options: ModelArguments, training: FineTuningArguments, tokens: int) -> bool:
    """Whether the run would record graphs on a GPU."""
    alone = training.world_size == 1 and not training.deepspeed and not options.offload_experts
    adapts = options.use_lora and options.bits != 8 and training.bf16
    return training.cuda_graphs and alone and adapts and tokens <= MOST_TOKENS


def optimizer_bytes(training: FineTuningArguments) -> float:
    """Bytes that the optimizer keeps for each trained weight."""
    name = optimizer_name(training)
    if training.single_gpu_full or "8bit" in name:
        return IN_BACKWARD
    return 0 if name == "sgd" else 8


def bucket_numbers(zero: dict[str, Any], hidden_size: int) -> float:
    """How many numbers ZeRO's buckets of gradients hold. One bucket is filled; another one is sent,
    which stage 2 has only with overlap_comm."""
    size = zero.get("reduce_bucket_size", 5e8)
    size = hidden_size**2 if size == "auto" else size  # transformers decides so.
    return size * (2 if zero["stage"] == 3 or zero.get("overlap_comm") else 1)


def _logits(config: DeepseekConfig, training: FineTuningArguments, tokens: int) -> float:
    """Bytes of the logits of an evaluated batch, and of one row in fp32 with its softmax."""
    if training.eval_strategy == "no":
        return 0.0
    length = tokens / training.per_device_train_batch_size
    rows = training.per_device_eval_batch_size
    return config.vocab_size * length * (rows * training.number_bytes + 8)


def _activations(
    config: DeepseekConfig, options: ModelArguments, training: FineTuningArguments
) -> tuple[float, float, float]:
    """Bytes a token: (what all layers keep for the backward pass, what one layer keeps, what the
    backward pass of its experts needs beside)."""
    K, D, F = config.num_experts_per_tok or 1, config.hidden_size, config.moe_intermediate_size
    shared, low = (config.n_shared_experts or 0) * F, training.number_bytes
    all_train = not (options.use_lora or options.train_chosen_whole)
    stream = 4 if all_train and training.keeps_fp32 else low  # the residual stream
    # Both norms' inputs; q, k, v and attention; gate and up of experts, and of those shared.
    layer = 2 * D * stream + 4 * D * low + 2 * shared * low
    layer += 0 if options.recompute_experts else K * 2 * F * low
    # Inputs of linears and experts; a frozen linear keeps none.
    only_experts = bool(options.chosen_experts) and not options.trainable
    layer += (D if only_experts else 2 * D + shared) * low
    if options.use_lora and options.lora_dropout and options.bits == 8 and not only_experts:
        layer += 3 * D + shared  # the masks of PEFT's own dropout before linears
    # x A of experts, or the router's input in fp32
    layer += 2 * K * options.lora_rank * low if options.use_lora else 4 * D
    kept = D * stream if training.gradient_checkpointing else layer
    return config.num_hidden_layers * kept, layer, K * (2 * F + D) * low


def _computing_copies(
    model: nn.Module, options: ModelArguments, training: FineTuningArguments
) -> float:
    """Bytes of weights that are dequantised or cast for computing."""
    stacks = [
        full_shape(p).numel()
        for name, p in model.named_parameters()
        if name.endswith(("gate_up_proj", "down_proj"))  # inside of PEFT's wrappers too
    ]
    # Chosen experts are cast into the frozen stack, which is there already.
    trained = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_of_chosen(name)
    )
    layers = model.config.num_hidden_layers if training.gradient_checkpointing else 1
    dequantised = max(stacks, default=0) if options.bits != 16 else 0
    cast = training.bf16 and training.keeps_fp32  # Autograd keeps fp32 weights as bf16.
    # Adapters of chosen experts are computed with zeros as those of the others.
    kept = (trained if cast else 0) + zeros_left_out(model)
    return training.number_bytes * (dequantised + kept / layers)


def _stored(
    name: str, parameter: nn.Parameter, options: ModelArguments, training: FineTuningArguments
) -> float:
    """Bytes of a parameter as training keeps it."""
    linear = ".layers." in name and "_proj" in name and "original_module" not in name
    same_dtype = not (training.bf16 and training.keeps_fp32)
    if is_of_chosen(name) and options.bits == 16 and same_dtype and not training.deepspeed:
        return 0.0  # they are a part of the frozen stack
    if parameter.requires_grad:
        each = 4 if training.keeps_fp32 else training.number_bytes
    elif options.bits == 16 or not linear:
        each = training.number_bytes
    elif options.bits == 8:
        each = 1 + 4 / parameter.shape[-1]
    else:  # 64 numbers share a scale.
        each = 0.0 if _off(name, parameter, options) else 0.5
        each += (1 + 4 / 256 if options.double_quant else 4) / 64
    return parameter.numel() * each


def _off(name: str, parameter: nn.Parameter, options: ModelArguments) -> bool:
    """Whether the parameter is a stack of experts that --offload_experts keeps in host memory."""
    stack = name.endswith(("gate_up_proj", "down_proj")) and "original_module" not in name
    return options.offload_experts and stack and not parameter.requires_grad


def smaller(
    model: nn.Module,
    options: ModelArguments,
    training: FineTuningArguments,
    tokens: int,
    free: float,
) -> str:
    """What to do where a run needs more than the `free` bytes of a GPU: the first of a few options,
    each beside those before it, with which it fits."""
    said = ""
    if options.use_lora and not training.deepspeed and training.world_size == 1:
        changes = {"bits": 4, "offload_experts": True}
        changes |= {"gradient_checkpointing": True, "optim": "adamw_bnb_8bit"}
        options, training = copy(options), copy(training)
        for name, value in changes.items():
            for group in (options, training):
                if hasattr(group, name) and getattr(group, name) != value:
                    setattr(group, name, value)
                    said += f" --{name} {value}"
            needed = estimate(model, options, training, tokens)
            if needed.total + CUDA < free:
                host = f" and {readable_size(needed.host)} of host memory" if needed.host else ""
                return f"with{said} it would: {readable_size(needed.total)}{host}"
    return "use a smaller batch or fewer tokens"
