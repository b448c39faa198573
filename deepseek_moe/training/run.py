"""A run in its output folder: new, to be resumed, or finished; and what it leaves there.

`run.json` holds the settings that decide the result. Repeating a command goes on from the last
checkpoint if these are the same, or says that the run is finished.
"""

import json
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint import Checkpoint, fingerprint, is_outdated
from ..checkpoint_writer import write_checkpoint
from ..delta import DELTA_FILE, whole_tensors, write_delta
from ..errors import UserError
from ..experts.choose import CHOICE_FILE
from ..files import describe_differences, lock, remove_unfinished, write_aside
from ..json_file import read_object
from ..model.layout import first_few
from ..model_card import CARD, HASHED, last_losses, model_card, shown_name
from . import examples
from .adapter_config import hash_adapter
from .arguments import DataArguments, FineTuningArguments, ModelArguments, split_commas
from .chosen_experts import has_chosen_experts
from .deepspeed_file import zero_stage
from .merge_lora import merged_tensors
from .quantized_base import QUANTIZATION_FILE
from .saving import INCOMPLETE, report_failed_write, tensors_on_host, trained_on_host
from .trainer import FineTuner

RUN_FILE = "run.json"
LOCK = ".lock"

WRITTEN = ("checkpoint-*", INCOMPLETE, "config.json", "generation_config.json")
WRITTEN += ("model*.safetensors", "model.safetensors.index.json")
WRITTEN += ("adapter", "adapter_config.json", "adapter_model*.safetensors")
WRITTEN += (QUANTIZATION_FILE, CHOICE_FILE)
WRITTEN += (DELTA_FILE, "delta*.safetensors", "delta.safetensors.index.json")
WRITTEN += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WRITTEN += ("configuration_deepseek.py", "modeling_deepseek.py", "balance_loss.py", "layout.py")
WRITTEN += ("fast_generation.py",)
"""Patterns of the names that a run writes into its folder, or removes from it, beside RUN_FILE."""
DECIDE = (
    "use_lora trainable lora_rank lora_alpha lora_dropout modules_to_save bits quant_type "
    "double_quant eval_fraction model_max_length packing train_sampling_strategy "
    "dataloader_drop_last num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm seed full_determinism bf16"
)
"""Options that decide the result. Others say where and when something is saved or shown, or how
the same numbers are computed. Model, rows and batch size count too, however they are given."""
DEFAULTS = {
    one.name: one.default
    for one in (*fields(ModelArguments), *fields(DataArguments), *fields(FineTuningArguments))
    if one.default is not MISSING
}
"""The value that a setting had in a run whose run.json does not have it."""


class Run:
    """What `output_dir` holds of a run with these `settings`: `checkpoint`, the last one or None,
    and whether the run is `finished`. Base `model` and `data` are noted as the user named them.

    Raises:
        UserError: the folder holds another run, or files that a run would write over.
    """

    def __init__(
        self, output_dir: str, settings: dict[str, Any], model: str = "", data: Sequence[str] = ()
    ) -> None:
        self.folder, self.settings = Path(output_dir), settings
        self.record = {"model": shown_name(model), "data": [*map(shown_name, data)], "losses": {}}
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; give another --output_dir")
        self.checkpoint = get_last_checkpoint(output_dir) if self.folder.is_dir() else None
        self.finished = False
        if (self.folder / RUN_FILE).is_file():
            found = read_object(self.folder / RUN_FILE, "give another --output_dir")
            settings, self.finished = found.get("settings"), found.get("finished")
            if not isinstance(settings, dict) or not isinstance(self.finished, bool):
                raise UserError(
                    f"{self.folder / RUN_FILE} is not what a run writes; give another --output_dir"
                )
            if self.checkpoint or self.finished:  # Else there is nothing to go on from.
                self._refuse_others(settings)
        elif there := [file.name for pattern in WRITTEN for file in self.folder.glob(pattern)]:
            raise UserError(
                f"{self.folder} holds {first_few(there)}, which a run writes too, but no "
                f"{RUN_FILE} that says of which run; give another --output_dir"
            )
        for file in (self.folder / name for name in (LOCK, RUN_FILE, INCOMPLETE)):
            kind = stat.S_ISDIR if file.name == INCOMPLETE else stat.S_ISREG
            if os.path.lexists(file) and not kind(file.lstat().st_mode):
                raise UserError(f"{file} is not what a run makes there; give another --output_dir")

    @property
    def steps(self) -> int:
        """The steps that its last checkpoint has taken; 0 without one."""
        return int(self.checkpoint.rpartition("-")[2]) if self.checkpoint else 0

    def _refuse_others(self, found: dict[str, Any]) -> None:
        there, now = DEFAULTS | found, DEFAULTS | self.settings
        for name in there | now:  # None, False, 0 and what is empty all mean off.
            if not there.get(name) and not now.get(name):
                there[name] = now[name] = None
        differ = describe_differences(there, now, HASHED)
        if "model" in differ and is_outdated(found.get("model")):
            raise UserError(
                f"{self.folder} holds a run of an older version of this code, which noted its base "
                "model in another way; finish it with that version, or give another --output_dir"
            )
        if differ:
            raise UserError(
                f"{self.folder} holds a run with other settings ({'; '.join(differ.values())}); "
                "repeat its command, or give another --output_dir"
            )

    def start(self) -> None:
        """Claims the folder for this process, and clears away what an interrupted save left.

        Raises:
            UserError: the folder cannot be written to, or another process is running in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("a")
            lock(self._lock)
        except BlockingIOError as error:
            raise UserError(
                f"another process is running in {self.folder}; wait for it, end it, or give "
                "another --output_dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written to ({error.strerror}); give another --output_dir"
            ) from error
        shutil.rmtree(self.folder / INCOMPLETE, ignore_errors=True)
        remove_unfinished(self.folder / RUN_FILE)
        with report_failed_write(self.folder, main=True):
            self._write(finished=False)

    def save_result(
        self, trainer: FineTuner, base: Path, merge: bool = False, delta: bool = False
    ) -> None:
        """Writes the result to the root of the run: the whole model, or only what changed; the
        adapter, or the merged model with the adapter in a folder of its own. All processes call it.

        Args:
            base: the folder of the base model.
            merge: whether to merge an adapter.
            delta: whether to write only what changed, where chosen experts have trained.

        Raises:
            RunError: the result cannot be written. The last checkpoint stays.
            UserError: the adapter cannot be merged. It stays.
        """
        with report_failed_write(self.folder, trainer.is_world_process_zero()):
            save = partial(self._save_result, trainer, base, merge, delta)
            trainer.save_sparingly(save, self.folder / INCOMPLETE)
        trainer.accelerator.wait_for_everyone()

    def _save_result(self, trainer: FineTuner, base: Path, merge: bool, delta: bool) -> None:
        aside = self.folder / INCOMPLETE
        result, adapter = aside / "result", aside / "adapter"
        self.record["losses"] = last_losses(trainer.state.log_history)
        adapts = isinstance(trainer.model, PeftModel)
        if adapts:
            trainer.save_model(str(adapter))
        else:
            state = trainer.whole_parameters()
        if not trainer.is_world_process_zero():
            return
        if adapts:
            (adapter / "README.md").unlink(missing_ok=True)  # PEFT's form, not filled in
            if not merge:
                self._publish(adapter)
                return
            kept = self.folder / "adapter"  # It stays if the merge is refused.
            if kept.exists():  # What is half removed must not have its name.
                os.replace(kept, aside / "adapter-before")
            os.replace(adapter, kept)
            tensors = merged_tensors(base, kept)
        elif has_chosen_experts(trainer.model):
            changed = trained_on_host(trainer.model, state)
            if delta:
                write_delta(changed, base, result, trainer.shard_bytes)
                self._publish(result)
                return
            tensors = whole_tensors(base, changed)
        else:
            tensors = tensors_on_host(trainer.model, state)
        made = "The base model, fine-tuned."
        card = model_card(made, self.record["model"], base, self._content(finished=True))
        write_checkpoint(tensors, Checkpoint(base), result, None, trainer.shard_bytes, card)
        self._publish(result)

    def _publish(self, result: Path) -> None:
        """Moves the files to the root; last those by which a folder is known for what it is."""
        last = {DELTA_FILE, *(file.name for file in result.glob("*config*"))}
        for file in sorted(result.iterdir(), key=lambda file: file.name in last):
            if file.name != CARD or not os.path.lexists(self.folder / CARD):  # the user's own
                os.replace(file, self.folder / file.name)
        self._write(finished=True)
        shutil.rmtree(self.folder / INCOMPLETE)

    def _content(self, finished: bool) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"finished": finished, "settings": self.settings, "versions": versions} | self.record

    def _write(self, finished: bool) -> None:
        content = json.dumps(self._content(finished), indent=2)
        write_aside(self.folder / RUN_FILE, f"{content}\n")


def settings_of(
    model: ModelArguments,
    data: DataArguments,
    training: FineTuningArguments,
    folder: Path,
    train: datasets.Dataset,
    evaluation: datasets.Dataset | None,
) -> dict[str, Any]:
    """All settings that decide the result of a run, as JSON has them; `folder` holds the base."""
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    given = vars(model) | vars(data) | vars(training)
    chosen = {name: getattr(given[name], "value", given[name]) for name in DECIDE.split()}
    return chosen | {
        "model": fingerprint(folder),
        "data": examples.fingerprint(train),
        "eval_data": examples.fingerprint(evaluation) if evaluation else None,
        "adapter": hash_adapter(model.adapter) if model.adapter else None,
        "trainable": split_commas(model.trainable),
        "train_experts": {str(layer): ids for layer, ids in (model.chosen_experts or {}).items()},
        "batch_size": batch * training.world_size,
        "zero_stage": zero_stage(training),
    }
