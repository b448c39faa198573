"""What several test files share: small models, and folders that some tests need."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's script ignores Ctrl-C in what it starts with "&", and programs that tests interrupt
    # would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Waiting threads leave their core to others, since scripts start as many as there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():  # run kernels on the CPU; set before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers.utils import logging

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM
from deepseek_moe.errors import exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
# DeepSpeed's compiled extensions, once in each environment; only `compile_extension` writes there.
EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))
EXTENSIONS /= "deepseek_moe_tests"
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
    "initializer_range": 0.3,  # wide, so that the router has clear favourites
    "aux_loss_alpha": 0.1,  # 100 times the official value, so that the gradients show it
}

logging.disable_progress_bar()
torch.set_num_threads(1)  # small models are no faster on more threads, and slower on busy machines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", help="with -m gpu: compare the engine on this model too")


@pytest.fixture(autouse=True)
def no_deepspeed_of_another_test() -> Iterator[None]:
    """Makes transformers forget a DeepSpeed config, by which it would divide every later model."""
    yield
    if module := sys.modules.get("transformers.integrations.deepspeed"):
        module.unset_hf_deepspeed_config()


def compile_extension(builder: str) -> None:
    """Compiles an extension of DeepSpeed in EXTENSIONS, one process at a time.

    torch marks a compilation by a file named lock. If the process is killed, that file stays, and
    every later process waits for ever. Here a lock of the system, which ends with its process,
    shows that nobody compiles, so that such files can be removed.
    """
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    with (EXTENSIONS / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_locks(EXTENSIONS)
        code = f"from deepspeed.ops.op_builder import cpu; cpu.{builder}().load()"
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS), "DS_ACCELERATOR": "cpu"},
            pass_fds=[lock.fileno()],  # it goes on compiling if this process is killed
            check=True,
        )


def remove_locks(folder: Path) -> None:
    """Removes torch's own locks in `folder`, which no process may be loading from."""
    for left in folder.glob("*/lock"):
        left.unlink()


@pytest.fixture(scope="session")
def session_extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed's extension for several processes on CPUs, compiled before any test is timed."""
    if torch.cuda.is_available():  # DeepSpeed compiles its other extensions when they are used
        return EXTENSIONS
    compile_extension("ShareMemCommBuilder")
    copy = tmp_path_factory.mktemp("torch") / "extensions"
    return shutil.copytree(EXTENSIONS, copy, ignore=shutil.ignore_patterns("lock"))


@pytest.fixture
def offload_extension(session_extensions: Path) -> None:
    """The extension of an offloaded optimizer, which only a slow test needs."""
    if not torch.cuda.is_available():
        compile_extension("CPUAdamBuilder")
        ignore = shutil.ignore_patterns("lock")
        shutil.copytree(EXTENSIONS, session_extensions, ignore=ignore, dirs_exist_ok=True)


@pytest.fixture
def deepspeed_extensions(session_extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the processes of a test that starts DeepSpeed load what was compiled before.

    Loading takes torch's lock too, and a killed test leaves it. Each session therefore has its own
    copy, in which tests run one after another, and the lock is removed before each of them.
    """
    if session_extensions != EXTENSIONS:
        remove_locks(session_extensions)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(session_extensions))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., DeepseekConfig]:
    """Makes configs of a model that runs in milliseconds. Keywords change its fields."""

    def make(**changes: Any) -> DeepseekConfig:
        return DeepseekConfig(**(TINY | changes))

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., DeepseekConfig]) -> Callable[..., DeepseekForCausalLM]:
    """Makes small models in evaluation mode. Equal fields give equal weights."""

    def make(**changes: Any) -> DeepseekForCausalLM:
        torch.manual_seed(0)
        return DeepseekForCausalLM(tiny_config(**changes)).eval()

    return make


@pytest.fixture
def base(tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path) -> Path:
    """A small fp32 checkpoint with a tokenizer."""
    from adapter_fixtures import add_tokenizer  # It needs peft.

    tiny_model().save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a module as the command that it is, in this process."""

    def run_module(module: ModuleType, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()

    return run_module


@pytest.fixture
def refusal(run_module: Callable[..., None], capsys: Any) -> Callable[..., str]:
    """Runs such a command, which is refused, and returns the one line that it prints."""

    def refusal(module: ModuleType, *words: object, code: int = 2) -> str:
        with pytest.raises(SystemExit, match=str(code)), exit_on_user_error():
            run_module(module, *words)
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: ") and "; " in message
        return message

    return refusal


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The folder of the small trained model."""
    folder = ROOT / "models" / "tiny-base"
    if not (folder / "config.json").is_file():
        pytest.skip("models/tiny-base is not here: models/train_tiny.py makes it")
    return folder
