"""Fine-tunes DeepSeek-MoE: fully, with LoRA, or with QLoRA, alone or under DeepSpeed.

    python finetune.py --data_path data.json --output_dir out --use_lora True
    deepspeed finetune.py --data_path data.json --output_dir out --bf16 True \\
        --deepspeed configs/ds_config_zero3.json

Repeating a command goes on where it was interrupted. --help lists the options, and --dry_run True
says what a run would do and need.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before anything imports them: libraries warn one another of renamed functions, and bitsandbytes of
# every product that it casts and of a package that it can do without.
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from datasets import Dataset
from rich.console import Console
from transformers import set_seed

from deepseek_moe import DeepseekConfig, DeepseekTokenizer
from deepseek_moe.checkpoint import find_checkpoint, own_tokenizer
from deepseek_moe.errors import as_user_error, exit_on_user_error, rank_zero_reports
from deepseek_moe.training.arguments import (
    DataArguments,
    FineTuningArguments,
    ModelArguments,
    parse_arguments,
)
from deepseek_moe.training.build import build_model
from deepseek_moe.training.disk_need import disk_need
from deepseek_moe.training.dry_run import (
    count_steps,
    meta_model,
    print_dry_run,
    steps_in_epoch,
    trainable_table,
)
from deepseek_moe.training.examples import (
    Collator,
    load_examples,
    pack,
    refuse_fewer,
    refuse_longer,
    show,
    split,
)
from deepseek_moe.training.resume import Layout, refuse_damaged
from deepseek_moe.training.run import Run, settings_of
from deepseek_moe.training.trainer import FineTuner, leave_together


def main() -> None:
    options, data, args = parse_arguments(sys.argv[1:])
    main_process = args.process_index == 0
    say = partial(print, file=sys.stderr) if main_process else lambda *_: None
    if args.world_size == 1 and torch.cuda.device_count() > 1:
        say(f"of {torch.cuda.device_count()} GPUs one is used; started by deepspeed, all are")
    set_seed(args.seed)
    if args.full_determinism:
        # PyTorch prefers this attention on Hopper GPUs; its backward pass adds in no fixed order.
        torch.backends.cuda.enable_cudnn_sdp(False)
    with args.main_process_first():  # downloads and prepares; the others find it done
        folder = find_checkpoint(options.model_name_or_path, cache_dir=options.cache_dir)
        tokenizer = own_tokenizer(folder)
        train, evaluation = load_data(data, tokenizer, args, options.cache_dir, say)
        packed = prepare_rows(train, evaluation, data, args, folder)
    run = Run(args.output_dir, settings_of(options, data, args, folder, train, evaluation))
    network = meta_model(folder, options)  # refuses what cannot train, in a second
    steps, in_epoch = count_steps(args, len(packed)), steps_in_epoch(args, len(packed))
    disk = disk_need(network, options, args, steps, in_epoch)
    if data.dry_run:
        if main_process:
            print_dry_run(folder, options, args, packed["length"], disk.compared_with(run.folder))
        leave_together()
        return

    if run.finished:
        if main_process:
            report_finished(run, options, folder)
        leave_together()
        return
    with args.main_process_first():
        if main_process:
            Console(stderr=True, width=100).print(trainable_table(network))
            say(f"disk: {disk.compared_with(run.folder)}")
            left = disk_need(network, options, args, steps - run.steps, in_epoch)
            left.refuse_too_small(run.folder, resumes=run.steps > 0)
            run.start()
    if run.checkpoint:
        layout = Layout.of(args, adapter=options.use_lora, quantized=options.bits != 16)
        refuse_damaged(Path(run.checkpoint), layout)
        say(f"going on from {run.checkpoint}")

    model = build_model(folder, options, args)
    with as_user_error("the trainer cannot be set up", "change that option"):
        trainer = FineTuner(
            model=model,
            args=args,
            train_dataset=packed,
            eval_dataset=evaluation,
            data_collator=Collator(tokenizer.pad_token_id, data.packing),
            processing_class=tokenizer,
        )
    trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.leave_if_stopped()
    run.save_result(trainer, folder, options.merge_on_save)
    if main_process:
        print(run.folder)
    leave_together()


def report_finished(run: Run, options: ModelArguments, folder: Path) -> None:
    """Prints the run's folder, and how to merge it if that was asked for later."""
    print("this run is finished already", file=sys.stderr)
    if options.merge_on_save and not (run.folder / "config.json").is_file():
        merge = f"python -m deepseek_moe.export --model {folder} --adapter {run.folder}"
        print(f"merge it: {merge}", file=sys.stderr)
    print(run.folder)


def load_data(
    data: DataArguments,
    tokenizer: DeepseekTokenizer,
    args: FineTuningArguments,
    cache_dir: str | None,
    say: Callable[[object], None],
) -> tuple[Dataset, Dataset | None]:
    """The examples to train on and those to evaluate on; says what it read, and shows some."""
    load = partial(
        load_examples,
        tokenizer=tokenizer,
        max_length=data.model_max_length,
        skip_bad_rows=data.skip_bad_rows,
        cache_dir=cache_dir,
    )
    train, report = load(data.data_path)
    say(report)
    evaluation = None
    if data.eval_data_path:
        evaluation, report = load(data.eval_data_path)
        say(report)
    elif data.eval_fraction:
        train, evaluation = split(train, data.eval_fraction, args.seed)
        say(f"{len(evaluation):,} rows are held out to evaluate on")
    for row in train.select(range(min(data.show_examples, len(train)))):
        say(show(tokenizer, row["input_ids"], row["trained"], sys.stderr.isatty()))
    return train, evaluation


def prepare_rows(
    train: Dataset,
    evaluation: Dataset | None,
    data: DataArguments,
    args: FineTuningArguments,
    folder: Path,
) -> Dataset:
    """The rows that batches are made of: examples, or several packed into each."""
    refuse_longer(train, evaluation, DeepseekConfig.from_pretrained(folder))
    rows = pack(train, data.model_max_length) if data.packing else train
    if args.dataloader_drop_last:
        refuse_fewer(rows, args.per_device_train_batch_size * args.world_size)
    return rows


if __name__ == "__main__":
    with exit_on_user_error(), rank_zero_reports():
        main()
