"""What all tests of fine-tuning start from: a folder with a base and rows, and a command."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from finetune_fixtures import USED_PORTS, options, write_base, write_rows
from option_fixtures import parse_arguments
from text_fixtures import BUNDLED, tokenizer_of

from deepseek_moe.experts.choose import choice_as_text
from deepseek_moe.training.build import build_model
from deepseek_moe.training.examples import Collator, load_examples
from deepseek_moe.training.trainer import FineTuner

datasets.disable_progress_bars()
MakeTuner = Callable[..., FineTuner]
TOKENIZER = tokenizer_of(BUNDLED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, 24 rows to train on, 7 to evaluate on, and chosen experts."""
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "held.jsonl", 7)
    chosen = {1: [0, 2, 3, 5], 2: [0, 1, 2, 4, 5, 7]}
    (folder / "expert_cfg.json").write_text(choice_as_text(chosen))
    return folder


@pytest.fixture(scope="module")
def argv(place: Path) -> Callable[..., list[str]]:
    """Makes a command of 12 steps, 6 an epoch, with a checkpoint every 3. Keywords change it."""

    def argv(output: Path, **changes: Any) -> list[str]:
        plain = {
            "model_name_or_path": place / "base",
            "data_path": place / "rows.jsonl",
            "cache_dir": place / "cache",
            "output_dir": output,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "report_to": "none",
        }
        if "train_experts" in changes:
            changes["train_experts"] = place / changes["train_experts"]
        return options(**(plain | changes))

    return argv


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    """24 examples of very different lengths."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"instruction": f"Say {i}.", "output": " ".join(["bird", "wood"] * (1 + 3 * (i * i % 23)))}
        for i in range(24)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    files, cache = [str(folder / "rows.json")], str(folder / "cache")
    return load_examples(files, TOKENIZER, 256, cache_dir=cache)[0]


@pytest.fixture
def tuner(place: Path, examples: datasets.Dataset, tmp_path: Path) -> MakeTuner:
    """Makes a trainer with plain gradient descent, since Adam would magnify rounding.

    With a `rank` it trains adapters that compute something from the start.
    """

    def tuner(
        train: datasets.Dataset = examples, held: Any = None, rank: int = 0, **changes: Any
    ) -> FineTuner:
        plain = {
            "output_dir": tmp_path / "out",
            "data_path": "-",
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0,
            "num_train_epochs": 1,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        if rank:
            plain |= {"use_lora": True, "lora_rank": rank, "lora_alpha": rank, "lora_dropout": 0}
            plain["trainable"] = "q_proj,down_proj"
        given, data, args = parse_arguments(options(**(plain | changes)))
        model = build_model(place / "base", given, args)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        return FineTuner(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held,
            data_collator=Collator(TOKENIZER.pad_token_id, data.packing),
            processing_class=TOKENIZER,
        )

    return tuner


@pytest.fixture
def free_buffers() -> Iterator[None]:
    """Removes the 69 MB of shared memory that DeepSpeed leaves for each process on a CPU."""
    yield
    while USED_PORTS:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{USED_PORTS.pop()}_*"):
            buffer.unlink(missing_ok=True)
