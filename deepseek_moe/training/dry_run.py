"""What a fine-tuning run would do, and the memory that it would take, without loading a weight.

Weights and optimizer states stay all the time. A step adds to them one of these peaks:

- the loss: what layers keep (with checkpointing their inputs), and what the head computes with
- the start of the backward pass: what layers keep, and what the last one computes with
- the end of the backward pass: nearly all gradients, and what one layer computes with
- the optimizer's step: all gradients
- evaluation: the logits of a batch, and those of a row in fp32

With --single_gpu_full each weight is stepped in the backward pass. Then there are only the first
two peaks and evaluation, with the gradient of one tensor.

Layers keep what the code saves for the backward pass. The constants below were fitted to figures
that `benchmarks/memory.py` and `benchmarks/train.py` measured. Letters: K experts a token, D hidden
size, F expert width. Tokens are those of a device and micro-batch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..kernels.training.torch_ops import ADAMW_BLOCK
from ..model.configuration_deepseek import DeepseekConfig
from ..model.modeling_deepseek import DeepseekForCausalLM
from .arguments import FineTuningArguments, ModelArguments, deepspeed_settings, optimizer_name
from .quantized_base import full_shape
from .trainable import adapt, parameter_table

LOGITS = 0.5  # bytes a logit: the fused loss has only a part of them at a time
IN_BACKWARD = 2 * (1 + 4 / ADAMW_BLOCK)  # bytes a weight: two averages in 8 bits, and their scales
HEAD = 10  # bytes a weight of the head: the loss computes its gradient


@dataclass
class Memory:
    """Bytes of a device at the highest peak. CUDA itself takes about 0.5 GB more. `activations` are
    all that comes and goes, ZeRO's buckets and dequantised weights included."""

    weights: float
    optimizer: float
    gradients: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations


def meta_model(folder: Path, options: ModelArguments) -> nn.Module:
    """The model that would train, with its adapters, on the meta device.

    Raises:
        UserError: `options` name what cannot train.
    """
    with torch.device("meta"):
        return adapt(DeepseekForCausalLM(DeepseekConfig.from_pretrained(folder)), options)


def estimate(
    model: nn.Module, options: ModelArguments, training: FineTuningArguments, tokens: int
) -> Memory:
    """The memory at the peak of a step. `tokens` are those of a device and micro-batch, padding
    included."""
    if training.single_gpu_full:
        return _estimate_in_backward(model, options, training, tokens)
    config, low = model.config, 2 if training.bf16 else 4
    zero = deepspeed_settings(training).get("zero_optimization", {})
    stage, ranks = zero.get("stage", 0), max(1, training.world_size)
    number = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(_stored(name, p, options, training, low) for name, p in model.named_parameters())
    copies = _computing_copies(model, options, training, low)
    if stage:  # The ranks divide the bf16 gradients and the fp32 weights and states.
        off = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        optimizer = 0 if off else 12 * trained / ranks
        gradients = trained * low / ranks * (0 if off else 1)
        at_once = min(trained / ranks, zero.get("sub_group_size", 1e9) if stage == 3 else math.inf)
        stepping = 0 if off else (low + 4) * at_once  # gradients in one piece, and again in fp32
        largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
        stepping += 8 * largest / ranks  # Its norm is taken in fp64.
        copies += bucket_numbers(zero, config.hidden_size) * low
        if stage == 3:
            weights = 0 if zero.get("offload_param") else weights / ranks
            live = min(zero.get("stage3_max_live_parameters", 1e9), number)
            copies += 2 * low * live  # As much again is on its way.
    else:
        optimizer, gradients, stepping = optimizer_bytes(training) * trained, 4 * trained, 0
    kept, layer, temporary = _activations(config, options, training, low)
    at_loss = (kept + LOGITS * config.vocab_size) * tokens
    head = any("lm_head" in n and p.requires_grad for n, p in model.named_parameters())
    at_loss += HEAD * config.vocab_size * config.hidden_size if head else 0
    at_loss += 0 if training.gradient_checkpointing else copies
    at_start = (kept + temporary) * tokens + copies
    if training.gradient_checkpointing:
        at_start += layer * tokens
    at_end = gradients * (1 - 2 / config.num_hidden_layers) + (layer + temporary) * tokens + copies
    at_evaluation = _logits(config, training, tokens, low)
    peaks = {at_evaluation: 0, at_loss: 0, at_start: 0, at_end: gradients}
    peaks[gradients + stepping] = gradients
    peak = max(peaks)
    return Memory(weights, optimizer, peaks[peak], peak - peaks[peak])


def optimizer_bytes(training: FineTuningArguments) -> float:
    """Bytes that the optimizer keeps for each trained weight."""
    if training.single_gpu_full:
        return IN_BACKWARD
    name = optimizer_name(training)
    if "8bit" in name:
        return IN_BACKWARD
    return 0 if name == "sgd" else 8


def bucket_numbers(zero: dict[str, Any], hidden_size: int) -> float:
    """How many numbers ZeRO's buckets of gradients hold. One bucket is filled; another one is sent,
    which stage 2 has only with overlap_comm."""
    size = zero.get("reduce_bucket_size", 5e8)
    size = hidden_size**2 if size == "auto" else size  # transformers decides so.
    return size * (2 if zero["stage"] == 3 or zero.get("overlap_comm") else 1)


def _estimate_in_backward(
    model: nn.Module, options: ModelArguments, training: FineTuningArguments, tokens: int
) -> Memory:
    """With --single_gpu_full."""
    config, low = model.config, 2
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    weights = low * sum(p.numel() for p in model.parameters())
    optimizer = IN_BACKWARD * sum(trained.values())
    gradients = low * max(trained.values(), default=0)
    kept, layer, temporary = _activations(config, options, training, low)
    at_loss = kept * tokens + HEAD * config.vocab_size * config.hidden_size - gradients
    at_start = (kept + temporary) * tokens
    if training.gradient_checkpointing:
        at_start += layer * tokens
    at_evaluation = _logits(config, training, tokens, low) - gradients
    return Memory(weights, optimizer, gradients, max(at_loss, at_start, at_evaluation))


def _logits(config: DeepseekConfig, training: FineTuningArguments, tokens: int, low: int) -> float:
    """Bytes of the logits of an evaluated batch, and of one row in fp32 with its softmax."""
    if training.eval_strategy == "no":
        return 0.0
    length = tokens / training.per_device_train_batch_size
    return config.vocab_size * length * (training.per_device_eval_batch_size * low + 8)


def _activations(
    config: DeepseekConfig, options: ModelArguments, training: FineTuningArguments, low: int
) -> tuple[float, float, float]:
    """Bytes a token: (what all layers keep for the backward pass, what one layer keeps, what the
    backward pass of its experts needs beside)."""
    K, D, F = config.num_experts_per_tok or 1, config.hidden_size, config.moe_intermediate_size
    shared = (config.n_shared_experts or 0) * F
    keeps_fp32 = not (options.use_lora or training.deepspeed or training.single_gpu_full)
    stream = 4 if keeps_fp32 else low  # the residual stream
    # Both norms' inputs; q, k, v and attention; gate and up of experts, and of those shared.
    layer = 2 * D * stream + 4 * D * low + 2 * shared * low
    layer += 0 if options.recompute_experts else K * 2 * F * low
    layer += (2 * D + shared) * low  # inputs of linears and experts
    if options.use_lora and options.lora_dropout:  # the masks of dropout on these inputs
        layer += 4 * D + shared
    if options.use_lora:  # x A of experts
        layer += 2 * K * (options.lora_rank or 0) * low
    else:  # the router's input in fp32
        layer += 4 * D
    kept = D * stream if training.gradient_checkpointing else layer
    return config.num_hidden_layers * kept, layer, K * (2 * F + D) * low


def _computing_copies(
    model: nn.Module, options: ModelArguments, training: FineTuningArguments, low: int
) -> float:
    """Bytes of weights that are dequantised or cast for computing."""
    stacks = [
        full_shape(p).numel()
        for name, p in model.named_parameters()
        if name.endswith(("gate_up_proj", "down_proj"))  # inside of PEFT's wrappers too
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = model.config.num_hidden_layers if training.gradient_checkpointing else 1
    dequantised = max(stacks, default=0) * low if options.bits != 16 else 0
    cast = training.bf16 and not training.deepspeed  # Autograd keeps fp32 weights as bf16.
    return dequantised + (trained * low / layers if cast else 0)


def _stored(
    name: str,
    parameter: nn.Parameter,
    options: ModelArguments,
    training: FineTuningArguments,
    low: int,
) -> float:
    """Bytes of a parameter as training keeps it."""
    if parameter.requires_grad:
        return parameter.numel() * (low if training.deepspeed else 4)
    linear = ".layers." in name and "_proj" in name and "original_module" not in name
    if options.bits == 16 or not linear:
        return parameter.numel() * low
    if options.bits == 8:
        return parameter.numel() + 4 * parameter.numel() / parameter.shape[-1]
    scale = 1 + 4 / 256 if options.double_quant else 4  # bytes, for each 64 numbers
    return parameter.numel() * (0.5 + scale / 64)


def print_dry_run(
    model: nn.Module,
    folder: Path,
    options: ModelArguments,
    training: FineTuningArguments,
    lengths: list[int],
    disk: str,
) -> None:
    """Prints to stdout what a run would do.

    Args:
        model: that of `meta_model`.
        folder: where the base model is.
        lengths: the tokens of each row.
        disk: what the run would write.
    """
    console = Console(width=100)
    settings = _settings(folder, options, training, lengths) | {"disk": disk}
    console.print(_table("settings", [], [(key, str(value)) for key, value in settings.items()]))
    console.print(trainable_table(model))
    tokens = training.per_device_train_batch_size * max(lengths)
    memory = estimate(model, options, training, tokens)
    shown = {"activations": "activations, buffers"}
    rows = [(shown.get(part, part), _size(size)) for part, size in vars(memory).items()]
    rows.append(("in all", _size(memory.total)))
    title = f"memory a device at its peak (estimated), its parts then; {tokens:,} tokens at a time"
    console.print(_table(title, [], rows))
    if torch.cuda.is_available():
        free, there = torch.cuda.mem_get_info()
        fits = "fits" if memory.total + 0.5e9 < free else "does not fit"
        console.print(f"it {fits} the GPU here: {free / 1e9:.1f} of {there / 1e9:.1f} GB are free")


def _settings(
    folder: Path, options: ModelArguments, training: FineTuningArguments, lengths: list[int]
) -> dict[str, object]:
    """What a run is told to do, by the words of the dry run."""
    steps, clip = count_steps(training, len(lengths)), training.max_grad_norm
    every = f", every {training.save_steps:g}" if training.save_strategy == "steps" else ""
    return {
        "model": folder,
        "method": _method(options, training),
        "rows": f"{len(lengths):,} of at most {max(lengths):,} tokens, {sum(lengths):,} in all",
        "steps": f"{steps:,} of {rows_in_step(training)} rows",
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}, "
        f"{training.get_warmup_steps(steps)} steps of warm-up",
        "a step": f"{training.per_device_train_batch_size} rows x "
        f"{training.gradient_accumulation_steps} x {max(1, training.world_size)} device(s)",
        "optimizer": f"{optimizer_name(training)}, gradients "
        f"{f'clipped at {clip:g}' if clip else 'not clipped'}, weight decay "
        f"{training.weight_decay:g}",
        "computing in": "bf16" if training.bf16 else "fp32",
        "recomputing layers": "yes" if training.gradient_checkpointing else "no",
        "seed": training.seed,
        "checkpoints": f"by {training.save_strategy.value}{every}",
        "output": training.output_dir,
    }


def rows_in_step(training: FineTuningArguments) -> int:
    batch = training.per_device_train_batch_size * max(1, training.world_size)
    return batch * training.gradient_accumulation_steps


def steps_in_epoch(training: FineTuningArguments, rows: int) -> int:
    batch = training.per_device_train_batch_size * max(1, training.world_size)
    used = rows // batch * batch if training.dataloader_drop_last else rows
    return math.ceil(used / rows_in_step(training))


def count_steps(training: FineTuningArguments, rows: int) -> int:
    """The steps of a run over so many `rows`."""
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(steps_in_epoch(training, rows) * training.num_train_epochs)


def trainable_table(model: nn.Module) -> Table:
    """A table of how many parameters of each kind there are, and how many of them train."""
    rows = [(kind, f"{n:,}", f"{t:,}", f"{t / n:.2%}") for kind, n, t in parameter_table(model)]
    return _table("parameters", ["", "all", "trained", ""], rows)


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _method(options: ModelArguments, training: FineTuningArguments) -> str:
    stage = deepspeed_settings(training).get("zero_optimization", {}).get("stage")
    under = f" under ZeRO-{stage}" if stage else ""
    if not options.use_lora:
        return ("chosen modules" if options.trainable else "all weights") + under
    base = "" if options.bits == 16 else f" over a base in {options.bits} bits"
    return f"LoRA of rank {options.lora_rank}{base}{under}"


def _table(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        show_header=bool(columns),
        box=None,
        min_width=len(title) + 2,
    )
    for at, column in enumerate(columns or [""] * len(rows[0])):
        table.add_column(column, justify="right" if at and columns else "left")
    for row in rows:
        table.add_row(*row)
    return table
