"""Keeps TensorBoard, wandb and the progress bar from ending a run by an error of their own."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ..errors import first_words


class GuardedReporters(TrainerCallback):
    """Passes every event on to `reporters`, and drops a reporter that fails, with one warning.

    Args:
        reporters: callbacks by the names that the user knows them by.
    """

    def __init__(self, reporters: dict[str, TrainerCallback]) -> None:
        self.reporters = reporters

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):  # whichever events this version of transformers has
            return partial(self.pass_on, name)
        return super().__getattribute__(name)

    def pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        for name, reporter in list(self.reporters.items()):
            try:
                getattr(reporter, event)(*args, **kwargs)
            except Exception as error:  # many libraries raise errors of many classes
                del self.reporters[name]
                folder = getattr(reporter, "logging_dir", None)
                said = f"warning: {name} cannot report any more{f' to {folder}' if folder else ''} "
                said += f"({first_words(error)}); the run goes on without it"
                with suppress(OSError):  # stderr may be a file on a full disk
                    tqdm.write(said, file=sys.stderr)


@contextmanager
def silent_writer_threads() -> Iterator[None]:
    """Keeps Python from printing the tracebacks of TensorBoard's writer thread.

    The next call of the writer raises such an error once more, and GuardedReporters reports it.
    """
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if not type(found.thread).__module__.startswith(("tensorboard.", "tensorboardX.")):
            before(found)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
