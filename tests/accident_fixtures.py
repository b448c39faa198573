"""Accidents of a run of the script: give one to `run` as `before`, such as partial(die_in_step, 8).

Each is called in the process of the script, before the script starts.
"""

import os
import pkgutil
import resource
import signal
from collections.abc import Callable
from typing import Any

import torch

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


def die_in_file(number: int) -> None:
    """Dies when half of the file `number` of those that torch.save writes is written."""

    def write_half(content: Any, file: str, *_: Any) -> None:
        torch.serialization.save(content, file)
        os.truncate(file, os.path.getsize(file) // 2)
        die()

    before_call("torch", "save", number, write_half)


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
