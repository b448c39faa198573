"""What a run reports (TensorBoard, wandb, ..., its progress bar) never ends the run."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class Reports(TrainerCallback):
    """Passes all events on to `reporters`; one that fails is left out from then on, with a warning.

    Args:
        reporters: callbacks by the names that the user knows them by.
    """

    def __init__(self, reporters: dict[str, TrainerCallback]) -> None:
        self.reporters = reporters

    def pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        for name, reporter in list(self.reporters.items()):
            try:
                getattr(reporter, event)(*args, **kwargs)
            except Exception as error:  # of many libraries, and of any class
                del self.reporters[name]
                where = getattr(reporter, "logging_dir", None)
                found = " ".join(str(error).split())[:200] or type(error).__name__
                warn(
                    f"{name} cannot report any more{f' to {where}' if where else ''} ({found}); "
                    "the run goes on without it"
                )


def _passing_on(event: str) -> Callable[..., None]:
    def on_event(self: Reports, *args: Any, **kwargs: Any) -> None:
        self.pass_on(event, *args, **kwargs)

    return on_event


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Reports, _event, _passing_on(_event))


def warn(message: str) -> None:
    """One line on stderr, beside a progress bar; nothing where stderr itself cannot be written."""
    with suppress(OSError):
        tqdm.write(f"warning: {message}", file=sys.stderr)


@contextmanager
def silent_writer_threads() -> Iterator[None]:
    """TensorBoard writes in a thread, whose errors it hands on to the next call of its writer.
    Python would print their traceback as well."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if not type(found.thread).__module__.startswith(("tensorboard.", "tensorboardX.")):
            before(found)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
