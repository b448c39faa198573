"""Of multi_gpu.py: one_rank.py on several GPUs, by its launchers.

The environment is passed on as it is, so that what it says of NCCL holds.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ONE_RANK = str(HERE / "one_rank.py")
CONFIGS = HERE.parent / "configs"


def deepspeed(
    gpus: int, words: list[str], log: Path, timeout: float, until: Path | None = None
) -> tuple[str, int]:
    """`run` of one_rank.py under DeepSpeed's launcher, on a port that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus)]
    launcher += ["--master_port", str(port), "--no_local_rank", ONE_RANK]
    try:
        return run([*launcher, *words], log, timeout, until)
    finally:  # on CPUs DeepSpeed leaves 69 MB of memory a process
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)


def torchrun(gpus: int) -> list[str]:
    """The same under torch's; on one GPU without any."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    return [sys.executable, *(launcher if gpus > 1 else []), ONE_RANK]


def run(
    command: list[str], log: Path, timeout: float, until: Path | None = None
) -> tuple[str, int]:
    """What a command printed (in the folder of finetune.py), and its exit code.

    It is ended, with all its processes, after `timeout` seconds, or once the file `until` is there;
    if that never comes, its last words are printed to stderr.
    """
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
        while process.poll() is None and time.monotonic() < end and not (until and until.exists()):
            time.sleep(0.2)
    finally:  # after Ctrl-C too
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    printed = log.read_text(errors="replace")
    if until and not until.exists():
        print(printed[-1500:], file=sys.stderr)
    return printed, code
