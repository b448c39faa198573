"""The options of finetune.py as a table, and the parser that reads them.

Only the standard library is imported here, so that --help and a mistyped option are answered at
once. What options mean together is checked in deepseek_moe/training/options.py. The defaults that
count are in arguments.py beside it; those in the table are what --help shows.
"""

import argparse
import difflib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn


def true_or_false(text: str) -> bool:
    if text.lower() in ("1", "true", "t", "yes", "y"):
        return True
    if text.lower() in ("0", "false", "f", "no", "n"):
        return False
    raise ValueError(text)


class Option(NamedTuple):
    """One line of --help. An option of type `list` takes one value or more; one of type `bool`
    needs none to be True."""

    name: str
    type: type
    default: object
    help: str
    choices: tuple = ()
    least: float | None = None


ORDERS = ("group_by_length", "random", "sequential")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant")
SCHEDULES += ("constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr")
SCHEDULES += ("cosine_warmup_with_min_lr", "warmup_stable_decay")

# fmt: off
GROUPS = {
    "model": [
        Option("model_name_or_path", str, "models/tiny-base", "a folder or a hub id"),
        Option("attn_implementation", str, "auto", "or eager, sdpa, varlen, flash_attention_2"),
        Option("cache_dir", str, None, "where downloads and prepared data are kept"),
    ],
    "data": [
        Option("data_path", list, [], "files, folders or a hub id: instruction/output or messages"),
        Option("eval_data_path", list, [], "the same to evaluate on"),
        Option("eval_fraction", float, 0.0, "hold out this part of the rows to evaluate on"),
        Option("model_max_length", int, 512, "tokens of an example; a longer one is cut", least=2),
        Option("packing", bool, False, "put several examples into each row of model_max_length"),
        Option("columns", str, "", "your names of the fields: instruction=query,output=text"),
        Option("skip_bad_rows", bool, False, "leave out unusable rows instead of stopping"),
        Option("train_sampling_strategy", str, "group_by_length", "order", ORDERS),
        Option("dataloader_drop_last", bool, False, "leave out the last batch if it is not full"),
    ],
    "what trains": [
        Option("use_lora", bool, False, "train adapters instead of the weights"),
        Option("adapter", str, None, "go on from this LoRA adapter, with its rank and modules"),
        Option("trainable", str, None, "modules that train, by comma; else all (LoRA: all linear)"),
        Option("train_experts", str, None, "a profile or expert_cfg.json that says which train"),
        Option("expert_threshold", float, 0.2, "in each layer those with this part of the score"),
        Option("expert_share", float, None, "or this part of its experts, with the highest scores"),
        Option("expert_score", str, "gate", "that score, as ESFT names it", ("gate", "token")),
        Option("lora_rank", int, 8, "rank of the adapters; --lora_r is the same", least=1),
        Option("lora_alpha", float, 32.0, "adapters are scaled by alpha / rank"),
        Option("lora_dropout", float, 0.1, "dropout before the adapters"),
        Option("modules_to_save", str, "", "modules to train and save whole beside the adapters"),
        Option("bits", int, 16, "of the frozen base of LoRA or chosen experts", (16, 8, 4)),
        Option("quant_type", str, "nf4", "of 4 bits", ("nf4", "fp4")),
        Option("double_quant", bool, True, "quantise the scales of the 4 bits too"),
        Option("offload_experts", bool, False, "with --bits 4: keep the experts in host memory"),
        Option("save_delta", bool, False, "chosen experts: save only what changed, for export"),
        Option("merge_on_save", bool, False, "LoRA: write the whole merged model at the end too"),
        Option("single_gpu_full", bool, None, "all weights on one GPU, 4 bytes each, if possible"),
    ],
    "optimisation": [
        Option("num_train_epochs", float, 3.0, "how often each row is seen"),
        Option("max_steps", int, -1, "stop after so many steps, whatever the epochs"),
        Option("learning_rate", float, 5e-5, "the highest one", least=0),
        Option("lr_scheduler_type", str, "linear", "its course", SCHEDULES),
        Option("lr_scheduler_kwargs", str, None, """JSON for it, such as '{"min_lr": 1e-6}'"""),
        Option("warmup_steps", float, 0, "steps of warm-up; below 1: that part of all steps"),
        Option("optim", str, "adamw_torch_fused", "also adamw_bnb_8bit, sgd, ..."),
        Option("weight_decay", float, 0.0, "weight decay of AdamW"),
        Option("adam_beta1", float, 0.9, "decay of AdamW's average of gradients"),
        Option("adam_beta2", float, 0.999, "decay of AdamW's average of their squares"),
        Option("adam_epsilon", float, 1e-8, "keeps AdamW from dividing by 0"),
        Option("max_grad_norm", float, 1.0, "clip gradients at this norm; 0 for not"),
        Option("seed", int, 42, "decides adapters, dropout and the order of rows"),
        Option("full_determinism", bool, False, "the same bits in each run on a GPU, but slower"),
    ],
    "batches and memory": [
        Option("per_device_train_batch_size", int, 8, "rows at a time on each GPU", least=1),
        Option("per_device_eval_batch_size", int, 8, "the same in evaluation", least=1),
        Option("gradient_accumulation_steps", int, 1, "batches in a step", least=1),
        Option("bf16", bool, False, "compute in bf16 instead of fp32"),
        Option("gradient_checkpointing", bool, False, "recompute layers in the backward pass"),
        Option("cuda_graphs", bool, True, "LoRA, small batches: start all kernels at once"),
        Option("recompute_experts", bool, False, "recompute only the experts; needs --bf16 True"),
    ],
    "saving and evaluation": [
        Option("output_dir", str, None, "where checkpoints and the result are written"),
        Option("save_strategy", str, "steps", "when", ("steps", "epoch", "no")),
        Option("save_steps", float, 500, "save after so many; below 1: that part of all"),
        Option("save_total_limit", int, None, "keep so many checkpoints, the newest; else all"),
        Option("eval_strategy", str, "no", "when", ("no", "steps", "epoch")),
        Option("eval_steps", float, None, "evaluate after so many; else as often as it is logged"),
    ],
    "looking and logging": [
        Option("dry_run", bool, False, "print settings, steps, memory and disk, and stop"),
        Option("show_examples", int, 0, "print so many examples, marking what trains", least=0),
        Option("logging_steps", float, 1, "log after so many; below 1: that part of all", least=0),
        Option("report_to", str, "tensorboard", "also wandb, ..., or none"),
        Option("disable_tqdm", bool, False, "print lines without a progress bar"),
    ],
    "devices": [
        Option("deepspeed", str, None, "a file of configs/; start it with deepspeed, not python"),
        Option("ddp_timeout", int, 1800, "seconds that processes wait for one another", least=1),
        Option("use_cpu", bool, False, "train without a GPU; else only where there is none"),
    ],
}
# fmt: on
OPTIONS = {option.name: option for options in GROUPS.values() for option in options}
REQUIRED = {
    "data_path": "give a file, a folder or a hub id",
    "output_dir": "give a folder for checkpoints and the result",
}
OLD_NAMES = {
    "--activation_checkpointing": "--gradient_checkpointing",
    "--evaluation_strategy": "--eval_strategy",
    "--lora_r": "--lora_rank",
    "--max_length": "--model_max_length",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "--warmup_ratio": "--warmup_steps",  # which is a share of all steps if it is below 1
}
WITHOUT_EFFECT = ("logging_dir", "overwrite_output_dir", "save_safetensors")
"""Options of older versions of transformers; `make_arguments` notes that they have no effect."""

# Other options of transformers' Trainer are taken only at the value that they have here.
REFUSED = {
    "do_train": ("True", "this trains; for a look, --dry_run True"),
    "fp16": ("False", "it scales the loss, and the balance loss would miss it; use --bf16 True"),
    "auto_find_batch_size": ("False", "--dry_run True says what fits"),
    "do_predict": ("False", "there is nothing to predict; leave it out"),
    "enable_jit_checkpoint": ("False", "SIGTERM saves a checkpoint anyway; leave it out"),
    "fsdp": ("None", "several GPUs are used with --deepspeed"),
    "ignore_data_skip": ("False", "a repeated run would see rows again that it has trained on"),
    "label_smoothing_factor": ("0.0", "transformers would take its labels unshifted; leave it out"),
    "load_best_model_at_end": ("False", "choose among the checkpoints"),
    "logging_nan_inf_filter": ("False", "it would log NaN as a number; leave it out"),
    "push_to_hub": ("False", "upload the finished folder: hf upload NAME FOLDER"),
    "remove_unused_columns": ("False", "the collator takes what it needs; leave it out"),
    "resume_from_checkpoint": ("None", "repeating a command goes on by itself; leave it out"),
    "save_only_model": ("False", "nothing could go on from such a checkpoint; leave it out"),
    "torch_compile": ("False", "the kernels for a GPU are used by themselves; leave it out"),
    "use_liger_kernel": ("False", "the kernels are used by themselves on a GPU"),
}
UNUSED = {
    "False": "batch_eval_metrics bf16_full_eval dataloader_persistent_workers do_eval "
    "eval_on_start eval_use_gather_object fp16_full_eval hub_always_push logging_first_step "
    "prediction_loss_only restore_callback_states_from_checkpoint save_on_each_node use_cache",
    "True": "average_tokens_across_devices dataloader_in_order dataloader_pin_memory "
    "eval_do_concat_batches log_on_each_node skip_memory_metrics",
    "None": "accelerator_config activation_checkpointing_kwargs data_seed "
    "dataloader_prefetch_factor dataloader_multiprocessing_context ddp_backend "
    "ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph "
    "eval_accumulation_steps fsdp_config gradient_checkpointing_kwargs greater_is_better "
    "hub_model_id hub_private_repo hub_revision hub_token include_for_metrics label_names "
    "liger_kernel_config metric_for_best_model neftune_noise_alpha "
    "optim_args optim_target_modules parallelism_config run_name tf32 "
    "torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id "
    "trackio_space_id trackio_static_space_id",
    "0": "dataloader_num_workers eval_delay",
    "": "debug",
    "every_save": "hub_strategy",
    "huggingface": "project",
    "length": "length_column_name",
    "no": "include_num_input_tokens_seen",
    "passive": "log_level",
    "steps": "logging_strategy",
    "warning": "log_level_replica",
}


def parse_options(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The options in `argv` (None: the command line's), by name; only those that are given.

    Prints --help and leaves, or leaves with one line (exit code 2) on an option that is unknown,
    refused, missing or has a value that it cannot have.
    """
    parser = _parser()
    words = sys.argv[1:] if argv is None else argv
    if empty := next((word for word in words if word.endswith("=--")), None):
        parser.error(f"{empty} has no value")  # argparse would take it for an empty list, or True
    found, unknown = parser.parse_known_args([_today(word) for word in words])
    given = vars(found)
    if unknown:
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, [f"--{known}" for known in OPTIONS], 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options"
        parser.error(f"there is no option {name}; {hint}")
    _refuse_other_values(parser, given)
    if (grouped := given.pop("group_by_length", None)) is not None:
        order = "group_by_length" if grouped else "random"
        given.setdefault("train_sampling_strategy", order)
    for name, remedy in REQUIRED.items():
        if not given.get(name):
            parser.error(f"--{name} is {'empty' if name in given else 'missing'}; {remedy}")
    for name, value in given.items():
        choices, least = OPTIONS[name][-2:] if name in OPTIONS else ((), None)
        if choices and value not in choices:
            parser.error(f"--{name} is {value}; use one of {', '.join(map(str, choices))}")
        if least is not None and not value >= least:
            parser.error(f"--{name} is {value}; it must be {least} or more")
    return given


def _today(word: str) -> str:
    """An option's name as it is now: with underscores, and not an old one."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    name = f"--{name[2:].replace('-', '_')}"
    return OLD_NAMES.get(name, name) + equals + value


def _parser() -> "_Parser":
    parser = _Parser(
        usage="finetune.py --data_path FILE --output_dir FOLDER [--option value ...]",
        description="Fine-tunes DeepSeek-MoE: fully, with LoRA, or with QLoRA.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    values: dict[type, dict[str, Any]] = {
        bool: {"type": true_or_false, "nargs": "?", "const": True, "metavar": "True"},
        list: {"type": str, "nargs": "+", "metavar": "FILE"},
        int: {"type": int, "metavar": "N"},
        float: {"type": float, "metavar": "X"},
        str: {"type": str, "metavar": "NAME"},
    }
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text, choices, _ in options:
            if choices:
                text += f": {', '.join(map(str, choices))}"
                text = text.replace(f" {default}", f" {default} (default)", 1)
            elif default not in (None, False, "", [], -1):
                text += f" (default {default})"
            group.add_argument(f"--{name}", help=text, **values[kind])
    hidden = argparse.SUPPRESS
    parser.add_argument("--local_rank", type=int, help=hidden)  # DeepSpeed's launcher adds it
    parser.add_argument("--group_by_length", help=hidden, **values[bool])  # its old name
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", nargs="?", help=hidden)
    for name in (*REFUSED, *" ".join(UNUSED.values()).split()):
        parser.add_argument(f"--{name}", nargs="*", help=hidden)
    return parser


def _refuse_other_values(parser: "_Parser", given: dict[str, Any]) -> None:
    """Takes the options of REFUSED and UNUSED out of `given`, at the one value that they have."""
    others = {name: (value, "") for value, names in UNUSED.items() for name in names.split()}
    for name, (taken, why) in (REFUSED | others).items():
        if name not in given:
            continue
        value = " ".join(given.pop(name)) or ("" if taken == "" else "True")
        if why and not _same(value, taken):
            parser.error(f"--{name} {value} is not supported; {why}")
        elif not _same(value, taken):
            parser.error(f"there is no option --{name}; --help lists the options")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line by the first process; the launcher ends the others when one has left."""
        message = " ".join(message.removeprefix("argument ").split())
        hint = "" if ";" in message else "; --help lists the options"
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message}{hint}", file=sys.stderr)
        else:
            time.sleep(3)
        sys.exit(2)


def _same(one: str, other: str) -> bool:
    """Whether two texts are the same value: False is 0, and 0 is 0.0."""
    for read in (true_or_false, float):
        with suppress(ValueError):
            return read(one) == read(other)
    return one == other


@contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once, with exit code 130 and without a traceback."""
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
