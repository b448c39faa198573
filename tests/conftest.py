"""What several test files share: small models in a blink, and the folders some tests need."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test has business on the network
# Threads that wait leave their core to others: scripts are run with as many as there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():  # kernels on the CPU; read when triton is imported, below
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers.utils import logging

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM

ROOT = Path(__file__).resolve().parents[1]
# What DeepSpeed compiles for CPUs, once for each environment. Only `compile_extensions` writes it.
EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))
EXTENSIONS /= "deepseek_moe_tests"
COMPILE = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()"
COMPILE_OFFLOAD = "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder as B; B().load()"
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", help="with -m gpu: compare the engine on this model too")


@pytest.fixture(autouse=True)
def no_deepspeed_of_another_test() -> Iterator[None]:
    """transformers keeps a config that was read, while anything refers to it, and divides every
    model by it that is loaded then."""
    yield
    if module := sys.modules.get("transformers.integrations.deepspeed"):
        module.unset_hf_deepspeed_config()


def compile_extensions(folder: Path, code: str = COMPILE, timeout: float | None = None) -> None:
    """Runs Python `code` that compiles extensions of torch in `folder`; waits for another process
    that does so.

    torch marks a compilation by a file `lock`. If it is killed, the file stays, and all that follow
    wait for ever until somebody deletes it. The system's own lock, which ends with its process,
    tells that nobody compiles, so that each such file is of a dead process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_locks(folder)
        environment = {"TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | environment,
            pass_fds=[lock.fileno()],  # if this process is killed, it compiles on
            check=True,
            timeout=timeout,
        )


def remove_locks(folder: Path) -> None:
    """Of torch's extensions in `folder`, which no process may be loading."""
    for left in folder.glob("*/lock"):
        left.unlink()


@pytest.fixture(scope="session")
def session_extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed's extension for several processes on CPUs: compiled before any test is timed."""
    if torch.cuda.is_available():  # of others, which DeepSpeed compiles at their first use
        return EXTENSIONS
    compile_extensions(EXTENSIONS)
    copy = tmp_path_factory.mktemp("torch") / "extensions"
    return shutil.copytree(EXTENSIONS, copy, ignore=shutil.ignore_patterns("lock"))


@pytest.fixture
def offload_extension(session_extensions: Path) -> None:
    """What an offloaded optimizer needs too. Only a slow test does."""
    if not torch.cuda.is_available():
        compile_extensions(EXTENSIONS, COMPILE_OFFLOAD)
        ignore = shutil.ignore_patterns("lock")
        shutil.copytree(EXTENSIONS, session_extensions, ignore=ignore, dirs_exist_ok=True)


@pytest.fixture
def deepspeed_extensions(session_extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each test that starts DeepSpeed: its processes load what was compiled before.

    Loading takes torch's lock too. Here it is one of this session's own copy, in which tests run
    one after another, so that it never outlives the test that was killed while it held it.
    """
    if session_extensions != EXTENSIONS:
        remove_locks(session_extensions)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(session_extensions))


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
