"""How long does it take until the first token, and how much host memory?

    python benchmarks/start.py --model /tmp/random-16b

It starts twice: with an empty Triton cache, so that every kernel is compiled, and with what the
first start left there. The weight files are read before, so that they are in the page cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from deepseek_moe.checkpoint import find_checkpoint
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.model.layout import weight_files

PROMPT, NEW = 128, 9  # the ninth token comes after kernels are compiled and a graph is captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a folder or a hub id")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.since is not None:
        print(json.dumps(first_tokens(args.model, args.device, args.since)))
        return
    files = weight_files(find_checkpoint(args.model))
    for file in tqdm(files, "reading", unit="file", leave=False):
        with file.open("rb", buffering=0) as handle:
            while handle.read(2**26):
                pass
    largest = max(file.stat().st_size for file in files)
    with tempfile.TemporaryDirectory() as cache:
        for name in tqdm(("empty", "filled"), unit="start", leave=False):
            print(f"{name} Triton cache: {measured_start(args.model, args.device, cache)}", end="")
            print(f" (largest file {largest / 1e9:.2f} GB)", flush=True)


def first_tokens(model: str, device: str, since: float) -> dict[str, float]:
    """Loads and begins to generate; seconds after `since`, a time of time.time()."""
    seconds = {"imports": time.time() - since}
    network, _ = load(model, device=device)
    seconds["load"] = time.time() - since
    ids = [2 + i % (network.config.vocab_size - 2) for i in range(PROMPT)]
    steps = Generator(network).stream([ids], NEW)
    next(steps)
    seconds["first token"] = time.time() - since
    for _ in steps:
        pass
    seconds[f"token {NEW}"] = time.time() - since
    return seconds


def measured_start(model: str, device: str, cache: str) -> str:
    """A line of the parts and the memory of a start with the folder `cache` as Triton's cache.

    Raises:
        UserError: the process failed.
    """
    command = [sys.executable, __file__, "--model", model, "--device", device, "--since"]
    anonymous = resident = 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, str(time.time())],
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            stdout=out,
            stderr=log,
        )
        while process.poll() is None:
            status = host_memory(process.pid)
            anonymous = max(anonymous, status.get("RssAnon", 0))
            resident = max(resident, status.get("VmHWM", 0))
            time.sleep(0.01)
        out.seek(0)
        log.seek(0)
        printed, said = out.read().split("\n"), log.read().strip().split("\n")
    if process.returncode:
        raise UserError(f"a start failed: {said[-1]}; try {' '.join(command[1:4])} by itself")
    before, parts = 0.0, []
    for name, seconds in json.loads(printed[-2]).items():
        parts.append(f"{name} {seconds:.1f} s (+{seconds - before:.1f})")
        before = seconds
    most, with_files = (f"{size / 1e9:.2f} GB" for size in (anonymous, resident))
    return f"{', '.join(parts)}; host memory at most {most}, {with_files} with files"


def host_memory(pid: int) -> dict[str, int]:
    """Sizes of a process's status file on Linux, in bytes: RssAnon is now, VmHWM the most."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended, or this is no Linux
        return {}
    lines = [line.split() for line in text.split("\n") if line.endswith(" kB")]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
