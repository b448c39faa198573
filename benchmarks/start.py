"""How long does it take until the first token, and how much host memory?

    python benchmarks/start.py --model /tmp/random-16b

It starts twice: with an empty Triton cache, so that every kernel is compiled, and with what the
first start left there. The weight files are read before, so that they are in the page cache. Times
are seconds since the start of the process. Its memory is the most without the pages of files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import psutil
from tables import DEVICE, Report, Row, make_parser

from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.checkpoint import find_checkpoint
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.load import load
from deepseek_moe.errors import UserError, exit_on_user_error
from deepseek_moe.model.layout import weight_files

PROMPT, NEW = 128, 9  # the ninth token comes after kernels are compiled and a graph is captured
CACHES = ("empty", "filled")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a folder or a hub id")
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.since is not None:
        print(json.dumps(first_tokens(args.model, args.since)))
        return
    report = Report(args)
    for file in weight_files(find_checkpoint(args.model)):
        with file.open("rb", buffering=0) as handle:
            while handle.read(2**26):
                pass
    with tempfile.TemporaryDirectory() as cache:
        for name in CACHES:
            report.add("start", {"triton_cache": name} | measured_start(args.model, cache))


def first_tokens(model: str, since: float) -> Row:
    """Loads and begins to generate; seconds after `since`, a time of time.time()."""
    seconds = {"imports": time.time() - since}
    network, _ = load(model, device=str(DEVICE))
    seconds["load"] = time.time() - since
    ids = [2 + i % (network.config.vocab_size - 2) for i in range(PROMPT)]
    for number, _ in enumerate(Generator(network).stream([ids], NEW), start=1):
        if number in (1, NEW):
            seconds[f"token {number}"] = time.time() - since
    return seconds


def measured_start(model: str, cache: str) -> Row:
    """The times and the GB of host memory of a start with the folder `cache` as Triton's cache.

    Raises:
        UserError: the process failed, which has said why on stderr.
    """
    command = [sys.executable, __file__, "--model", model, "--since", str(time.time())]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    process = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        with suppress(psutil.Error):  # It has just ended.
            memory = process.memory_info()
            most = max(most, memory.rss - memory.shared)
        time.sleep(0.01)
    if process.returncode:
        raise UserError(f"a start failed; try {' '.join(command)}")
    return json.loads(process.stdout.read().splitlines()[-1]) | {"host_gigabytes": most / 1e9}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
