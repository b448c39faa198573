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
    from collections.abc import Sequence
    from contextlib import redirect_stdout
    from pathlib import Path

    # Libraries warn one another of renamed functions, and bitsandbytes warns of every product that
    # it casts, and of a package that it can do without.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    # Expandable segments keep PyTorch's memory from fragmenting. It reads this at its import.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed
    from transformers.integrations.deepspeed import is_deepspeed_available

    from deepseek_moe import DeepseekConfig, DeepseekTokenizer, errors
    from deepseek_moe.checkpoint import find_checkpoint, own_tokenizer, refuse_other_base
    from deepseek_moe.checksums import verified_meanwhile
    from deepseek_moe.model.layout import weight_files
    from deepseek_moe.processes import end_without_teardown, rank_zero_reports
    from deepseek_moe.training import dry_run, examples, packed_rows
    from deepseek_moe.training.adapter_config import ADAPTER_FILE
    from deepseek_moe.training.arguments import Arguments, FineTuningArguments
    from deepseek_moe.training.build import build_model, quantization_of
    from deepseek_moe.training.callbacks import leave_together
    from deepseek_moe.training.disk_need import disk_need
    from deepseek_moe.training.expert_choice import take_choice
    from deepseek_moe.training.options import make_arguments
    from deepseek_moe.training.resume import Layout, refuse_damaged
    from deepseek_moe.training.rows import parse_columns
    from deepseek_moe.training.run import Run, settings_of
    from deepseek_moe.training.trainer import FineTuner


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Runs a command with the options `argv`, by default those of the command line; the trainer
    takes `callbacks` too."""
    options, data, args = settings = make_arguments(parse_options(argv))
    start_process(args)
    with args.main_process_first():  # It downloads and prepares; the others find it done.
        folder = find_checkpoint(options.model_name_or_path, cache_dir=options.cache_dir)
        tokenizer = own_tokenizer(folder)
        take_choice(options, folder)
        if options.adapter:
            refuse_other_base(Path(options.adapter), folder)
        train, evaluation = load_data(settings, tokenizer)
        examples.refuse_longer(train, evaluation, DeepseekConfig.from_pretrained(folder))
        rows = packed_rows.pack(train, data.model_max_length) if data.packing else train
        if args.dataloader_drop_last:
            examples.refuse_fewer(rows, args.per_device_train_batch_size * args.world_size)
    noted = settings_of(*settings, folder, train, evaluation)
    run = Run(args.output_dir, noted, options.model_name_or_path, data.data_path)
    network = dry_run.meta_model(folder, options)  # Refuses what cannot train, in a second.
    steps = dry_run.count_steps(args, len(rows))
    in_epoch = dry_run.steps_in_epoch(args, len(rows))
    disk = disk_need(network, options, args, steps, in_epoch).compared_with(run.folder)
    is_first = args.process_index == 0
    if data.dry_run:
        if is_first:
            if run.finished:
                say("this run is finished already; without --dry_run True nothing would be done")
            dry_run.print_dry_run(network, folder, options, args, rows["length"], disk)
    elif run.finished:
        say("this run is finished already")
        if options.merge_on_save and not (run.folder / "config.json").is_file():
            say(f"merge it: python -m deepseek_moe.export --model {folder} --adapter {run.folder}")
    else:
        with args.main_process_first():
            if is_first:
                say(dry_run.trainable_table(network))
                say(f"disk: {disk}")
                left = disk_need(network, options, args, steps - run.steps, in_epoch)
                left.refuse_too_small(run.folder, resumes=run.steps > 0)
                run.start()
        fine_tune(run, folder, settings, tokenizer, rows, evaluation, callbacks)
    if is_first and not data.dry_run:
        print(run.folder)
    leave_together()


def say(text: object) -> None:
    """Prints on stderr, by the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def start_process(args: FineTuningArguments) -> None:
    """Sets the seed and imports DeepSpeed. On CPUs it joins the processes too, which accelerate
    does on GPUs only."""
    if is_deepspeed_available():
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # It would warn that it found no other.
        with redirect_stdout(sys.stderr):  # It prints, and logs to what stdout is at its import.
            import deepspeed

            if args.deepspeed and args.use_cpu:
                deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    set_seed(args.seed)
    if args.full_determinism:
        # PyTorch prefers this attention on Hopper GPUs; its backward pass adds in no fixed order.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if args.world_size == 1 and torch.cuda.device_count() > 1:
        say(f"of {torch.cuda.device_count()} GPUs one is used; started by deepspeed, all are")


def load_data(settings: Arguments, tokenizer: DeepseekTokenizer) -> tuple[Dataset, Dataset | None]:
    """The examples to train on and those to evaluate on; says what it read, and shows some."""
    options, data, args = settings

    def load(paths: list[str]) -> Dataset:
        how = {"skip_bad_rows": data.skip_bad_rows, "cache_dir": options.cache_dir}
        how["columns"] = parse_columns(data.columns)
        rows, report = examples.load_examples(paths, tokenizer, data.model_max_length, **how)
        say(report)
        return rows

    train = load(data.data_path)
    evaluation = load(data.eval_data_path) if data.eval_data_path else None
    if data.eval_fraction:
        train, evaluation = examples.split(train, data.eval_fraction, args.seed)
        say(f"{len(evaluation):,} rows are held out to evaluate on")
    for row in train.select(range(min(data.show_examples, len(train)))):
        say(examples.show(tokenizer, row["input_ids"], row["trained"], sys.stderr.isatty()))
    return train, evaluation


def fine_tune(
    run: Run,
    folder: Path,
    settings: Arguments,
    tokenizer: DeepseekTokenizer,
    rows: Dataset,
    evaluation: Dataset | None,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Trains the model in `folder`, from the last checkpoint of `run` on if there is one."""
    options, data, args = settings
    if run.checkpoint:
        quantized, delta = options.bits != 16, options.train_chosen_whole
        layout = Layout.of(args, adapter=options.use_lora, quantized=quantized, delta=delta)
        refuse_damaged(Path(run.checkpoint), layout)
        say(f"going on from {run.checkpoint}")
    added = [Path(options.adapter) / ADAPTER_FILE] if options.adapter else []
    with verified_meanwhile([*weight_files(folder), *added]):
        model = build_model(folder, options, args)
    with errors.as_user_error("the trainer cannot be set up", "change that option"):
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
    run.save_result(trainer, folder, merge=options.merge_on_save, delta=options.save_delta)


if __name__ == "__main__":
    with end_without_teardown(), errors.exit_on_user_error(), rank_zero_reports():
        main()
