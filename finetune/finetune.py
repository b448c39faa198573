"""Fine-tunes DeepSeek-MoE: fully, with LoRA, or with QLoRA, alone or under DeepSpeed.

    python finetune.py --data_path data.json --output_dir out --use_lora True
    deepspeed finetune.py --data_path data.json --output_dir out --bf16 True \\
        --deepspeed configs/ds_config_zero3.json

Repeating a command goes on where it was interrupted. --help lists the options, and --dry_run True
says what a run would do and need.
"""

from finetune_options import parse_options, quiet_interrupt

if __name__ == "__main__":
    parse_options()  # Answers --help and mistyped options before the imports, which take seconds.

with quiet_interrupt():
    import logging
    import os
    import sys
    import warnings
    from collections.abc import Callable, Sequence
    from contextlib import redirect_stdout
    from functools import partial
    from pathlib import Path

    # Libraries warn one another of renamed functions, and bitsandbytes warns of every product that
    # it casts, and of a package that it can do without.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed
    from transformers.integrations.deepspeed import is_deepspeed_available

    from deepseek_moe import DeepseekConfig, DeepseekTokenizer
    from deepseek_moe.checkpoint import find_checkpoint, own_tokenizer
    from deepseek_moe.errors import (
        as_user_error,
        end_without_teardown,
        exit_on_user_error,
        rank_zero_reports,
    )
    from deepseek_moe.training import dry_run, examples
    from deepseek_moe.training.arguments import (
        Arguments,
        DataArguments,
        FineTuningArguments,
        ModelArguments,
        make_arguments,
    )
    from deepseek_moe.training.build import build_model, quantization_of
    from deepseek_moe.training.disk_need import disk_need
    from deepseek_moe.training.resume import Layout, refuse_damaged
    from deepseek_moe.training.run import Run, settings_of
    from deepseek_moe.training.trainer import FineTuner, leave_together

Say = Callable[[object], None]


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Runs a command with the options `argv`, by default those of the command line; the trainer
    takes `callbacks` too."""
    options, data, args = make_arguments(parse_options(argv))
    start_deepspeed(args)
    set_seed(args.seed)
    if args.full_determinism:
        # PyTorch prefers this attention on Hopper GPUs; its backward pass adds in no fixed order.
        torch.backends.cuda.enable_cudnn_sdp(False)
    is_first = args.process_index == 0
    say: Say = partial(print, file=sys.stderr) if is_first else lambda _: None
    if args.world_size == 1 and torch.cuda.device_count() > 1:
        say(f"of {torch.cuda.device_count()} GPUs one is used; started by deepspeed, all are")
    with args.main_process_first():  # It downloads and prepares; the others find it done.
        folder = find_checkpoint(options.model_name_or_path, cache_dir=options.cache_dir)
        tokenizer = own_tokenizer(folder)
        train, evaluation = load_data(data, tokenizer, args, options.cache_dir, say)
        rows = prepare_rows(train, evaluation, data, args, folder)
    run = Run(args.output_dir, settings_of(options, data, args, folder, train, evaluation))
    network = dry_run.meta_model(folder, options)  # Refuses what cannot train, in a second.
    steps = dry_run.count_steps(args, len(rows))
    in_epoch = dry_run.steps_in_epoch(args, len(rows))
    disk = disk_need(network, options, args, steps, in_epoch)
    room = disk.compared_with(run.folder)
    if data.dry_run:
        if is_first:
            dry_run.print_dry_run(network, folder, options, args, rows["length"], room)
    elif run.finished:
        if is_first:
            report_finished(run, options, folder)
    else:
        with args.main_process_first():
            if is_first:
                say(dry_run.trainable_table(network))
                say(f"disk: {room}")
                left = disk_need(network, options, args, steps - run.steps, in_epoch)
                left.refuse_too_small(run.folder, resumes=run.steps > 0)
                run.start()
        fine_tune(run, folder, (options, data, args), tokenizer, rows, evaluation, callbacks, say)
    leave_together()


def fine_tune(
    run: Run,
    folder: Path,
    settings: Arguments,
    tokenizer: DeepseekTokenizer,
    rows: Dataset,
    evaluation: Dataset | None,
    callbacks: Sequence[TrainerCallback],
    say: Say,
) -> None:
    """Trains the model in `folder`, from the last checkpoint of `run` on if there is one."""
    options, data, args = settings
    if run.checkpoint:
        layout = Layout.of(args, adapter=options.use_lora, quantized=options.bits != 16)
        refuse_damaged(Path(run.checkpoint), layout)
        say(f"going on from {run.checkpoint}")
    model = build_model(folder, options, args)
    with as_user_error("the trainer cannot be set up", "change that option"):
        trainer = FineTuner(
            model=model,
            args=args,
            quantization=quantization_of(options, args),
            train_dataset=rows,
            eval_dataset=evaluation,
            data_collator=examples.Collator(tokenizer.pad_token_id, data.packing),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
    trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.leave_if_stopped()
    run.save_result(trainer, folder, options.merge_on_save)
    if trainer.is_world_process_zero():
        print(run.folder)


def start_deepspeed(args: FineTuningArguments) -> None:
    """Imports DeepSpeed, and on CPUs joins the processes, which accelerate does on GPUs only."""
    if not is_deepspeed_available():
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # It would warn that it found no other.
    with redirect_stdout(sys.stderr):  # It prints, and logs to what stdout is at its import.
        import deepspeed

        if args.deepspeed and args.use_cpu:
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def load_data(
    data: DataArguments,
    tokenizer: DeepseekTokenizer,
    args: FineTuningArguments,
    cache_dir: str | None,
    say: Say,
) -> tuple[Dataset, Dataset | None]:
    """The examples to train on and those to evaluate on; says what it read, and shows some."""
    load = partial(
        examples.load_examples,
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
        train, evaluation = examples.split(train, data.eval_fraction, args.seed)
        say(f"{len(evaluation):,} rows are held out to evaluate on")
    for row in train.select(range(min(data.show_examples, len(train)))):
        say(examples.show(tokenizer, row["input_ids"], row["trained"], sys.stderr.isatty()))
    return train, evaluation


def prepare_rows(
    train: Dataset,
    evaluation: Dataset | None,
    data: DataArguments,
    args: FineTuningArguments,
    folder: Path,
) -> Dataset:
    """The rows that batches are made of: examples, or several packed into each."""
    examples.refuse_longer(train, evaluation, DeepseekConfig.from_pretrained(folder))
    rows = examples.pack(train, data.model_max_length) if data.packing else train
    if args.dataloader_drop_last:
        examples.refuse_fewer(rows, args.per_device_train_batch_size * args.world_size)
    return rows


def report_finished(run: Run, options: ModelArguments, folder: Path) -> None:
    """Prints the run's folder, and how to merge it if that was asked for later."""
    print("this run is finished already", file=sys.stderr)
    if options.merge_on_save and not (run.folder / "config.json").is_file():
        merge = f"python -m deepseek_moe.export --model {folder} --adapter {run.folder}"
        print(f"merge it: {merge}", file=sys.stderr)
    print(run.folder)


if __name__ == "__main__":
    with end_without_teardown(), exit_on_user_error(), rank_zero_reports():
        main()
