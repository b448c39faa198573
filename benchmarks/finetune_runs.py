"""Runs finetune.py and other scripts, each in processes of its own, for several benchmarks."""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from random_model import add_model_options, model_of_layers
from tables import Report, Row, make_parser, require_gpus
from tqdm import tqdm

from deepseek_moe.errors import UserError

HERE = Path(__file__).resolve().parent
ONE_RANK = str(HERE / "one_rank.py")
LORA, QLORA = "--use_lora True --lora_r 64", "--use_lora True --bits 4 --lora_r 64"
KEPT = "--gradient_checkpointing 0"
QLORA_8BIT_ADAM = f"{QLORA} --optim adamw_bnb_8bit"
LORA_16, QLORA_16 = "--use_lora True --lora_r 16", "--use_lora True --bits 4 --lora_r 16"
QLORA_16_8BIT_ADAM = f"{QLORA_16} --optim adamw_bnb_8bit"
OFFLOADED = f"{QLORA_16_8BIT_ADAM} --offload_experts True"
LORA_8BIT_ADAM = f"{LORA} --optim adamw_bnb_8bit"
FP32_ADAM = "--single_gpu_full False"
ZERO = "--deepspeed configs/ds_config_zero"
STEPS, UNCOUNTED = 8, 4
"""Steps of a run whose rate is measured, and those at its beginning that do not count."""


def make_settings_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options of all benchmarks that have a table of settings."""
    parser = make_parser(description)
    parser.add_argument("--only", default="", help="settings in which a word begins so: LoRA, ...")
    add_model_options(parser)
    return parser


def choose(names: Iterable[str], only: str) -> list[str]:
    """The names in which a word begins with `only`: LoRA is not QLoRA.

    Raises:
        UserError: there are none.
    """
    found = [name for name in names if re.search(rf"(?<!\w){re.escape(only)}", name, re.IGNORECASE)]
    if not found:
        raise UserError(f"--only {only} names no setting; there are: {'; '.join(names)}")
    return found


def measure_settings(
    args: argparse.Namespace,
    part: str,
    settings: Mapping[str, Any],
    measure: Callable[[Any, Path, Path], Row],
    **facts: Any,
) -> None:
    """Reports what `measure` finds of each setting that --only chooses.

    Args:
        measure: takes a setting, the folder of a random model (of fewer layers, or with half of the
            picks on 8 experts, if its name says so), and a file of rows.
        facts: go into the report before the rows.
    """
    chosen = choose(settings, args.only)
    require_gpus()
    report = Report(args)
    report.contents |= facts
    with rows_file(16 * STEPS, 4096) as data:
        for name in tqdm(chosen, file=sys.stderr):
            layers = 4 if "4 layers" in name else args.num_hidden_layers
            model = model_of_layers(args.folder, layers, "skewed" in name)
            report.add(part, {"name": name} | measure(settings[name], model, data))


@contextmanager
def rows_file(count: int, length: int) -> Iterator[Path]:
    """A JSON file of random rows of more than `length` tokens, so that each is cut."""
    source, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz      "
    outputs = ["".join(source.choices(letters, k=8 * length)) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        rows = [{"instruction": "Write.", "output": output} for output in outputs]
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


def finetune(options: str, last_step: str = "", ranks: int = 1) -> str:
    """What finetune.py prints up to `last_step`.

    After that step it is ended, since its result need not be written. Without DeepSpeed it is one
    process, whatever `ranks` are.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["finetune.py", *options.split(), "--output_dir", f"{folder}/run"]
        until = (lambda printed: last_step in printed) if last_step else None
        ranks = ranks if "--deepspeed" in options else 0
        printed, code = run(words, until, ranks=ranks)
    if code and not until:
        print(printed[-1500:], file=sys.stderr)
    return printed


def profiled(options: str, ranks: int = 0, timeout: float = math.inf) -> tuple[Row, str]:
    """What one_rank.py finds of the last step of a finetune.py (nothing, if that failed), and what
    finetune.py prints."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        words = [ONE_RANK, "profile", str(file), *options.split(), "--output_dir", f"{folder}/run"]
        printed, _ = run(words, lambda _: file.exists(), timeout, ranks)
        return json.loads(file.read_text()) if file.exists() else {}, printed


def speed_and_gigabytes(
    printed: str, steps: int = STEPS, uncounted: int = UNCOUNTED
) -> tuple[float | None, float | None]:
    """Tokens/s of all GPUs in the steps that count, and the most GB of the first one.

    Tokens/s are None if the run ended before, GB if no step printed any.
    """
    found = re.findall(r"([\d,]+) tok/s(?:  ([\d.]+) GB)?", printed)
    gigabytes = max((float(size) for _, size in found if size), default=None)
    if len(found) < steps:
        return None, gigabytes
    seconds = [1 / float(rate.replace(",", "")) for rate, _ in found[uncounted:steps]]  # a token
    return len(seconds) / sum(seconds), gigabytes


def dry_run_gigabytes(options: str, ranks: int = 1) -> float | None:
    """What the dry run says that each GPU needs; None if it failed."""
    printed = finetune(f"{options} --dry_run True", ranks=ranks)
    found = re.search(r"in all +([\d.]+) (GB|MB)", printed)
    return float(found[1]) / (1 if found[2] == "GB" else 1000) if found else None


def run(
    words: list[str],
    until: Callable[[str], bool] | None = None,
    timeout: float = math.inf,
    ranks: int = 0,
    gpu: str | None = None,
) -> tuple[str, int]:
    """What a script of Python printed (in the folder of finetune.py), and its exit code.

    Args:
        words: the script and its options.
        until: ends it when this holds of what it printed. If it never does, that is shown.
        timeout: seconds after which it is ended with all that it started.
        ranks: how many processes form a group, each told who it is as by torchrun; 0 is one
            process alone. One that fails ends the others.
        gpu: the name of the only one that the processes see; None shows them all.
    """
    port = random.randrange(20_000, 30_000)  # below those that the system itself gives away
    group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `timeout` ends this process
    command, folder = [sys.executable, *words], HERE.parent / "finetune"
    processes = []
    end = time.monotonic() + timeout
    with tempfile.NamedTemporaryFile("w") as log:

        def printed() -> str:
            return Path(log.name).read_text(errors="replace")

        try:
            output = {"stdout": log, "stderr": log, "start_new_session": True}
            for rank in range(max(ranks, 1)):
                told = group | {"RANK": rank, "LOCAL_RANK": rank} if ranks else {}
                told |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
                environment = os.environ | {name: str(value) for name, value in told.items()}
                environment.pop("TRANSFORMERS_VERBOSITY", None)  # What is printed is read here.
                processes.append(subprocess.Popen(command, cwd=folder, env=environment, **output))
            while any(one.poll() is None for one in processes) and time.monotonic() < end:
                if any(one.poll() for one in processes) or (until and until(printed())):
                    break
                time.sleep(0.2)
        finally:  # after Ctrl-C too: what was started would outlive this process
            for one in processes:
                if one.poll() is None:
                    os.killpg(one.pid, signal.SIGKILL)
            # On CPUs DeepSpeed leaves 69 MB of memory for each process.
            for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                buffer.unlink(missing_ok=True)
        codes = [one.wait() for one in processes]
        if until and not until(printed()):
            print(printed()[-1500:], file=sys.stderr)
        return printed(), next((code for code in codes if code), 0)
