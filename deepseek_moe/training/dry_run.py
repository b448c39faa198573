"""What a fine-tuning run would do, and the memory that it would take, without loading a weight."""

import math
from pathlib import Path

import torch
from torch import nn

from ..files import readable_size
from ..model.configuration_deepseek import DeepseekConfig
from ..model.modeling_deepseek import DeepseekForCausalLM
from .arguments import FineTuningArguments, ModelArguments, optimizer_name
from .deepspeed_file import zero_stage
from .memory_need import CUDA, estimate, smaller
from .parameter_counts import parameter_table
from .trainable import adapt


def meta_model(folder: Path, options: ModelArguments) -> nn.Module:
    """The model that would train, with its adapters, on the meta device.

    Raises:
        UserError: `options` name what cannot train.
    """
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig.from_pretrained(folder))
        return adapt(model, options)


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
    print("settings")
    for name, value in (_settings(folder, options, training, lengths) | {"disk": disk}).items():
        print(f"{name:20}{value}")
    print(f"\n{trainable_table(model)}\n")
    tokens = training.per_device_train_batch_size * max(lengths)
    memory = estimate(model, options, training, tokens)
    print(f"memory a device at its peak (estimated), its parts then; {tokens:,} tokens at a time")
    parts = {name: size for name, size in vars(memory).items() if name != "host"}
    for part, size in (parts | {"in all": memory.total}).items():
        print(f"{part.replace('activations', 'activations, buffers'):24}{readable_size(size)}")
    if memory.host:
        print(f"and in pinned host memory, the experts: {readable_size(memory.host)}")
    if torch.cuda.is_available():
        free, there = torch.cuda.mem_get_info()
        fits = memory.total + CUDA < free
        print(
            f"it {'fits' if fits else 'does not fit'} the GPU here: {free / 1e9:.1f} of "
            f"{there / 1e9:.1f} GB are free"
        )
        if not fits:
            print(smaller(model, options, training, tokens, free))


def _settings(
    folder: Path, options: ModelArguments, training: FineTuningArguments, lengths: list[int]
) -> dict[str, object]:
    """What a run is told to do, by the words of the dry run."""
    steps, clip = count_steps(training, len(lengths)), training.max_grad_norm
    accumulation, devices = training.gradient_accumulation_steps, max(1, training.world_size)
    every = f", every {training.save_steps:g}" if training.save_strategy == "steps" else ""
    return {
        "model": folder,
        "method": _method(options, training),
        "rows": f"{len(lengths):,} of at most {max(lengths):,} tokens, {sum(lengths):,} in all",
        "steps": f"{steps:,} of {_rows_in_batch(training) * accumulation} rows",
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}, "
        f"{training.get_warmup_steps(steps)} steps of warm-up",
        "a step": f"{training.per_device_train_batch_size} rows x {accumulation} x {devices} "
        "device(s)",
        "optimizer": f"{optimizer_name(training)}, gradients "
        f"{f'clipped at {clip:g}' if clip else 'not clipped'}, weight decay "
        f"{training.weight_decay:g}",
        "computing in": "bf16" if training.bf16 else "fp32",
        "recomputing layers": "yes" if training.gradient_checkpointing else "no",
        "seed": training.seed,
        "checkpoints": f"by {training.save_strategy.value}{every}",
        "output": training.output_dir,
    }


def _method(options: ModelArguments, training: FineTuningArguments) -> str:
    under = f" under ZeRO-{stage}" if (stage := zero_stage(training)) else ""
    if not (options.use_lora or options.train_chosen_whole):
        return ("chosen modules" if options.trainable else "all weights") + under
    base = "" if options.bits == 16 else f" over a base in {options.bits} bits"
    chosen = sum(map(len, (options.chosen_experts or {}).values()))
    if options.train_chosen_whole:
        others = " and other modules" if options.trainable else ""
        return f"{chosen:,} chosen experts{others}{base}{under}"
    on = f" on {chosen:,} chosen experts" if chosen else ""
    return f"LoRA of rank {options.lora_rank}{on}{base}{under}"


def _rows_in_batch(training: FineTuningArguments) -> int:
    return training.per_device_train_batch_size * max(1, training.world_size)


def steps_in_epoch(training: FineTuningArguments, rows: int) -> int:
    batch = _rows_in_batch(training)
    used = rows // batch * batch if training.dataloader_drop_last else rows
    return math.ceil(used / (batch * training.gradient_accumulation_steps))


def count_steps(training: FineTuningArguments, rows: int) -> int:
    """The steps of a run over so many `rows`."""
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(steps_in_epoch(training, rows) * training.num_train_epochs)


def trainable_table(model: nn.Module) -> str:
    """A table of how many parameters of each kind there are, and how many of them train."""
    lines = [f"{'parameters':20}{'all':>16}{'trained':>16}"]
    for kind, total, trained in parameter_table(model):
        lines.append(f"{kind:20}{total:16,}{trained:16,}{trained / total:9.2%}")
    return "\n".join(lines)
