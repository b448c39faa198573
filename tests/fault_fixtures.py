"""What the attacks share: damages of files, odd values, and the rule that every command must keep.

The rule: a command ends with the right result, or with a UserError of one line that names what is
wrong and where. It takes seconds, and some MB. Nothing else may happen, whatever the file holds.
"""

import json
import logging
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from adapter_fixtures import add_tokenizer, logits
from finetune_fixtures import options, write_base, write_rows
from safetensors.torch import load_file
from tokenizers import Tokenizer

import finetune
from deepseek_moe import DeepseekConfig, DeepseekForCausalLM, export
from deepseek_moe.errors import UserError
from deepseek_moe.experts.choose import choice_as_text
from deepseek_moe.model.layout import weight_files
from deepseek_moe.model.tokenization_deepseek import EOS

TIMES = int(os.environ.get("FAULT_TIMES", "1"))
"""How many times as many random cases as .ci/run has; above 1 they are other ones each time."""
SECONDS = 30
SEED = os.getpid() if TIMES > 1 else 0
MEGABYTES = 100
ROOM = 2**31  # bytes of address space, after which a command fails before it harms the machine

DEEP = "deeply nested"  # stands for JSON that no parser can follow to its end
ODD = (None, True, "", "x", "\ud800", -1, 0, 2**63, 10**400, 1e300, math.nan, [], [0], {}, DEEP)
"""Values that may stand for any other in a file."""


def write_json(content: Any) -> bytes:
    """JSON of what may hold NaN, halves of characters, and DEEP."""
    deep = "[" * 100_000 + "]" * 100_000
    return json.dumps(content).replace(json.dumps(DEEP), deep).encode()


# --- The rule


class _OutOfTime(BaseException):
    """No command turns it into an error of its own."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fails a command that takes more than SECONDS or MEGABYTES."""

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc_pid_clear_refs(5))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + ROOM, limits[1]))
    logging.disable()  # half a character in a report ends a worker of pytest-xdist
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    except _OutOfTime:
        pytest.fail(f"it took more than {SECONDS} s")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        logging.disable(logging.NOTSET)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    taken = (_memory("VmHWM") - before) / 2**20
    assert taken < MEGABYTES, f"it took {taken:.0f} MB"


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def keeps_the_rule(command: Callable[[], Any], *names: str) -> Any:
    """What the command returns; None if it was refused in one line that has one of `names` in it.

    Any other exception fails the test.
    """
    try:
        with bounded():
            return command()
    except UserError as error:
        said = str(error)
    except Exception as error:
        pytest.fail(ascii(traceback.format_exception(error)).replace("\\n", "\n"), pytrace=False)
    found, _, remedy = said.rpartition("; ")
    shown = ascii(said)
    assert found and remedy and "\n" not in said and len(said) < 2000, shown
    assert any(name in said for name in names), shown
    return None


# --- Damages: the bytes of a file, a source of chance and another file of the folder -> its bytes

Damage = Callable[[bytes, Random, Path], bytes | None]


def _flip(content: bytes, chance: Random, _: Path, end: int = 0) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(end or len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flip_outside_of_numbers(content: bytes, chance: Random, other: Path) -> bytes:
    """A bit of a safetensors header, or of any other file."""
    return _flip(content, chance, other, _header_end(content))


def _flip_a_number(content: bytes, chance: Random, _: Path) -> bytes:
    """A bit of a number in a safetensors file."""
    end = _header_end(content)
    return content[:end] + _flip(content[end:], chance, _)


def _scribble(content: bytes, chance: Random, _: Path) -> bytes:
    """32 random bytes in the header of a safetensors file, or anywhere in another."""
    at = chance.randrange(_header_end(content) or len(content))
    return content[:at] + chance.randbytes(32) + content[at + 32 :]


def _header_end(content: bytes) -> int:
    """Where the numbers of a safetensors file begin; 0 for another file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return end if content[8:10] == b'{"' and end < len(content) else 0


def _half_zeros(content: bytes, chance: Random, _: Path) -> bytes:
    """As after a power cut. Of a safetensors file it is half of the header."""
    half = (_header_end(content) or len(content)) // 2
    return content[:half] + bytes(half) + content[2 * half :]


DAMAGES: dict[str, Damage] = {
    "missing": lambda content, chance, other: None,
    "empty": lambda content, chance, other: b"",
    "garbage": lambda content, chance, other: chance.randbytes(len(content)),
    "swapped": lambda content, chance, other: other.read_bytes(),
    "longer": lambda content, chance, other: content + chance.randbytes(9),
    "half zeros": _half_zeros,
    "truncated": lambda content, chance, other: content[: chance.randrange(1, len(content))],
    "scribbled": _scribble,
    "flipped": _flip_outside_of_numbers,
    "number flipped": _flip_a_number,
}
COUNTS = dict.fromkeys(DAMAGES, 1) | {"swapped": 2, "truncated": 2, "scribbled": 2}
COUNTS |= {"flipped": 4, "number flipped": 3}
CHANGES = {"lost": 3, "other kind": 6, "number": 4}
"""Damages of the JSON in a file, or in the header of a safetensors file, and how many of each."""


def damage(file: Path, kind: str, chance: Random, others: list[Path]) -> None:
    """Changes a file, or removes it. `others` may be swapped with it."""
    content, other = file.read_bytes(), chance.choice(others)
    if kind in DAMAGES:
        changed = DAMAGES[kind](content, chance, other)
    elif file.suffix == ".json":
        changed = write_json(_change(json.loads(content), kind, chance))
    else:
        end = _header_end(content)
        header = write_json(_change(json.loads(content[8:end]), kind, chance))
        changed = len(header).to_bytes(8, "little") + header + content[end:]
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)


def _change(content: Any, kind: str, chance: Random) -> Any:
    """Changes one place of `content`, a tree of dicts and lists.

    It loses a key, or gets a value of another kind, or a number gets an odd one.
    """
    parent, key = content, chance.choice(_keys(content))
    while _keys(parent[key]) and (chance.random() < 0.7 or kind == "number"):
        parent, key = parent[key], chance.choice(_keys(parent[key]))
    if kind == "lost":
        del parent[key]
    elif kind == "number":
        parent[key] = chance.choice([value for value in ODD if _kind(value) is float])
    else:
        parent[key] = chance.choice([v for v in ODD if _kind(v) is not _kind(parent[key])])
    return content


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _kind(value: Any) -> type:
    return float if type(value) in (int, float, bool) else type(value)


# --- Commands in this process, on a small model


def make_place(place: Path) -> Path:
    """Gives a folder a base, rows, and chosen experts."""
    write_base(place / "base", vocab_size=96, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    (place / "base" / "chat_template.jinja").unlink()
    add_tokenizer(place / "base")
    write_rows(place / "rows.jsonl", 6)
    (place / "expert_cfg.json").write_text(choice_as_text({1: [0, 2]}))
    return place


def run_program(program: ModuleType, *words: object) -> None:
    before, sys.argv = sys.argv, [program.__name__, *map(str, words)]
    try:
        with redirect_stdout(sys.stderr):
            program.main()
    finally:
        sys.argv = before


def run_finetune(place: Path, folder: Path, **changes: Any) -> None:
    """Three steps over folder/base on the rows of `place`, to folder/run."""
    plain = {
        "model_name_or_path": folder / "base",
        "data_path": place / "rows.jsonl",
        "cache_dir": place / "cache",
        "output_dir": folder / "run",
        "max_steps": 3,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    finetune.main(options(**(plain | changes)))


TEXT = "w44"
Result = dict[str, Any]


def checkpoint_says(folder: Path) -> Result:
    """Logits, ids of TEXT, and the ids that end a text, read in another way than by `load`."""
    fields = json.loads((folder / "config.json").read_bytes())
    how = {name: None for name in fields if name.endswith("_implementation")}
    how["tie_word_embeddings"] = False  # transformers ties no head that differs
    model = DeepseekForCausalLM(DeepseekConfig(**(fields | how))).eval()
    for file in weight_files(folder):
        model.load_state_dict(load_file(file), strict=False)
    generation = folder / "generation_config.json"
    ends = json.loads(generation.read_bytes()) if generation.is_file() else fields
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [fields.get("eos_token_id"), ends.get("eos_token_id"), tokenizer.token_to_id(EOS)]
    return {
        "logits": logits(model),
        "ids": tokenizer.encode(TEXT, add_special_tokens=False).ids,
        "ends": {i for some in ends for i in (some if isinstance(some, list) else [some])} - {None},
    }


def use_adapter(folder: Path, output: Path) -> Result:
    """The merged tensors by export."""
    run_program(export, "--model", folder / "base", "--adapter", folder / "run", "--output", output)
    return load_file(output / "model.safetensors")


def adapter_says(folder: Path) -> Result:
    """The merged tensors by PEFT."""
    base = DeepseekForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, folder / "run").merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder / "says")
    return load_file(folder / "says" / "model.safetensors")


def equal(one: Result, other: Result) -> bool:
    """Whether two results are the same, bit for bit; NaN equals nothing."""
    assert one.keys() == other.keys()
    return all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )
