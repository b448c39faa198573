"""Runs finetune.py, and what multi_gpu.py runs on each GPU, in processes of their own.

The environment is passed on as it is, so that what it says of NCCL holds.
"""

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ONE_RANK = str(HERE / "one_rank.py")
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]

LORA, QLORA = "--use_lora True --lora_r 64", "--use_lora True --bits 4 --lora_r 64"
KEPT = "--gradient_checkpointing 0"
QLORA_8BIT_ADAM = f"{QLORA} --optim adamw_bnb_8bit"
QLORA_16_8BIT_ADAM = "--use_lora True --bits 4 --lora_r 16 --optim adamw_bnb_8bit"
ZERO = "--deepspeed configs/ds_config_zero"
STEPS, UNCOUNTED = 8, 4
"""Steps of a run whose rate is measured, and those at its beginning that do not count."""

Until = Callable[[str], bool]
"""Whether a process that has printed this may end."""


@contextmanager
def rows_file(count: int, words: int) -> Iterator[Path]:
    """A JSON file of random rows, longer than any setting's limit, so that each is cut to it."""
    source, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"

    def text() -> str:
        lengths = (source.randint(2, 8) for _ in range(words))
        return " ".join("".join(source.choices(letters, k=length)) for length in lengths)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        rows = [{"instruction": "Write.", "output": text()} for _ in range(count)]
        file.write_text(json.dumps(rows))
        yield file


def command_of(model: Path, data: Path, rows: int, length: int, options: str, steps: int) -> str:
    """Options of finetune.py for some steps of `rows` x `length` tokens, which save nothing.

    Layers are recomputed in the backward pass unless `options` say otherwise.
    """
    command = f"--model_name_or_path {model} --data_path {data} --bf16 True --max_steps {steps} "
    command += f"--model_max_length {length} --per_device_train_batch_size {rows} "
    command += "--save_strategy no --report_to none --logging_steps 1 --learning_rate 1e-6 "
    command += "" if "gradient_checkpointing" in options else "--gradient_checkpointing True "
    return command + options


def finetune(options: str, last_step: str = "", gpus: int = 1) -> str:
    """What the script prints (under DeepSpeed by its launcher) up to `last_step`.

    After that step it is ended, since its result need not be written.
    """
    launcher = [sys.executable]
    if "--deepspeed" in options:
        launcher = [*LAUNCHER, "--num_gpus", str(gpus)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, "finetune.py", *options.split(), "--output_dir", f"{folder}/run"]
        until = (lambda printed: last_step in printed) if last_step else None
        printed, code = run(command, Path(folder, "log"), math.inf, until)
    if code and not until:
        print(printed[-1500:], file=sys.stderr)
    return printed


def steps_of(printed: str) -> list[tuple[float, float | None]]:
    """Tokens/s of all GPUs, and GB of the first one, of each step that finetune.py printed.

    GB are the most so far, and None on CPUs.
    """
    found = re.findall(r"([\d,]+) tok/s(?:  ([\d.]+) GB)?", printed)
    return [(float(rate.replace(",", "")), float(size) if size else None) for rate, size in found]


def measured_rate(steps: list[tuple[float, float | None]]) -> tuple[float, float | None] | None:
    """Tokens/s of the steps that count, and the most GB; None if the run ended before."""
    if len(steps) < STEPS:
        return None
    seconds = [1 / rate for rate, _ in steps[UNCOUNTED:STEPS]]  # a token
    size = max((size for _, size in steps if size), default=None)
    return len(seconds) / sum(seconds), size


def dry_run_gigabytes(options: str, gpus: int = 1) -> float | None:
    """What the dry run says that each GPU needs; None if it failed."""
    found = re.search(r"in all +([\d.]+) (GB|MB)", finetune(f"{options} --dry_run True", "", gpus))
    return float(found[1]) / (1 if found[2] == "GB" else 1000) if found else None


def deepspeed(
    gpus: int, words: list[str], log: Path, timeout: float, until: Until | None = None
) -> tuple[str, int]:
    """`run` of one_rank.py under DeepSpeed's launcher, on a port that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launcher = [*LAUNCHER, "--num_gpus", str(gpus), "--master_port", str(port)]
    try:
        return run([*launcher, "--no_local_rank", ONE_RANK, *words], log, timeout, until)
    finally:  # On CPUs DeepSpeed leaves 69 MB of memory for each process.
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)


def torchrun(gpus: int) -> list[str]:
    """The command that starts one_rank.py under torchrun, or alone on one GPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    return [sys.executable, *(launcher if gpus > 1 else []), ONE_RANK]


def run(
    command: list[str], log: Path, timeout: float, until: Until | None = None
) -> tuple[str, int]:
    """What a command printed (in the folder of finetune.py), and its exit code.

    It is ended, with all its processes, after `timeout` seconds, or once `until` says so; if that
    never comes, its last words are printed to stderr.
    """

    def printed() -> str:
        return log.read_text(errors="replace")

    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=HERE.parent / "finetune",
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    end = time.monotonic() + timeout
    try:
        while process.poll() is None and time.monotonic() < end:
            if until and until(printed()):
                break
            time.sleep(0.2)
    finally:  # after Ctrl-C too
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    if until and not until(printed()):
        print(printed()[-1500:], file=sys.stderr)
    return printed(), code
