"""The options of finetune.py: the published script's names, transformers' TrainingArguments, ours.

Options that transformers 5 renamed or dropped are understood under their old names too, so that the
published commands work as written.
"""

import difflib
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError
from ..files import BUNDLED_MODEL
from .compute.varlen_attention import VARLEN

STEP_IN_BACKWARD = "adamw_8bit_in_backward"
"""The optimizer of --single_gpu_full, where transformers has the names of its own."""
ORDERS = ("group_by_length", "random", "sequential")
ALL_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def _option(default: object, text: str, *aliases: str) -> object:
    return field(default=default, metadata={"help": text, "aliases": list(aliases)})


@dataclass
class ModelArguments:
    model_name_or_path: str = _option(str(BUNDLED_MODEL), "a folder or a hub id")
    attn_implementation: str = _option(
        "auto", "eager, sdpa, varlen, flash_attention_2, ...; auto: varlen on a GPU, else sdpa"
    )
    cache_dir: str | None = _option(None, "where downloads and prepared data are kept")
    use_lora: bool = _option(False, "train adapters instead of the weights")
    trainable: str | None = _option(
        None, f"modules that train, by comma (LoRA: {ALL_LINEARS}; else all)"
    )
    lora_rank: int = _option(8, "rank of the adapters", "--lora_r")
    lora_alpha: float = _option(32.0, "the adapters' product is scaled by alpha / rank")
    lora_dropout: float = _option(0.1, "dropout before the adapters")
    modules_to_save: str = _option("", "modules to train and save whole beside the adapters")
    bits: int = _option(16, "4 or 8 quantise the base of LoRA, routed experts included")
    quant_type: str = _option("nf4", "nf4 or fp4, for 4 bits")
    double_quant: bool = _option(True, "quantise the scales of the 4 bits too")
    recompute_experts: bool = _option(
        False, "keep nothing of the experts for the backward pass: a part of checkpointing"
    )
    merge_on_save: bool = _option(False, "LoRA: write the whole merged model at the end too")

    def attention(self, dtype: torch.dtype) -> str:
        """The attention implementation for weights of `dtype`."""
        if self.attn_implementation != "auto":
            return self.attn_implementation
        return VARLEN if torch.cuda.is_available() and dtype == torch.bfloat16 else "sdpa"


@dataclass
class DataArguments:
    data_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files, folders or a hub id: instruction/output or messages",
            "nargs": "+",
        },
    )
    eval_data_path: list[str] = field(default_factory=list, metadata={"nargs": "+"})
    eval_fraction: float = _option(0.0, "hold out this part of the data for evaluation")
    model_max_length: int = _option(
        512, "tokens of an example; a longer one is cut", "--max_length"
    )
    packing: bool = _option(False, "put several examples into a row of model_max_length tokens")
    skip_bad_rows: bool = _option(False, "drop rows that are not usable instead of stopping")
    show_examples: int = _option(0, "print so many examples, with what is trained in colour")
    dry_run: bool = _option(False, "print settings, steps and memory, and stop before the weights")


@dataclass
class FineTuningArguments(TrainingArguments):
    logging_steps: float = _option(1, "log every so many steps")
    report_to: str = _option("tensorboard", "where to log to; none for nowhere")
    logging_nan_inf_filter: bool = _option(False, "must stay off: it would log NaN as a number")
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "or random, or sequential", "choices": ORDERS},
    )
    remove_unused_columns: bool = _option(False, "must stay off: the collator takes what it needs")
    single_gpu_full: bool | None = field(
        default=None,
        metadata={
            "help": "all weights on one GPU, 4 bytes each; None: where nothing stands against it",
            "nargs": "?",
            "const": True,
        },
    )

    @property
    def n_gpu(self) -> int:
        """One a process: for more transformers takes torch's DataParallel, which this code does
        not run under."""
        return min(1, super().n_gpu)


OLD_NAMES = {
    "--evaluation_strategy": "--eval_strategy",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
}
if any(one.name == "activation_checkpointing" for one in fields(TrainingArguments)):
    OLD_NAMES |= {
        f"--gradient_checkpointing{end}": f"--activation_checkpointing{end}"
        for end in ("", "_kwargs")
    }
LEAST = (
    ("model", "lora_rank", 1),
    ("data", "model_max_length", 2),
    ("data", "show_examples", 0),
    ("training", "per_device_train_batch_size", 1),
    ("training", "per_device_eval_batch_size", 1),
    ("training", "gradient_accumulation_steps", 1),
    ("training", "logging_steps", 0),  # below 1: that part of all steps
    ("training", "learning_rate", 0),
)
DROPPED = ("--logging_dir", "--overwrite_output_dir", "--save_safetensors", "--group_by_length")

NOT_SUPPORTED = {  # option: when it is off, and why it is not taken
    "fp16": (False, "it scales the loss, and the balance loss would miss it; use --bf16 True"),
    "logging_nan_inf_filter": (False, "it would log NaN as a number; leave it out"),
    "label_smoothing_factor": (0.0, "transformers would take its labels unshifted; leave it out"),
    "load_best_model_at_end": (False, "choose among the checkpoints"),
    "save_only_model": (False, "nothing could go on from such a checkpoint; leave it out"),
    "resume_from_checkpoint": (None, "repeating a command goes on by itself; leave it out"),
    "ignore_data_skip": (False, "a repeated run would see rows again that it has trained on"),
    "do_predict": (False, "there is nothing to predict; leave it out"),
}
OF_LORA = ("lora_rank", "lora_r", "lora_alpha", "lora_dropout", "modules_to_save")
OF_4_BITS = ("quant_type", "double_quant")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}; --help lists the options")


def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, FineTuningArguments]:
    """The three groups of options.

    Raises:
        UserError: an unknown option (with the nearest known one), or settings that cannot work.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, FineTuningArguments),
        allow_abbrev=False,
        description="Fine-tunes DeepSeek-MoE: fully, with LoRA, or with QLoRA.",
    )
    argv = _translate(list(argv))
    known = [name for action in parser._actions for name in action.option_strings]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options"
            raise UserError(f"there is no option {name}; {hint}")
    given = _names_of(argv)
    if not {"output_dir", "help", "h"} & given:
        raise UserError("--output_dir is missing; give a folder for checkpoints and the result")
    if not torch.cuda.is_available() and "--use_cpu" not in argv:
        argv += ["--use_cpu", "True"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers, on its own deprecations
        model, data, training = _build(parser, argv)
    training.label_names = ["labels"]
    _refuse_what_cannot_work(model, data, training)
    _refuse_what_has_no_effect(model, training, given)
    _refuse_missing_reporters(training)
    _settle_single_gpu_full(model, training, clips="max_grad_norm" in given)
    _start_deepspeed(training)
    return model, data, training


def _start_deepspeed(training: FineTuningArguments) -> None:
    if not is_deepspeed_available():
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no other
    with redirect_stdout(sys.stderr):  # it prints, and logs to what stdout is at its import
        import deepspeed

        if training.deepspeed and training.use_cpu:  # accelerate does it on GPUs only
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def _names_of(argv: Sequence[str]) -> set[str]:
    """Of the options in it."""
    options = (word.partition("=")[0] for word in argv if word.startswith("-"))
    return {option.lstrip("-").replace("-", "_") for option in options}


def _translate(argv: list[str]) -> list[str]:
    """Old names to new; options that nothing reads any more are dropped with a note."""
    out, dropped = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if name in DROPPED:
            print(f"note: {name} has no effect on transformers 5", file=sys.stderr)
            dropped = not equals
            continue
        if not (dropped and not word.startswith("--")):  # its value
            out.append(OLD_NAMES.get(name, name) + equals + value)
        dropped = False
    return out


def _build(parser: HfArgumentParser, argv: list[str]):
    file = parser.parse_args(argv).deepspeed
    if file and not file.startswith("{"):
        _refuse_broken_settings(file)
    if file and "RANK" not in os.environ:
        raise UserError(
            "--deepspeed needs its launcher; write deepspeed (deepspeed --num_gpus 1 for one GPU) "
            "instead of python"
        )
    try:
        return parser.parse_args_into_dataclasses(argv)
    except UserError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        said = " ".join(str(error).split())[:400].rstrip(".")
        raise UserError(f"{said}; change that option") from error


def _refuse_broken_settings(file: str) -> None:
    """transformers would end in its depths."""
    one = "configs/ds_config_zero2_no_offload.json"
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        right = isinstance(settings["zero_optimization"]["stage"], int)
    except OSError as error:
        raise UserError(
            f"--deepspeed {file} cannot be read: {error.strerror}; give a file such as {one}"
        ) from error
    except ValueError as error:
        raise UserError(f"--deepspeed {file} is not JSON ({error}); mend it") from error
    except (TypeError, KeyError):
        right = False
    if not right:
        raise UserError(
            f"--deepspeed {file} has no number as the stage of zero_optimization; give it one, as "
            f"{one} does"
        )


def _refuse_what_cannot_work(
    model: ModelArguments, data: DataArguments, training: FineTuningArguments
) -> None:
    if not training.output_dir:
        raise UserError("--output_dir is empty; give a folder")
    if not data.data_path:
        raise UserError("--data_path is missing; give a file, a folder or a hub id")
    if model.bits not in (4, 8, 16):
        raise UserError(f"--bits is {model.bits}; use 4, 8, or 16 for none")
    if model.quant_type not in ("nf4", "fp4"):
        raise UserError(f"--quant_type is {model.quant_type}; use nf4 or fp4")
    for group, name, least in LEAST:
        options = {"model": model, "data": data, "training": training}[group]
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be {least} or more")
    if model.bits != 16 and not model.use_lora:
        raise UserError(
            f"--bits {model.bits} freezes the weights, so nothing would train; add --use_lora True"
        )
    if model.bits != 16 and zero_stage(training) == 3:
        raise UserError(
            "ZeRO-3 cannot divide quantised weights among GPUs; "
            "use --deepspeed configs/ds_config_zero2_no_offload.json with --bits 4 or 8"
        )
    for block, option in (("scheduler", "--lr_scheduler_type"), ("optimizer", "--optim")):
        if block in deepspeed_settings(training):
            raise UserError(
                f"{training.deepspeed} has a block {block!r}, which would silently replace what "
                f"{option} and --learning_rate say; take it out"
            )
    if model.merge_on_save and not model.use_lora:
        raise UserError("--merge_on_save is for LoRA; a full fine-tuning is saved whole anyway")
    for name, (off, why) in NOT_SUPPORTED.items():
        if getattr(training, name) != off:
            raise UserError(f"--{name} is not supported: {why}")
    if training.save_strategy == "best":
        raise UserError("--save_strategy best is not supported; use steps, epoch or no")
    known = {"auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if model.attn_implementation not in known and "/" not in model.attn_implementation:
        raise UserError(
            f"--attn_implementation {model.attn_implementation} is unknown; use auto, eager, sdpa, "
            f"{VARLEN} or flash_attention_2"
        )
    if not 0 <= training.seed < 2**32:
        raise UserError(f"--seed is {training.seed}; it must be from 0 to below 2**32")
    if training.max_steps == 0:
        raise UserError("--max_steps is 0; nothing would train; leave it out for whole epochs")
    if not 0 < training.num_train_epochs < math.inf and training.max_steps < 0:
        raise UserError(f"--num_train_epochs is {training.num_train_epochs}; nothing would train")
    _refuse_evaluation(data, training)


def _refuse_evaluation(data: DataArguments, training: FineTuningArguments) -> None:
    """That is asked for in two ways, in none, or of no part of the rows."""
    if data.eval_data_path and data.eval_fraction:
        raise UserError("give --eval_data_path or --eval_fraction, not both")
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


def _refuse_what_has_no_effect(
    model: ModelArguments, training: FineTuningArguments, given: set[str]
) -> None:
    """Among the `given` options."""
    for options, there, wanted in (
        (OF_LORA, model.use_lora, "--use_lora True"),
        (OF_4_BITS, model.bits == 4, "--bits 4"),
    ):
        found = next((name for name in options if name in given), None)
        if found and not there:
            raise UserError(f"--{found} has no effect without {wanted}; add that, or leave it out")
    if model.recompute_experts and not training.bf16:
        raise UserError("--recompute_experts has no effect in fp32; add --bf16 True")
    if "do_train" in given and not training.do_train:
        raise UserError("--do_train False has no effect: this trains; for a look, --dry_run True")


def _refuse_missing_reporters(training: FineTuningArguments) -> None:
    """transformers would find out when the model is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        said = str(error).rstrip(".")
        raise UserError(
            f"--report_to {' '.join(training.report_to)}: {said}; or log to tensorboard"
        ) from error


def _settle_single_gpu_full(
    model: ModelArguments, training: FineTuningArguments, clips: bool
) -> None:
    """Makes `single_gpu_full` True or False, and the settings that it decides what they are then.
    `clips`: --max_grad_norm was given."""
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
        f"--optim {getattr(training.optim, 'value', training.optim)}, it has an optimizer of its "
        "own; leave one of them out": training.optim != FineTuningArguments.optim,
        "--optim_args, which its optimizer does not take; leave one of them out": bool(
            training.optim_args
        ),
        f"--max_grad_norm {training.max_grad_norm:g}, it lets gradients go before their norm is "
        "known; use 0": clips and training.max_grad_norm > 0,
    }
    found = next((what for what, there in against.items() if there), None)
    if training.single_gpu_full and found:
        raise UserError(f"--single_gpu_full True does not work with {found}")
    if training.single_gpu_full is None:
        all_train = found is None and not model.trainable
        training.single_gpu_full = all_train and training.device.type == "cuda"
    if training.single_gpu_full:
        training.optim, training.max_grad_norm = STEP_IN_BACKWARD, 0.0
        print(
            "training on one GPU: weights in bf16, rounded stochastically, AdamW in 8 bits inside "
            "the backward pass; gradients are not clipped (--single_gpu_full False: fp32, AdamW)",
            file=sys.stderr,
        )


def deepspeed_settings(training: FineTuningArguments) -> dict:
    """The DeepSpeed JSON of a run; empty without one."""
    if not training.deepspeed:
        return {}
    if isinstance(training.deepspeed, dict):
        return training.deepspeed
    return json.loads(Path(training.deepspeed).read_text(encoding="utf-8"))


def zero_stage(training: FineTuningArguments) -> int:
    return deepspeed_settings(training).get("zero_optimization", {}).get("stage", 0)


def split_commas(text: str | None) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]
