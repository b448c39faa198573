"""Accidents of a run of the script: give one to `run` as `before`, such as partial(die_in_step, 8).

Each is called in the process of the script, before the script starts.
"""

import os
import pkgutil
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TUNER = "deepseek_moe.training.trainer.FineTuner"


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner: str, name: str, count: int, then: Callable[..., None]) -> None:
    """Calls `then`, with the same arguments, before the `count`-th call of a function.

    Args:
        owner: the class or module that has the function, as "package.module.Class".
    """
    where: Any = pkgutil.resolve_name(owner)
    original, calls = getattr(where, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            then(*args)
        return original(*args, **kwargs)

    setattr(where, name, counted)


def die_in_step(number: int) -> None:
    """Dies in the forward pass of this process's step `number`."""
    before_call(TUNER, "compute_loss", number, die)


def stop_in_step(number: int, kind: int = signal.SIGTERM) -> None:
    """Sends this process a signal in a step, twice: a launcher passes it on."""

    def raise_twice(*_: Any) -> None:
        signal.raise_signal(kind)
        signal.raise_signal(kind)

    before_call(TUNER, "compute_loss", number, raise_twice)


def die_in_file(number: int, weights: bool = False) -> None:
    """Dies when half of the file `number` of those that torch.save writes, or of those that hold
    weights, is written."""
    where = ("deepseek_moe.checkpoint_writer", "save_file") if weights else ("torch", "save")
    save = save_file if weights else torch.serialization.save

    def write_half(content: Any, file: str, *_: Any) -> None:
        save(content, file)
        os.truncate(file, os.path.getsize(file) // 2)
        die()

    before_call(*where, number, write_half)


def die_after(seconds: float) -> None:
    """Dies when this process has computed for so long, wherever it is then."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends it


TOUCHES = {"open", "shutil.rmtree"}
TOUCHES |= {f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "chmod", "link")}


def die_at_touch(number: int, folder: Path) -> None:
    """Dies before `folder`, or what is in or beside it, is changed for the `number`-th time."""
    touched = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touched
        if event not in TOUCHES or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        in_removal = event in ("os.remove", "os.rmdir") and args[1] != -1  # by shutil.rmtree
        if in_removal or any(str(arg).startswith(str(folder)) for arg in args[:2]):
            touched += 1
            if touched == number:
                die()

    sys.addaudithook(hook)


def die_before_renaming_to(tail: str) -> None:
    """Dies before a file or folder gets a path that ends with `tail`."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(tail):
            die()
        original(source, target)

    os.replace = replace


def die_after_training() -> None:
    before_call("deepseek_moe.training.run.Run", "_publish", 1, die)


def limit_file_size(size: int, *_: Any) -> None:
    """Lets no file of this process grow over `size` bytes from now on, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
