"""What a run shows and reports, whose errors never end it, and when all processes stop."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed, nn
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import first_words
from ..model.layout import first_few
from ..processes import CollectiveRunError
from .finite import broken_names, has_broken, names_of_trained


class Progress(ProgressCallback):
    """transformers' progress bars, and the figures of each step in one line on stderr."""

    SHOWN = {  # name in the logs: format of the line
        "loss": "loss {:.4f}",
        "balance_loss": "bal {:.4f}",
        "grad_norm": "norm {:.2f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tok/s",
        "gpu_memory_gb": "{:.1f} GB",
        "eval_loss": "evaluation: loss {:.4f}",
        "eval_perplexity": "perplexity {:.2f}",
    }

    def close(self) -> None:
        """Ends the line of a bar, so that an error message starts on a new one."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                with suppress(OSError):  # stderr may be a file on a full disk
                    bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = [form.format(logs[key]) for key, form in self.SHOWN.items() if key in logs]
        if shown and state.is_world_process_zero:
            step = f"step {state.global_step}/{state.max_steps}"
            tqdm.write("  ".join([step, *shown]), file=sys.stderr)


class ProgressWithoutBars(Progress):
    """Prints the same lines for --disable_tqdm True, where transformers would print to stdout."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes no bar. The other events below do nothing either."""

    on_step_end = on_prediction_step = on_evaluate = on_predict = on_train_end = on_train_begin


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
                with suppress(OSError):
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


class StopTogether(TrainerCallback):
    """Stops all processes at the end of a step for what any of them has met.

    At SIGTERM or Ctrl-C they save and stop. Nothing is evaluated after the signal, since whoever
    stops a run may not wait for long. A second signal, more than 5 s later, ends the process at
    once. At weights or optimizer states that are not finite they stop without a save.
    """

    def __init__(self) -> None:
        self.signal = 0  # the signal that came to this process
        self.stopped = 0  # the signal that all processes stopped for; 0 also after the last step
        self.came_at = 0.0
        self.trained: dict[nn.Parameter, str] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any
    ) -> None:
        self.trained = names_of_trained(model)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if not self.signal:
            self.signal, self.came_at = number, time.monotonic()
        elif time.monotonic() - self.came_at > 5:  # A launcher passes the first on sooner.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any
    ) -> None:
        """Waits for the device once. With --single_gpu_full the gradient norm tells what breaks.

        Raises:
            CollectiveRunError: weights or states are not finite. It names them and the step.
        """
        broken = torch.tensor(0) if args.single_gpu_full else has_broken(self.trained, optimizer)
        met = torch.tensor([self.signal, 0], device=args.device)
        met[1] = broken
        if args.world_size > 1:  # The signal may reach other processes a step later.
            distributed.all_reduce(met, distributed.ReduceOp.MAX)
        stop, is_broken = met.tolist()
        if is_broken:
            names = sorted(set(gather_object(broken_names(self.trained, optimizer))))
            raise CollectiveRunError(
                f"step {state.global_step}: NaN or inf in {first_few(names)}; the last good "
                f"checkpoint is {get_last_checkpoint(args.output_dir) or 'none yet'}: repeat the "
                "command to go on from it, or lower --learning_rate"
            )
        if stop and state.global_step < state.max_steps:
            self.stopped = stop
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer comes here after a stop too, when the checkpoint is saved already."""
        if self.stopped:
            control.should_save = control.should_evaluate = False


class StopAfterLastStep(TrainerCallback):
    """Stops a resumed run that has taken all its steps, inside of an epoch, before it died.

    Trainer compares the steps with their maximum after a step only, so it would take one more.
    """

    def __init__(self) -> None:
        self.stopped = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self.stopped = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:  # This epoch's end is evaluated and saved already.
            control.should_save = control.should_evaluate = False


def leave_together() -> None:
    """Waits for all processes and closes what joins them, as the last thing that a process does.

    One process that leaves early may abort the others, and so may threads left to the exit.
    """
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
