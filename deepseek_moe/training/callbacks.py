"""What a run shows on stderr, and how it stops at a signal."""

import os
import signal
import sys
import time
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback


class Progress(ProgressCallback):
    """transformers' bars, with the figures of a step in one line on stderr."""

    SHOWN = {  # name in the logs: how it is shown
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
        """Ends the line of a bar, so that an error stands on one of its own."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = [form.format(logs[key]) for key, form in self.SHOWN.items() if key in logs]
        if shown and state.is_world_process_zero:
            step = f"step {state.global_step}/{state.max_steps}"
            tqdm.write("  ".join([step, *shown]), file=sys.stderr)


class ProgressWithoutBars(Progress):
    """The same lines, for --disable_tqdm True. transformers would print to stdout."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes no bar, and so do those below."""

    on_step_end = on_prediction_step = on_evaluate = on_predict = on_train_end = on_train_begin


class StopAtSignal(TrainerCallback):
    """SIGTERM, or Ctrl-C: saves at the end of the step, on all processes, and stops; nothing is
    evaluated any more, since who stops a run may not wait for long."""

    def __init__(self) -> None:
        self.signal = 0  # that came to this process
        self.stopped = 0  # that all processes stopped for; none in the last step: that ends anyway
        self.noted = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if not self.signal:
            self.signal, self.noted = number, time.monotonic()
        elif time.monotonic() - self.noted > 5:  # sooner, a launcher passes on the first one
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = torch.tensor(self.signal, device=args.device)
        if args.world_size > 1:  # it may have reached the others a step later
            distributed.all_reduce(stop, distributed.ReduceOp.MAX)
        if int(stop) and state.global_step < state.max_steps:
            self.stopped = int(stop)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer comes here from a stop too, which is saved."""
        if self.stopped:
            control.should_save = control.should_evaluate = False
