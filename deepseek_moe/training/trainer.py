"""What the fine-tuning of this model adds to transformers' Trainer.

- The balance loss weighs as much as in one big batch, however the batch is cut up, and is logged,
  with how evenly the experts are used.
- A loss, gradient norm, weight or optimizer state that is not a finite number stops the run in its
  step, before it spoils a checkpoint.
- With --single_gpu_full, the optimizer steps inside the backward pass.
- Evaluation counts every token once, on any number of processes.
- A resumed run sees the same order of examples.
- A checkpoint is complete or absent. A signal to stop saves one first.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..delta import STEM
from ..model.layout import weight_files
from ..processes import CollectiveRunError
from . import callbacks, saving
from .chosen_experts import has_chosen_experts, read_trained
from .compute.replayed_model import MOST_TOKENS, use_replays
from .compute.varlen_attention import VARLEN
from .deepspeed_file import zero_stage
from .epoch_sampler import load_in_order
from .examples import FLAT
from .expert_load import ExpertBoard, ExpertLoad
from .optimizer import optimizer_of
from .parameter_counts import weights_passed
from .quantized_base import Quantization
from .resume import Layout, refuse_other_adapter, refuse_other_states, report_unreadable


class FineTuner(Trainer):
    """transformers' Trainer for batches of `examples.Collator`."""

    def __init__(self, *args: Any, quantization: Quantization | None = None, **kwargs: Any) -> None:
        """`quantization` is that of the base under the adapters; all else is transformers'."""
        super().__init__(*args, **kwargs)
        self.base_quantization = quantization
        bits = quantization.bits if quantization else 16
        self.most_replayed = MOST_TOKENS if use_replays(self.model, self.args, bits) else 0
        quiet, names = self.args.disable_tqdm, self.args.report_to
        self.pop_callback(PrinterCallback if quiet else ProgressCallback)
        self.progress = callbacks.ProgressWithoutBars() if quiet else callbacks.Progress()
        found = map(self.pop_callback, get_reporting_integration_callbacks(names))
        reporters = dict(zip(names, found, strict=True)) | {"the progress bar": self.progress}
        self.expert_load = ExpertLoad(self.model.config, self.args.device)
        if "tensorboard" in reporters:
            reporters["tensorboard"] = ExpertBoard(self.expert_load)
        self.stopper = callbacks.StopTogether()
        self.add_callback(self.stopper)
        self.add_callback(callbacks.StopAfterLastStep())
        self.add_callback(callbacks.GuardedReporters(reporters))
        self.add_callback(saving.RehearseSave())
        self.own_optimizer: torch.optim.Optimizer | None = None  # accelerate wraps it
        self.shard_bytes = saving.SHARD_BYTES
        self._in_step = False  # whether the first step has begun
        self._broken_loss: float | None = None
        self._weights_passed = 0.0
        self._reset_counters()

    def _reset_counters(self) -> None:
        self._counted_from, self._tokens, self._steps = time.perf_counter(), 0, 0

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        adapts, quantized = isinstance(self.model, PeftModel), self.base_quantization is not None
        layout = Layout.of(self.args, adapts, quantized, has_chosen_experts(self.model))
        reading = report_unreadable(self.resumed_from, layout, is_read=lambda: self._in_step)
        try:
            with callbacks.silent_writer_threads(), reading:
                return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.progress.close()

    def leave_if_stopped(self) -> None:
        """Ends the process with the exit code of the signal that ended the training, if any did."""
        if self.stopper.stopped:
            if self.is_world_process_zero():
                last = get_last_checkpoint(self.args.output_dir)
                print(f"stopped; repeat the command to go on from {last}", file=sys.stderr)
            callbacks.leave_together()
            raise SystemExit(128 + self.stopper.stopped)

    # ---- the loss and the optimizer ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Returns the micro-batches of a step, and counts their sequences on all processes."""
        if self.control.should_training_stop:  # by StopAfterLastStep
            return [], None
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        count = sum(len(batch["sources"]) for batch in batches)
        if self.args.world_size > 1:
            count = torch.tensor([count], device=self.args.device)
            count = int(self.accelerator.gather(count).sum())
        self._sequences_in_step, self._sources = count, []
        self._steps += 1
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self._in_step = True
        sources = inputs.pop("sources")
        self._sources += sources
        share = len(sources) / self._sequences_in_step
        # The gradients are averaged over the processes, so each counts its share that many times.
        inputs["aux_loss_scale"] = share * self.accelerator.num_processes
        inputs["num_sequences"] = len(sources)
        self._tokens += inputs.pop("num_tokens")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.expert_load.add(outputs, inputs["sequence_ids"], share)
        if not math.isfinite(loss.detach()):
            self._broken_loss = float(loss.detach())
            if self.accelerator.num_processes == 1:
                self._refuse("loss", self._broken_loss)
            # Several processes stop together at the gradient norm, which is NaN on all of them.
        return loss

    get_optimizer_cls_and_kwargs = staticmethod(optimizer_of)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        self.own_optimizer = super().create_optimizer(*args, **kwargs)
        if self.resumed_from and not self.is_deepspeed_enabled:
            refuse_other_states(self.own_optimizer, self.resumed_from / "optimizer.pt")
        return self.own_optimizer

    def _refuse(self, what: str, value: float) -> None:
        """Stops the run in a step that has a broken number. All processes call this together."""
        found = gather_object([(self._broken_loss, self._sources)])
        broken = [(loss, sources) for loss, sources in found if loss is not None]
        if broken:
            what, value, found = "loss", broken[0][0], broken
        sources = [source for _, some in found for source in some]
        rows = ", ".join(sources[:8]) + (" ..." if len(sources) > 8 else "")
        good = get_last_checkpoint(self.args.output_dir)
        raise CollectiveRunError(
            f"step {self.state.global_step + 1}: the {what} is {value}, in rows {rows}; "
            f"the last good checkpoint is {good or 'none yet'}: look at these rows, or lower "
            "--learning_rate"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the experts did, tokens/s of all processes, and GPU memory to the lines of
        training."""
        if "loss" in logs:
            seconds = time.perf_counter() - self._counted_from
            tokens = torch.tensor(self._tokens, device=self.args.device)
            tokens = self.accelerator.reduce(tokens).item()
            logs |= self.expert_load.read(self.accelerator, self._steps)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            if torch.cuda.is_available():
                logs["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            self._reset_counters()
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Counts 6 for each weight that a token passes, where Trainer counts all experts."""
        self._weights_passed = self._weights_passed or weights_passed(self.model)
        return 6 * inputs["input_ids"].numel() * self._weights_passed

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        inputs = {n: value for n, value in inputs.items() if n not in ("sources", "num_tokens")}
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        # All logits together would take much memory in fp32, so each row is cast by itself.
        pairs = zip(logits, labels, strict=True)
        nats = [F.cross_entropy(row.float(), label, reduction="sum") for row, label in pairs]
        counts = torch.stack([torch.stack(nats), (labels >= 0).sum(dim=1)], dim=1)
        # This leaves out the rows that fill up the last batch of several processes.
        self._evaluated += self.accelerator.gather_for_metrics(counts).sum(dim=0).cpu()
        return counts[:, 0].sum() / counts[:, 1].sum(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluates as Trainer does, but with the mean loss of a token and its perplexity.

        The random numbers of training stay untouched, so that they go on the same after a stop.
        """
        start, self._evaluated = time.perf_counter(), torch.zeros(2)  # nats, tokens
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = (self._evaluated[0] / self._evaluated[1]).item()
        if not math.isfinite(loss):
            good = get_last_checkpoint(self.args.output_dir)
            raise CollectiveRunError(
                f"step {self.state.global_step}: the evaluation loss is {loss}; the last "
                f"checkpoint is {good or 'none yet'}: look at the rows to evaluate on, and at the "
                "base model's weights"
            )
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700))
        self._counted_from += time.perf_counter() - start  # not part of the next step's tokens/s
        return output

    # ---- the order of examples ----

    def get_train_dataloader(self) -> DataLoader:
        """Loads the examples in an order that a resumed run sees again. Where attention takes
        packed rows, the rows of a batch lie end to end without padding, as replays need it."""
        args, collate = self.args, self.data_collator
        if self.model.config._attn_implementation == VARLEN and args.world_size == 1:
            collate = partial(collate, flat=FLAT, most_equal=self.most_replayed)
        if args.train_sampling_strategy == "sequential":
            with changed(self, data_collator=collate):
                return super().get_train_dataloader()
        loader, set_epoch = load_in_order(self.train_dataset, args, collate)
        self.add_callback(set_epoch)
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Loads all rows: --dataloader_drop_last is for training."""
        with changed(self.args, dataloader_drop_last=False):
            return super().get_eval_dataloader(*args, **kwargs)

    # ---- saving ----

    def save_sparingly(self, save: Callable[[], None], aside: Path) -> None:
        """Calls `save`, which fills the folder `aside`. If memory runs out, it is called again with
        a file for each tensor, but not on several processes: the others would never join."""
        clear_device_cache(garbage_collection=True)
        self.shard_bytes = saving.SHARD_BYTES
        try:
            return save()
        except Exception as error:
            if self.args.world_size > 1 or not saving.is_out_of_memory(error):
                raise
        # Inside of `except`, the traceback of the error would keep tensors alive.
        shutil.rmtree(aside, ignore_errors=True)
        clear_device_cache(garbage_collection=True)
        self.shard_bytes = saving.ONE_TENSOR
        save()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves without the copy of all weights that Trainer makes on the host of every process."""
        state = self.whole_parameters()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            saving.save_trained(self.model, folder, state, self.shard_bytes)
            if self.base_quantization:
                self.base_quantization.save(folder)
            self.processing_class.save_pretrained(str(folder))

    def whole_parameters(self) -> dict[str, torch.Tensor] | None:
        """Gathers what ZeRO-3 has divided, else returns None. All processes call it."""
        if zero_stage(self.args) == 3:
            return saving.gather_parameters(self.model, keep=self.is_world_process_zero())
        return None

    # ---- private methods of Trainer ----
    # These overrides follow transformers/trainer.py from 5.17 to 5.24; the line numbers are those
    # of 5.24. A test fails when Trainer changes their signatures or calls.

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses a step by its gradient norm (line 2789, called at 1940 by `_run_epoch`).

        The callback after this call, on_pre_optimizer_step, is not given the norm.
        """
        if self.args.single_gpu_full:  # The weights are stepped, but not in a checkpoint yet.
            norm = self.own_optimizer.grad_norm()
        else:
            norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not 0 <= float(norm) < math.inf:  # DeepSpeed's may be -1.
            stepped = ", a weight or a state of AdamW" if self.args.single_gpu_full else ""
            self._refuse(f"gradient norm{stepped}", float(norm))
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Gives a checkpoint its name when it is complete (line 3363).

        No callback comes before a save. The one after it comes when the folder has its name.
        """
        start, save = time.perf_counter(), partial(super()._save_checkpoint, model, trial)
        output, main = Path(self.args.output_dir), self.is_world_process_zero()
        aside = output / saving.INCOMPLETE
        with saving.report_failed_write(output, main), changed(self.args, output_dir=str(aside)):
            self.save_sparingly(save, aside)
        self.state.best_model_checkpoint = None  # It would name a folder that has been renamed.
        self.accelerator.wait_for_everyone()
        if main:
            name = f"checkpoint-{self.state.global_step}"
            saving.publish_checkpoint(output, name, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._counted_from += time.perf_counter() - start

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Lets DeepSpeed leave out frozen weights beside chosen experts, as Trainer does beside
        adapters (line 3521, called at 3400 by `_save_checkpoint`)."""
        if not (self.is_deepspeed_enabled and has_chosen_experts(self.model)):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads weights by the names that they have on disk (line 3610, called at 1564 by `train`).

        Trainer does not apply the conversion mapping that `from_pretrained` applies. It would find
        none of the stacked experts, warn, and go on with those of the base model.
        """
        model = model or self.model
        if isinstance(model, PeftModel):  # An adapter has the same names on disk.
            refuse_other_adapter(model, Path(checkpoint))
            super()._load_from_checkpoint(checkpoint, model)
            return
        stem = STEM if has_chosen_experts(model) else "model"
        read_trained(model, weight_files(Path(checkpoint), stem))  # what is frozen is the base's


@contextmanager
def changed(args: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of `args` to other values for a while."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)
