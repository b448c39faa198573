"""What all tests of fine-tuning start from: a folder with a base and rows, and a command."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_fixtures import USED_PORTS, options, write_base, write_rows

from deepseek_moe.experts.choose import choice_as_text


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
        return options(**(plain | changes))

    return argv


@pytest.fixture
def free_buffers() -> Iterator[None]:
    """Removes the 69 MB of shared memory that DeepSpeed leaves for each process on a CPU."""
    yield
    while USED_PORTS:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{USED_PORTS.pop()}_*"):
            buffer.unlink(missing_ok=True)
