"""What several test files share: small models in a blink, and the folders some tests need."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test has business on the network
# DeepSpeed compiles for CPUs at its first use, once for each environment that has its own folder;
# in a shared one they compile for each other, and wait for ever for one that was killed meanwhile.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

import pytest
import torch

if not torch.cuda.is_available():  # kernels on the CPU; read when triton is imported, below
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers.utils import logging

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,  # wide: the router has clear favourites
    "aux_loss_alpha": 0.1,  # a hundred times the official, to show in the gradients
}

logging.disable_progress_bar()
torch.set_num_threads(1)  # small models: threads on a busy machine wait longer than they work


@pytest.fixture(autouse=True)
def no_deepspeed_of_another_test() -> Iterator[None]:
    """transformers keeps a config that was read, while anything refers to it, and divides every
    model by it that is loaded then."""
    yield
    if module := sys.modules.get("transformers.integrations.deepspeed"):
        module.unset_hf_deepspeed_config()


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., DeepseekConfig]:
    """Makes configs of a model that runs in milliseconds; keywords change its fields."""

    def make(**changes: Any) -> DeepseekConfig:
        return DeepseekConfig(**(TINY | changes))

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., DeepseekConfig]) -> Callable[..., DeepseekForCausalLM]:
    """Makes small models, in evaluation mode, that are equal for equal fields."""

    def make(**changes: Any) -> DeepseekForCausalLM:
        torch.manual_seed(0)
        return DeepseekForCausalLM(tiny_config(**changes)).eval()

    return make


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The folder of the small trained model."""
    folder = ROOT / "models" / "tiny-base"
    if not (folder / "config.json").is_file():
        pytest.skip("models/tiny-base is not here: models/train_tiny.py makes it")
    return folder


@pytest.fixture(scope="session")
def official_files() -> Path:
    """The published config, tokenizer and index of weights, which this repository does not hold."""
    folder = ROOT.parent / "shared" / "official"
    if not (folder / "config.json").is_file():
        pytest.skip("the published model's small files are not in ../shared/official")
    return folder
