"""What this model's fine-tuning adds to transformers' Trainer.

- the balance loss with the weight it has in one big batch, however the batch is cut up, and shown
- a step whose loss or gradient is not a number stops the run before it spoils a checkpoint
- with --single_gpu_full, steps inside the backward pass
- evaluation by the token, on any number of processes
- the same order of examples in a run that was interrupted
- checkpoints that are complete or absent; SIGTERM saves and leaves
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ..errors import CollectiveRunError, as_user_error
from .arguments import zero_stage
from .callbacks import Progress, ProgressWithoutBars, StopAtSignal
from .compute.adamw_in_backward import StepInBackward
from .epoch_sampler import EpochSampler
from .log_writers import Reports, silent_writer_threads
from .quantized_base import Quantization
from .resume import ResumingTrainer
from .saving import (
    INCOMPLETE,
    SHARD_BYTES,
    RehearseSave,
    report_failed_save,
    save_sparingly,
    save_weights,
)
from .trainable import weights_passed


class FineTuner(ResumingTrainer):
    """transformers' Trainer for batches of `data.Collator`."""

    def __init__(self, *args: Any, quantization: Quantization | None = None, **kwargs: Any) -> None:
        """`quantization` is that of the base under the adapters; all else is transformers'."""
        super().__init__(*args, **kwargs)
        self.base_quantization = quantization
        self.stopper = StopAtSignal()
        self.add_callback(self.stopper)
        self.progress = ProgressWithoutBars() if self.args.disable_tqdm else Progress()
        kinds = get_reporting_integration_callbacks(self.args.report_to)
        reporters = {
            name: self.pop_callback(kind)
            for name, kind in zip(self.args.report_to, kinds, strict=True)
        }
        if self.pop_callback(ProgressCallback) or self.pop_callback(PrinterCallback):
            reporters["the progress bar"] = self.progress
        self.add_callback(Reports(reporters))
        self.add_callback(RehearseSave())
        self._aside: str | None = None  # where a checkpoint is being written
        self.shard_bytes = SHARD_BYTES
        self._sources: list[str] = []  # the rows of the running step
        self._sequences_in_step = 0
        self._broken_loss: float | None = None
        self._evaluated = torch.zeros(2)
        self._reset_counters()

    def _reset_counters(self) -> None:
        self._counted_from, self._tokens, self._steps = time.perf_counter(), 0, 0
        self._balance = torch.zeros((), device=self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with silent_writer_threads():
                return super().train(*args, **kwargs)
        finally:
            with suppress(OSError):
                self.progress.close()

    def leave_if_stopped(self) -> None:
        """Ends the process, if a signal ended the training, as that signal would have."""
        if self.stopper.stopped:
            if self.is_world_process_zero():
                last = get_last_checkpoint(self.args.output_dir)
                print(f"stopped; repeat the command to go on from {last}", file=sys.stderr)
            leave_together()
            raise SystemExit(128 + self.stopper.stopped)

    # ---- the loss ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of a step; counts their sequences on all processes."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        count = torch.tensor(sum(len(batch["sources"]) for batch in batches))
        count = self.accelerator.gather(count.to(self.args.device).view(1)).sum()
        self._sequences_in_step, self._sources = int(count), []
        self._steps += 1
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        sources = inputs.pop("sources")
        self._sources += sources
        share = len(sources) / self._sequences_in_step
        # Processes average their gradients, as they do the language loss's.
        inputs["aux_loss_scale"] = share * self.accelerator.num_processes
        inputs["num_sequences"] = len(sources)
        self._tokens += int((inputs["sequence_ids"] >= 0).sum())
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.aux_loss is not None:
            self._balance += outputs.aux_loss.detach() * inputs["aux_loss_scale"]
        if not math.isfinite(loss.detach()):
            self._broken_loss = float(loss.detach())
            if self.accelerator.num_processes == 1:
                self._refuse("loss", self._broken_loss)
            # With others, all stop at the gradient norm, which it makes NaN on every process.
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: PreTrainedModel | None = None) -> Any:
        if not args.single_gpu_full:
            name = getattr(args.optim, "value", args.optim)
            with as_user_error(f"--optim {name} cannot be made", "choose another"):
                return Trainer.get_optimizer_cls_and_kwargs(args, model)
        betas = (args.adam_beta1, args.adam_beta2)
        options = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        return StepInBackward, options | {"seed": args.seed}

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.single_gpu_full:  # the weights are stepped, but no checkpoint has them yet
            norm = self.optimizer.optimizer.grad_norm()  # accelerate's holds ours
        else:
            norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None and not 0 <= float(norm) < math.inf:  # DeepSpeed may say -1
            self._refuse("gradient norm", float(norm))
        return norm

    def _refuse(self, what: str, value: float) -> None:
        """Stops all processes in a step that has a number that is none; called by all of them."""
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
        """Adds balance loss, tokens/s of all processes, and GPU memory to the training's lines."""
        if "loss" in logs:
            seconds = time.perf_counter() - self._counted_from
            counts = torch.stack([self._balance, self._balance.new_tensor(self._tokens)])
            counts = self.accelerator.gather(counts[None])
            logs["balance_loss"] = counts[:, 0].mean().item() / self._steps
            logs["tokens_per_second"] = round(counts[:, 1].sum().item() / seconds, 1)
            if torch.cuda.is_available():
                logs["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            self._reset_counters()
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """6 for each weight that a token passes: of the routed experts only those that it picks,
        where transformers counts all (by a walk through thousands of modules, at each step)."""
        return 6 * inputs["input_ids"].numel() * self._weights_passed

    @cached_property
    def _weights_passed(self) -> float:
        return weights_passed(self.model)

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")[:, 1:]
        inputs.pop("sources")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        pairs = zip(logits, labels, strict=True)  # by the row: in fp32 all logits are many bytes
        sums = [F.cross_entropy(row.float(), label, reduction="sum") for row, label in pairs]
        nats = torch.stack(sums)
        counts = torch.stack([nats, (labels >= 0).sum(dim=1)], dim=1)
        # leaves out the rows that fill up the last batch of several processes
        self._evaluated += self.accelerator.gather_for_metrics(counts).sum(dim=0).cpu()
        return counts[:, 0].sum() / counts[:, 1].sum(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers' own, with a loss that each token counts in once, and its perplexity; it
        leaves the random numbers of training alone, which go on the same after a stop."""
        start, self._evaluated = time.perf_counter(), torch.zeros(2)
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
        self._counted_from += time.perf_counter() - start  # not of the next step's tokens/s
        return output

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Of all rows: --dataloader_drop_last is for training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops

    # ---- the order of examples ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        args, dataset = self.args, train_dataset or self.train_dataset
        grouped = args.train_sampling_strategy == "group_by_length"
        if args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(dataset)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = EpochSampler(dataset["length"], seed, step if grouped else 1)
        self.add_callback(sampler.callback)
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """None where a run is repeated that died after its last step, in the middle of an epoch:
        Trainer would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes aside and renames, so that a checkpoint that has its name is complete."""
        start = time.perf_counter()
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        aside = output / INCOMPLETE
        with report_failed_save(output, self.is_world_process_zero()):
            self._aside = str(aside)
            self.save_sparingly(lambda: super(FineTuner, self)._save_checkpoint(model, trial))
        self._aside = None
        self.state.best_model_checkpoint = None  # It would name a folder that has been renamed.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            if (output / name).exists():  # of the same step; half deleted, it must not be found
                os.replace(output / name, aside / f"{name}-before")
            os.replace(aside / name, output / name)
            if (self.args.save_total_limit or 0) > 0:  # else there is none
                for old in sort_checkpoints(str(output))[: -self.args.save_total_limit]:
                    os.replace(old, aside / Path(old).name)  # half deleted, it must not be found
            shutil.rmtree(aside)
        self.accelerator.wait_for_everyone()
        self._counted_from += time.perf_counter() - start

    def save_sparingly(self, save: Callable[[], None]) -> None:
        """`saving.save_sparingly` of what `save` writes into the folder for incomplete files."""

        def save_in_shards(shard_bytes: int) -> None:
            self.shard_bytes = shard_bytes
            save()

        aside = Path(self.args.output_dir) / INCOMPLETE
        save_sparingly(save_in_shards, aside, alone=self.args.world_size == 1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer would copy all weights to the host of every process, except under ZeRO-3."""
        state = self.whole_parameters()
        if self.args.should_save:
            self._save(output_dir, state)

    def whole_parameters(self) -> dict[str, torch.Tensor] | None:
        """Under ZeRO-3 all parameters that train, on the first process's host; else None, since the
        model has them. All processes call it."""
        if zero_stage(self.args) != 3:
            return None
        adapter = isinstance(self.model, PeftModel)
        gather = self.model_wrapped._zero3_consolidated_16bit_state_dict
        return gather(exclude_frozen_parameters=adapter)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            on_host = {n: p.detach().cpu() for n, p in (state_dict or trained).items()}
            self.model.save_pretrained(str(folder), state_dict=on_host)
            if self.base_quantization:
                self.base_quantization.save(folder)
        else:
            save_weights(self.model, folder, state_dict, self.shard_bytes)
        self.processing_class.save_pretrained(str(folder))


def leave_together() -> None:
    """Waits for all processes and closes what joins them, as the last thing that a process does.

    One process that leaves early may abort the others, and so may threads left to the exit.
    """
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
