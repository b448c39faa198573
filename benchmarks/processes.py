"""Of train.py, memory.py and multi_gpu.py: finetune.py and one_rank.py in processes of their own.

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
CONFIGS = HERE.parent / "configs"
ONE_RANK = str(HERE / "one_rank.py")
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]

QLORA, LORA = "--use_lora True --bits 4 --lora_r 64", "--use_lora True --lora_r 64"
KEPT = "--gradient_checkpointing 0"
EIGHT_BITS = "--optim adamw_bnb_8bit"
ZERO = "--deepspeed configs/ds_config_zero"

Until = Callable[[str], bool]
"""Whether a process that has printed this may end."""


def random_rows(count: int, words: int) -> list[dict[str, str]]:
    """Rows longer than any setting's limit, so that each is cut to it."""
    source = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = (
        " ".join("".join(source.choices(letters, k=source.randint(2, 8))) for _ in range(words))
        for _ in range(count)
    )
    return [{"instruction": "Write.", "output": text} for text in texts]


@contextmanager
def rows_file(count: int, words: int) -> Iterator[Path]:
    """`random_rows` as JSON in a folder of their own, which is there as long as they are used."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(random_rows(count, words)))
        yield file


def command_of(model: Path, data: Path, rows: int, length: int, options: str, steps: int) -> str:
    """Options of finetune.py for some steps of `rows` x `length` tokens that leave nothing behind;
    layers are computed again in the backward pass unless `options` say otherwise."""
    command = f"--model_name_or_path {model} --data_path {data} --bf16 True --max_steps {steps} "
    command += f"--model_max_length {length} --per_device_train_batch_size {rows} "
    command += "--save_strategy no --report_to none --logging_steps 1 --learning_rate 1e-6 "
    command += "" if "gradient_checkpointing" in options else "--gradient_checkpointing True "
    return command + options


def finetune(options: str, last_step: str = "", gpus: int = 1) -> str:
    """What the script prints (under DeepSpeed by its launcher), up to `last_step`: then it is
    ended, since the result need not be written."""
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
    """Tokens/s of all GPUs, and the most GB of the first one so far (None: on CPUs), of each step
    that finetune.py printed."""
    found = re.findall(r"([\d,]+) tok/s(?:  ([\d.]+) GB)?", printed)
    return [(float(rate.replace(",", "")), float(size) if size else None) for rate, size in found]


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
    finally:  # on CPUs DeepSpeed leaves 69 MB of memory a process
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)


def torchrun(gpus: int) -> list[str]:
    """The same under torch's; on one GPU without any."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    return [sys.executable, *(launcher if gpus > 1 else []), ONE_RANK]


def run(
    command: list[str], log: Path, timeout: float, until: Until | None = None
) -> tuple[str, int]:
    """What a command printed (in the folder of finetune.py), and its exit code.

    It is ended, with all its processes, after `timeout` seconds, or once `until` says so; if that
    never comes, its last words are printed to stderr.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=HERE.parent / "finetune",
            stdout=file,
            stderr=file,
            start_new_session=True,
        )

    def printed() -> str:
        return log.read_text(errors="replace")

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
