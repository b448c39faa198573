"""Checks on a GPU that every fast path equals its plain oracle, as the tests do without one.

    python benchmarks/check_gpu.py                              kernels, and the bundled model
    python benchmarks/check_gpu.py --model /tmp/random-16b      another model's logits too
    python benchmarks/check_gpu.py --only "kernel linear"       checks with this text in their name

Prints a line a check. Exit code 1: one failed; 2: there is no GPU. Most of the time kernels are
compiled, so several processes share the checks, as many at once as the GPU's memory allows.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import IO

import torch
from check_changes import change_checks
from check_kernels import Check, Group, kernel_checks
from check_models import bundled_checks, model_checks
from check_training import training_checks
from transformers.utils import logging

from deepseek_moe.errors import exit_on_user_error

Outcome = tuple[bool, str]
"""Whether a check passed, and its remark or what was wrong."""
MUCH = 10  # gigabytes of a group that a process does not keep after it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="also compare this model's logits: a folder or a hub id")
    parser.add_argument("--only", default="", help="checks with this text in their name")
    parser.add_argument("--new_tokens", type=int, default=64, help="of each generation")
    parser.add_argument("--jobs", type=int, help="processes; else 8, or as many as there are cores")
    parser.add_argument(
        "--device",
        default="cuda",
        help="cpu, with TRITON_INTERPRET=1 set, tries the checks themselves on small sizes",
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no GPU was found; this checks what runs on one", file=sys.stderr)
        sys.exit(2)
    if torch.device(args.device).index:
        torch.cuda.set_device(args.device)  # on which kernels are launched
    logging.disable_progress_bar()
    groups = all_groups(args)
    if args.work:
        return work([check for group in groups for check in group.checks])
    groups = [group._replace(checks=[c for c in group.checks if args.only in c[0]])
              for group in groups]  # fmt: skip
    checks = [check for group in groups for check in group.checks]
    jobs = max(1, args.jobs or (1 if args.device == "cpu" else min(8, os.cpu_count() or 1)))
    if jobs == 1:
        outcomes = map(outcome, checks)
    else:
        room = math.inf if args.device == "cpu" else torch.cuda.mem_get_info()[0] / 1e9
        outcomes = in_processes(groups, jobs, room, [sys.executable, *sys.argv, "--work"])
    sys.exit(report(checks, outcomes))


def all_groups(args: argparse.Namespace) -> list[Group]:
    device = torch.device(args.device)
    return [
        *kernel_checks(device),
        *training_checks(device),
        *bundled_checks(device, args.new_tokens),
        *change_checks(device),
        *(model_checks(args.model, device) if args.model else ()),
    ]


def report(checks: Sequence[Check], outcomes: Iterable[Outcome]) -> int:
    """Prints each outcome as soon as it is there. The exit code."""
    failed = 0
    for (name, _), (passed, said) in zip(checks, outcomes, strict=True):
        failed += not passed
        print(f"{'ok     ' if passed else 'FAILED '} {name}: {said}", flush=True)
    print(f"{len(checks)} checks, {failed} failed")
    return 1 if failed or not checks else 0


def outcome(check: Check) -> Outcome:
    try:
        return True, check[1]()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return False, " ".join(said.split())[:600]


def work(checks: Sequence[Check]) -> None:
    """What a worker does: a name a line on stdin, an outcome a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    by_name = {check[0]: check for check in checks}
    for line in sys.stdin:
        print(json.dumps(outcome(by_name[line.rstrip("\n")])), file=answers, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the others


def in_processes(
    groups: Sequence[Group], jobs: int, gigabytes: float, command: list[str]
) -> Iterator[Outcome]:
    """The outcomes in order, each when it is there; `command` starts a worker."""
    names = [name for group in groups for name, _ in group.checks]
    outcomes: dict[str, Future[Outcome]] = {name: Future() for name in names}
    queue = Queue(groups, gigabytes)

    def serve() -> None:
        with tempfile.TemporaryFile("w+") as log:
            worker = Worker(command, log)
            while group := queue.take():
                for name, _ in group.checks:
                    outcomes[name].set_result(worker.run(name))
                if group.gigabytes > MUCH:
                    worker.stop()  # so that its memory is free
                queue.done(group)
            worker.stop()

    for _ in range(min(jobs, len(groups))):
        Thread(target=serve, daemon=True).start()
    for name in names:
        yield outcomes[name].result()


class Queue:
    """Groups that wait until the GPU has room for them, those of most checks before others."""

    def __init__(self, groups: Sequence[Group], gigabytes: float) -> None:
        self.waiting = sorted(groups, key=lambda group: -len(group.checks))
        self.room, self.running, self.changed = gigabytes, 0, Condition()

    def take(self) -> Group | None:
        """The next one, as soon as it fits, or has the GPU for itself; None: no more."""
        with self.changed:
            while self.waiting:
                for group in self.waiting:
                    if group.gigabytes <= self.room or not self.running:
                        self.waiting.remove(group)
                        self.room -= group.gigabytes
                        self.running += 1
                        return group
                self.changed.wait()
            return None

    def done(self, group: Group) -> None:
        with self.changed:
            self.room += group.gigabytes
            self.running -= 1
            self.changed.notify_all()


class Worker:
    """A process that runs checks. After one that failed the next gets a new process: an error on
    the GPU spoils all that comes after it."""

    def __init__(self, command: list[str], log: IO[str]) -> None:
        self.command, self.log = command, log
        self.process: subprocess.Popen[str] | None = None

    def run(self, name: str) -> Outcome:
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
            self.process = subprocess.Popen(self.command, text=True, **pipes)
        try:
            print(name, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.endswith("\n"):
            passed, said = json.loads(answer)
        else:
            self.log.seek(0)
            last = self.log.read().strip().split("\n")[-1]
            passed, said = False, f"its process ended, exit code {self.process.wait()}: {last}"
        if not passed:
            self.stop()
        return passed, said

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()  # closes stdin, which ends it
            self.process = None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
