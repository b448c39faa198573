"""A run in its output folder: new, to be resumed, or finished; and what it leaves there.

`run.json` says what decides the result: data, model, adapter and training settings. Repeating a
command goes on from the last checkpoint, if all of these are the same, or says that all is done.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint_writer import write_checkpoint
from ..errors import UserError
from ..files import lock
from ..fingerprint import fingerprint, is_outdated
from ..model.layout import first_few
from . import examples
from .arguments import DataArguments, FineTuningArguments, ModelArguments, split_commas, zero_stage
from .merge_lora import merged_tensors
from .quantized_base import QUANTIZATION_FILE
from .saving import INCOMPLETE, report_failed_write, tensors_on_host
from .trainer import FineTuner

RUN_FILE = "run.json"

# What a run writes into its folder, or removes from it, beside FILE: patterns of names.
WRITTEN = ("checkpoint-*", INCOMPLETE, "config.json", "generation_config.json")
WRITTEN += ("model*.safetensors", "model.safetensors.index.json")
WRITTEN += ("adapter", "adapter_config.json", "adapter_model*.safetensors", QUANTIZATION_FILE)
WRITTEN += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WRITTEN += ("configuration_deepseek.py", "modeling_deepseek.py", "layout.py")
HASHED = (
    "model",
    "data",
    "eval_data",
)
"""Settings that are stored as hashes: messages only name them."""


class Run:
    """What `output_dir` holds of a run with these `settings`.

    Raises:
        UserError: another run is there, or a model that is not of a run.
    """

    def __init__(self, output_dir: str, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(output_dir), settings
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; give another --output_dir")
        self.checkpoint = get_last_checkpoint(output_dir) if self.folder.is_dir() else None
        self.finished = False
        if (self.folder / RUN_FILE).is_file():
            try:
                found = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))
                settings, self.finished = dict(found["settings"]), bool(found["finished"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.folder / RUN_FILE} is not what a run writes ({error!r}); give another "
                    "--output_dir"
                ) from error
            if self.checkpoint or self.finished:  # else there is nothing to go on from
                self._refuse_others(settings)
        else:
            self._refuse_files_of_others()

    @property
    def steps(self) -> int:
        """Steps that its last checkpoint has taken; 0 without one."""
        return int(self.checkpoint.rpartition("-")[2]) if self.checkpoint else 0

    def _refuse_files_of_others(self) -> None:
        there = [file for pattern in WRITTEN for file in self.folder.glob(pattern)]
        if there:
            raise UserError(
                f"{self.folder} holds {first_few([file.name for file in there])}, which a run "
                f"writes too, but no {RUN_FILE} that says of which run; give another --output_dir"
            )

    def _refuse_others(self, found: dict[str, Any]) -> None:
        keys = list(dict.fromkeys([*found, *self.settings]))
        differ = [key for key in keys if found.get(key) != self.settings.get(key)]
        if "model" in differ and is_outdated(found.get("model")):
            raise UserError(
                f"{self.folder} holds a run of an older version of this code, which noted its base "
                "model in another way; finish it with that version, or give another --output_dir"
            )
        if differ:
            shown = "; ".join(self._difference(key, found.get(key)) for key in differ)
            raise UserError(
                f"{self.folder} holds a run with other settings ({shown}); repeat its command, or "
                "give another --output_dir"
            )

    def _difference(self, key: str, found: Any) -> str:
        if key in HASHED:
            return f"another {key.replace('_', ' ')}"
        return f"{key}: {found} there, {self.settings.get(key)} now"

    def start(self) -> None:
        """Claims the folder for this process, and clears away what an interrupted save left.

        Raises:
            UserError: it cannot be made, or another process is running in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be made ({error.strerror}); give another --output_dir"
            ) from error
        try:
            self._lock = (self.folder / ".lock").open("a")
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
        with report_failed_write(self.folder, main=True):
            self._write(finished=False)

    def save_result(self, trainer: FineTuner, base: Path, merge: bool) -> None:
        """The whole model, or the adapter, or both (then the adapter in a folder of its own), at
        the root of the run. Called by all processes.

        Raises:
            RunError: it cannot be written. The last checkpoint is still there.
            UserError: the adapter cannot be merged. It is there.
        """
        with report_failed_write(self.folder, trainer.is_world_process_zero()):
            trainer.save_sparingly(partial(self._save_result, trainer, base, merge))
        trainer.accelerator.wait_for_everyone()

    def _save_result(self, trainer: FineTuner, base: Path, merge: bool) -> None:
        aside = self.folder / INCOMPLETE
        result, adapter = aside / "result", aside / "adapter"
        if not isinstance(trainer.model, PeftModel):
            state = trainer.whole_parameters()
            if trainer.is_world_process_zero():
                tensors = tensors_on_host(trainer.model, state)
                write_checkpoint(tensors, base, result, None, trainer.shard_bytes)
                self._publish(result)
            return
        trainer.save_model(str(adapter))
        if not trainer.is_world_process_zero():
            return
        (adapter / "README.md").unlink(missing_ok=True)  # PEFT's form, not filled in
        for file in adapter.glob("*.safetensors"):
            file.chmod(0o644)
        if not merge:
            self._publish(adapter)
            return
        kept = self.folder / "adapter"  # before the merge, in case that it is refused
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(adapter, kept)
        write_checkpoint(merged_tensors(base, kept), base, result, None, trainer.shard_bytes)
        self._publish(result)

    def _publish(self, result: Path) -> None:
        """Moves each file to the root, those that make it a model last."""
        for file in sorted(result.iterdir(), key=lambda file: "config" in file.name):
            os.replace(file, self.folder / file.name)
        self._write(finished=True)
        shutil.rmtree(self.folder / INCOMPLETE)

    def _write(self, finished: bool) -> None:
        content = {
            "finished": finished,
            "settings": self.settings,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        aside = (
            self.folder / f".{RUN_FILE}.tmp"
        )  # one name is enough: the folder is ours by its lock
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.folder / RUN_FILE)


def settings_of(
    model: ModelArguments,
    data: DataArguments,
    training: FineTuningArguments,
    folder: Path,
    train: datasets.Dataset,
    evaluation: datasets.Dataset | None,
) -> dict[str, Any]:
    """All that decides the result of a run; `folder` holds the base model."""
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    found = {
        "model": fingerprint(folder),
        "data": examples.fingerprint(train),
        "eval_data": examples.fingerprint(evaluation) if evaluation else None,
        "trainable": split_commas(model.trainable),
        "use_lora": model.use_lora,
    }
    if model.use_lora:
        keys = ("lora_rank", "lora_alpha", "lora_dropout", "modules_to_save", "bits")
        keys += ("quant_type", "double_quant") if model.bits == 4 else ()
        found |= {key: getattr(model, key) for key in keys}
    keys = ("model_max_length", "packing", "eval_fraction")
    found |= {key: getattr(data, key) for key in keys}
    keys = ("learning_rate", "num_train_epochs", "max_steps", "warmup_steps", "weight_decay")
    keys += ("max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "seed")
    keys += ("data_seed", "train_sampling_strategy", "neftune_noise_alpha", "optim_args")
    keys += ("dataloader_drop_last", "average_tokens_across_devices")
    found |= {key: getattr(training, key) for key in keys}
    return found | {
        "lr_scheduler_kwargs": str(training.lr_scheduler_kwargs or ""),
        "lr_scheduler_type": str(getattr(training.lr_scheduler_type, "value", "")),
        "optim": str(getattr(training.optim, "value", training.optim)),
        "batch_size": batch * training.world_size,
        "zero_stage": zero_stage(training),
    }
