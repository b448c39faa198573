"""Options of a fine-tuning run -> its settings, checked together."""

import math
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError, as_user_error, first_words
from ..json_file import read_object
from .arguments import (
    STEP_IN_BACKWARD,
    Arguments,
    DataArguments,
    FineTuningArguments,
    ModelArguments,
    optimizer_name,
)
from .compute.varlen_attention import VARLEN
from .deepspeed_file import check_deepspeed_file, zero_stage


def make_arguments(given: Mapping[str, Any]) -> Arguments:
    """The settings of a run for the options that are `given`, by name, and the defaults of others.

    Raises:
        UserError: settings that cannot work, or that have no effect.
    """
    kinds = (ModelArguments, DataArguments, FineTuningArguments)
    groups = [
        {one.name: given[one.name] for one in fields(kind) if one.name in given} for kind in kinds
    ]
    for name in sorted(given.keys() - set().union(*groups)):
        print(f"note: --{name} has no effect on transformers 5", file=sys.stderr)
    model, data = ModelArguments(**groups[0]), DataArguments(**groups[1])
    if model.adapter:
        _take_adapter(model, given)
    training = _training_arguments(groups[2])
    _refuse_unneeded(given, model, training)
    _check_model(model, training)
    _check_training(training)
    _check_evaluation(data, training)
    _check_reporters(training)
    _settle_single_gpu_full(model, training, clips="max_grad_norm" in given)
    return model, data, training


def _take_adapter(model: ModelArguments, given: Mapping[str, Any]) -> None:
    """Takes rank and alpha of the adapter to go on from; it decides what trains, too."""
    for name in ("lora_rank", "lora_alpha", "trainable", "modules_to_save", "train_experts"):
        if name in given:
            raise UserError(f"--{name} is that of --adapter {model.adapter}; leave one of them out")
    file = Path(model.adapter) / "adapter_config.json"
    remedy = "give the folder of a LoRA adapter"
    config = read_object(file, remedy)
    with as_user_error(f"--adapter: {file} cannot be used", remedy):
        model.lora_rank, model.lora_alpha = int(config["r"]), float(config["lora_alpha"])


def _training_arguments(given: dict[str, Any]) -> FineTuningArguments:
    file = given.get("deepspeed")
    if file:
        check_deepspeed_file(file)
    given.setdefault("use_cpu", not torch.cuda.is_available())
    try:
        with warnings.catch_warnings():
            # transformers warns of --gradient_checkpointing, which it will call by another name.
            warnings.simplefilter("ignore", FutureWarning)
            return FineTuningArguments(**given)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"{first_words(error)}; change that option") from error


def _refuse_unneeded(
    given: Mapping[str, Any], model: ModelArguments, training: FineTuningArguments
) -> None:
    """Refuses options that have no effect beside the others."""
    lora = ("adapter", "lora_rank", "lora_alpha", "lora_dropout")
    lora += ("modules_to_save", "merge_on_save")
    experts = ("expert_score", "expert_threshold", "expert_share", "save_delta")
    for options, is_used, wanted in (
        (lora, model.use_lora, "--use_lora True"),
        (("quant_type", "double_quant", "offload_experts"), model.bits == 4, "--bits 4"),
        (("recompute_experts",), training.bf16, "--bf16 True"),
        (experts, bool(model.train_experts), "--train_experts FILE"),
    ):
        found = next((name for name in options if given.get(name, False) is not False), None)
        if found and not is_used:
            raise UserError(f"--{found} has no effect without {wanted}; add that, or leave it out")


def _check_model(model: ModelArguments, training: FineTuningArguments) -> None:
    if model.save_delta and model.use_lora:
        raise UserError("--save_delta has no effect on LoRA, which saves an adapter; leave it out")
    if model.bits != 16 and not (model.use_lora or model.train_experts):
        raise UserError(
            f"--bits {model.bits} freezes the weights, so nothing would train; add --use_lora True "
            "or --train_experts FILE"
        )
    if model.bits != 16 and zero_stage(training) == 3:
        raise UserError(
            "ZeRO-3 cannot divide quantised weights among GPUs; "
            "use --deepspeed configs/ds_config_zero2_no_offload.json with --bits 4 or 8"
        )
    if model.offload_experts and not model.use_lora:
        raise UserError(
            "--offload_experts True keeps all experts frozen in host memory; train adapters on "
            "them: --use_lora True"
        )
    if model.offload_experts and (training.deepspeed or training.world_size > 1):
        raise UserError(
            "--offload_experts True is for one GPU; start it with python and without --deepspeed"
        )
    known = {"auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if model.attn_implementation not in known and "/" not in model.attn_implementation:
        raise UserError(
            f"--attn_implementation {model.attn_implementation} is unknown; use auto, eager, sdpa, "
            f"{VARLEN} or flash_attention_2"
        )


def _check_training(training: FineTuningArguments) -> None:
    if not 0 <= training.seed < 2**32:
        raise UserError(f"--seed is {training.seed}; it must be from 0 to below 2**32")
    if training.max_steps == 0:
        raise UserError("--max_steps is 0; nothing would train; leave it out for whole epochs")
    if not 0 < training.num_train_epochs < math.inf and training.max_steps < 0:
        raise UserError(f"--num_train_epochs is {training.num_train_epochs}; nothing would train")
    # What Trainer makes after the model is loaded is made once before, over one number. Some values
    # of --lr_scheduler_kwargs are first computed with after the warmup, or near the end.
    failed = f"--lr_scheduler_type {training.lr_scheduler_type.value} cannot be made"
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    with as_user_error(failed, "change it, or --lr_scheduler_kwargs"):
        schedule = get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
        for _ in range(10):
            optimizer.step()
            schedule.step()
    if training.optim != STEP_IN_BACKWARD:
        with (
            as_user_error(f"--optim {optimizer_name(training)} cannot be made", "use another"),
            suppress(ValueError),  # some want the model
        ):
            Trainer.get_optimizer_cls_and_kwargs(training)


def _check_evaluation(data: DataArguments, training: FineTuningArguments) -> None:
    """Refuses to evaluate on two kinds of rows, on none, or never."""
    if data.eval_data_path and data.eval_fraction:
        raise UserError("--eval_data_path and --eval_fraction are both given; leave out one")
    if training.eval_strategy == "no" and (data.eval_data_path or data.eval_fraction):
        raise UserError(
            "there are rows to evaluate on, but --eval_strategy is no; add --eval_strategy epoch, "
            "or steps with --eval_steps"
        )
    if not 0 <= data.eval_fraction < 1:
        raise UserError(f"--eval_fraction is {data.eval_fraction}; it must be from 0 to below 1")
    if training.eval_strategy != "no" and not (data.eval_data_path or data.eval_fraction):
        raise UserError(
            f"--eval_strategy {training.eval_strategy.value} has nothing to evaluate on; give "
            "--eval_data_path or --eval_fraction"
        )


def _check_reporters(training: FineTuningArguments) -> None:
    """transformers would find a missing package only after it has loaded the model."""
    with as_user_error(f"--report_to {' '.join(training.report_to)}", "or log to tensorboard"):
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()


def _settle_single_gpu_full(
    model: ModelArguments, training: FineTuningArguments, clips: bool
) -> None:
    """Makes `single_gpu_full` True or False, and sets the optimizer and the clipping that go with
    True. `clips` says whether --max_grad_norm was given."""
    devices = training.world_size
    accumulation = training.gradient_accumulation_steps
    against = {
        "--use_lora True, which trains adapters; leave one of them out": model.use_lora,
        "--deepspeed, which divides optimizer and gradients itself; leave one of them out": bool(
            training.deepspeed
        ),
        f"{devices} devices; start it with python": devices > 1,
        "fp32, it keeps the weights in bf16; add --bf16 True": not training.bf16,
        f"--gradient_accumulation_steps {accumulation}, it steps in each backward pass; use a "
        "larger --per_device_train_batch_size": accumulation > 1,
        f"--optim {optimizer_name(training)}, it has an optimizer of its own; leave one of them "
        "out": training.optim != FineTuningArguments.optim,
        f"--max_grad_norm {training.max_grad_norm:g}, it lets gradients go before their norm is "
        "known; use 0": clips and training.max_grad_norm > 0,
    }
    found = next((what for what, applies in against.items() if applies), None)
    if training.single_gpu_full and found:
        raise UserError(f"--single_gpu_full True does not work with {found}")
    if training.single_gpu_full is None:
        suits = bool(model.train_experts) or not model.trainable
        training.single_gpu_full = found is None and suits and training.device.type == "cuda"
    if training.single_gpu_full:
        training.optim, training.max_grad_norm = STEP_IN_BACKWARD, 0.0
        print(
            "training on one GPU: weights in bf16, rounded stochastically, AdamW in 8 bits inside "
            "the backward pass; gradients are not clipped (--single_gpu_full False: fp32, AdamW)",
            file=sys.stderr,
        )
