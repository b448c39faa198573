"""What the tests of fine-tuning share: a small base model, rows, and runs of the script.

`run` forks the script from a server process that has imported its libraries already, which takes a
second instead of seven.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import TINY
from safetensors.torch import load_file
from text_fixtures import BUNDLED, ROOT

from deepseek_moe import DeepseekConfig, DeepseekForCausalLM

SCRIPT = ROOT / "finetune" / "finetune.py"
ZERO = {
    name: ROOT / "configs" / f"ds_config_{name}.json"
    for name in ("zero2_no_offload", "zero3", "zero3_offload")
}
IDS = {"vocab_size": 4096, "bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 4095}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WORDS = ["the", "old", "king", "had", "three", "sons", "and", "a", "bird", "of", "gold", "which"]

USED_PORTS: list[int] = []
Before = Callable[[], None] | None
"""Called in the process of the script before it starts, so it must be possible to pickle."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["deepseek_moe.training.build", "deepseek_moe.training.run"])


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error, without its prefix."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("error: ")

    @property
    def refusal(self) -> str:
        """The line of an error that is the user's, which comes before anything is done."""
        assert (self.code, self.out) == (2, ""), self.err
        return self.error


def write_base(folder: Path, **changes: Any) -> Path:
    """Writes a checkpoint with random bf16 weights and the bundled tokenizer."""
    torch.manual_seed(0)
    config = DeepseekConfig(**(TINY | IDS | {"max_position_embeddings": 256} | changes))
    DeepseekForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(BUNDLED / name, folder / name)
    return folder


def forbid_loading() -> None:
    """Lets a run that loads weights fail."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    DeepseekForCausalLM.from_pretrained = load


def write_rows(file: Path, count: int = 24) -> Path:
    """Writes JSON lines with answers of 1 to 37 words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for i in range(count):
            words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(1 + (i * 11) % 37)]
            row = {"instruction": f"{WORDS[i % 12]} {i}", "output": " ".join(words)}
            stream.write(json.dumps(row) + "\n")
    return file


def options(**values: Any) -> list[str]:
    """Lists `--name value` for each of `values`."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# --- Ways to run the script


def start(
    argv: Sequence[str], log: Path, before: Before = None, script: Path = SCRIPT
) -> BaseProcess:
    """Starts the script in a process of its own, which writes to `log`.out and `log`.err."""
    process = FORKS.Process(target=_run_script, args=(script, list(argv), log, before), daemon=True)
    process.start()
    return process


def _run_script(script: Path, argv: list[str], log: Path, before: Before) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.setsid()  # so that it can be ended together with all that it starts
    torch.set_num_threads(os.cpu_count() or 1)  # A single thread would always add in one order.
    if before:
        before()
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")


def end(process: BaseProcess, log: Path, timeout: float = 240) -> Ended:
    process.join(timeout)
    if process.exitcode is None:
        kill_group(process)
        raise AssertionError(f"still running after {timeout} s: {read(log, 'err')}")
    return Ended(process.exitcode, read(log, "out"), read(log, "err"))


def kill_group(process: BaseProcess) -> None:
    """Kills a process with all that it started, unless it has ended."""
    if process.exitcode is None:
        with suppress(ProcessLookupError):  # It has no group of its own yet, or has just ended.
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def run(argv: Sequence[str], log: Path, before: Before = None, script: Path = SCRIPT) -> Ended:
    return end(start(argv, log, before, script), log)


def succeed(argv: Sequence[str], log: Path, before: Before = None) -> Ended:
    done = run(argv, log, before)
    assert done.code == 0, done.err
    return done


def run_ranks(argv: Sequence[str], log: Path, count: int, before: Before = None) -> list[Ended]:
    """Runs the script in `count` processes that find each other as a launcher's do.

    When one is killed, the others are too, as by a launcher.
    """
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = free_port()
    shared["TORCH_EXTENSIONS_DIR"] = os.environ["TORCH_EXTENSIONS_DIR"]
    logs = [Path(f"{log}{rank}") for rank in range(count)]
    ranks = [partial(_be_rank, rank, shared, before) for rank in range(count)]
    started = [start(argv, log, rank) for log, rank in zip(logs, ranks, strict=True)]
    try:
        wait([process.sentinel for process in started], timeout=240)
        if any((process.exitcode or 0) < 0 for process in started):
            for process in started:
                kill_group(process)
        return [end(process, log) for process, log in zip(started, logs, strict=True)]
    finally:
        for process in started:
            kill_group(process)


def succeed_ranks(argv: Sequence[str], log: Path, count: int = 2, before: Before = None) -> Ended:
    ended = run_ranks(argv, log, count, before)
    for done in ended:
        assert done.code == 0, done.err
    return ended[0]


def _be_rank(rank: int, shared: dict[str, Any], before: Before) -> None:
    values = shared | {"RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in values.items()}
    if before:
        before()


def read(log: Path, kind: str) -> str:
    return Path(f"{log}.{kind}").read_text(encoding="utf-8").replace("\r", "\n")


def free_port() -> int:
    """Finds a port for processes to meet at, and notes it in USED_PORTS."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        USED_PORTS.append(one.getsockname()[1])
    return USED_PORTS[-1]


# --- What a run leaves


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(one.name.split("-")[1]) for one in folder.glob("checkpoint-*"))


def history(folder: Path) -> list[dict[str, float]]:
    """The logged lines, from the last checkpoint."""
    state = folder / f"checkpoint-{checkpoints(folder)[-1]}" / "trainer_state.json"
    return json.loads(state.read_text())["log_history"]


def logged(folder: Path, key: str) -> list[float]:
    return [line[key] for line in history(folder) if key in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("model", "adapter_model", "delta")
    [file] = [file for name in names if (file := folder / f"{name}.safetensors").is_file()]
    return load_file(file)


def assert_same(one: Path, other: Path) -> None:
    """Compares all weights bit for bit."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- Other changes of a run's process


def change_built(change: Callable[[torch.nn.Module], object]) -> None:
    """Calls `change` with the model that the script has built."""
    from deepseek_moe.training import build

    build_model = build.build_model

    def build_and_change(*args: Any) -> torch.nn.Module:
        model = build_model(*args)
        change(model)
        return model

    build.build_model = build_and_change


def route_apart(folder: str) -> None:
    """Routes all tokens of process r to experts 2r and 2r + 1, and notes in `folder` its picks."""
    from deepseek_moe.model.modeling_deepseek import DeepseekGate

    rank, original, picked = int(os.environ["RANK"]), DeepseekGate.forward, set()

    def forward(self: Any, hidden_TD: torch.Tensor, routing: Any = None) -> Any:
        index_TK = 2 * rank + torch.arange(2).expand(len(hidden_TD), 2)
        if routing is not None:
            routing.index_TK = index_TK
        out = original(self, hidden_TD, routing)
        picked.update(out[2].unique().tolist())
        Path(folder, f"picks{rank}.json").write_text(json.dumps(sorted(picked)))
        return out

    DeepseekGate.forward = forward


def liger_in_torch() -> dict[str, Any]:
    """Torch's own ways to compute what Liger's kernels compute on GPUs only, by Liger's names."""
    from torch.nn import functional as F

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, in_place: bool) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def loss(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
        assert (options["reduction"], options["accum_dtype"]) == ("sum", torch.float32)
        assert len(target)
        return F.cross_entropy(x @ weight.T, target, reduction="sum")

    return {
        "liger_rms_norm": norm,
        "liger_swiglu": lambda gate, up: F.silu(gate) * up,
        "liger_fused_linear_cross_entropy": loss,
    }


def use_fused_forwards_on_a_cpu() -> None:
    """Lets fine-tuning take the code of a GPU, with Liger's kernels in plain torch."""
    from liger_kernel.transformers import functional
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from deepseek_moe.training.build import use_fused_forwards

    functional.liger_rope = apply_rotary_pos_emb
    for name, function in liger_in_torch().items():
        setattr(functional, name, function)
    change_built(use_fused_forwards)
