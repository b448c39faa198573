"""Every file of what people load, damaged: the right result comes, or one line that names the file.

A damage that leaves a file well formed, with another value in it, cannot be seen without checksums.
Then the result must be what the files say, read in another way.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from adapter_fixtures import logits
from fault_fixtures import (
    CHANGES,
    COUNTS,
    SEED,
    TEXT,
    TIMES,
    Result,
    adapter_says,
    checkpoint_says,
    damage,
    equal,
    keeps_the_rule,
    make_place,
    run_finetune,
    run_program,
    use_adapter,
)
from safetensors.torch import load_file
from text_fixtures import assistant, user

from deepseek_moe import chat, export
from deepseek_moe.decode.load import load
from deepseek_moe.decode.texts import end_ids

pytestmark = pytest.mark.slow


RUN = "run/run.json"
STATES = "trainer_state.json rng_state.pth scheduler.pt optimizer.pt"
ADAPTER = "adapter_config.json adapter_model.safetensors"
FILES = {
    "checkpoint": "config.json generation_config.json tokenizer.json tokenizer_config.json "
    "chat_template.jinja model.safetensors",
    "sharded": "model.safetensors.index.json model-00002-of-00002.safetensors",
    "adapter": f"{RUN} run/adapter_config.json run/adapter_model.safetensors",
    "quantised adapter": "run/base_quantization.json",
    "delta": "run/delta.json run/delta.safetensors",
    "training": f"{STATES} config.json model.safetensors",
    "LoRA training": f"{STATES} {ADAPTER} base_quantization.json",
}
"""What is attacked, and the files of it that are read."""
CHECKPOINT = "run/checkpoint-2"
SAID = {
    ".jinja": ["the checkpoint's chat template"],
    ".json": ["holds a run ", "only plain LoRA can be merged"],
    ".safetensors": ["does not hold this model", "does not fit this base", "is not of this base"],
}
"""What a message may say instead of the file's name, if it names the folder or a tensor."""


@dataclass
class Target:
    """A folder that is attacked, and what uses it.

    Attributes:
        use: a command, given a damaged copy of the folder and a place to write to.
        says: the result by another reading of the copy; None where there is no other.
    """

    folder: Path
    use: Callable[[Path, Path], Result]
    says: Callable[[Path], Result] | None = None


# --- A checkpoint


def use_checkpoint(folder: Path, output: Path) -> Result:
    """Loads it, speaks by its template, and exports it."""
    model, tokenizer = load(str(folder), device="cpu")
    chat.render(tokenizer, [user("w2"), assistant("w3")])
    run_program(export, "--model", folder, "--output", output)
    result = {
        "logits": logits(model),
        "ids": tokenizer.encode(TEXT, add_special_tokens=False),
        "ends": end_ids(tokenizer, model),
    }
    written, its_tokenizer = load(str(output), device="cpu")
    assert torch.equal(logits(written), result["logits"])
    assert its_tokenizer.encode(TEXT, add_special_tokens=False) == result["ids"]
    return result


# --- What trains


def use_delta(folder: Path, output: Path) -> Result:
    run_program(export, "--model", folder / "base", "--delta", folder / "run", "--output", output)
    return load_file(output / "model.safetensors")


def go_on(place: Path, settings: dict[str, Any], folder: Path, output: Path) -> Result:
    """Goes on with an interrupted run."""
    run_finetune(place, folder, **settings)
    [file] = (folder / "run").glob("*model.safetensors")
    return load_file(file)


# --- What is attacked, made once


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def make_target(kind: str, place: Path, folder: Path) -> Target:
    base, lora = place / "base", {"use_lora": True, "lora_dropout": 0.0, "learning_rate": 0.1}
    if kind in ("checkpoint", "sharded"):
        size = "5GB" if kind == "checkpoint" else "70KB"
        run_program(export, "--model", base, "--output", folder, "--max_shard_size", size)
        return Target(folder, use_checkpoint, checkpoint_says)
    settings = {
        "adapter": lora,
        "quantised adapter": lora | {"bits": 4},
        "delta": {"train_experts": place / "expert_cfg.json", "save_delta": True},
        "training": {},
        "LoRA training": lora | {"bits": 4},
    }[kind]
    shutil.copytree(base, folder / "base")
    run_finetune(place, folder, **settings)
    if kind == "delta":
        return Target(folder, use_delta)
    if kind == "adapter":
        return Target(folder, use_adapter, adapter_says)
    if kind == "quantised adapter":
        return Target(folder, use_adapter)
    for file in (folder / "run").iterdir():  # as if it had died after the second step
        if file.is_dir() and file.name != "checkpoint-2":
            shutil.rmtree(file)
        elif file.is_file() and file.name != "run.json":
            file.unlink()
    note = folder / RUN
    note.write_text(json.dumps(json.loads(note.read_text()) | {"finished": False}))
    return Target(folder, partial(go_on, place, settings))


@pytest.fixture(scope="session")
def targets(place: Path) -> Callable[[str], tuple[Target, Result]]:
    """Makes a target when it is asked for first, and what its command gives undamaged."""

    @cache
    def make(kind: str) -> tuple[Target, Result]:
        target = make_target(kind, place, place / kind)
        copy = shutil.copytree(target.folder, place / f"copy of {kind}")
        result = target.use(copy, place / f"output of {kind}")
        assert not target.says or equal(target.says(copy), result)
        return target, result

    return make


def files_in(folder: Path) -> set[Path]:
    return {file for file in folder.rglob("*") if file.name != ".lock"}


def _applies(kind: str, name: str) -> bool:
    """Whether a file can have a damage: of JSON, of numbers, or of any bytes."""
    weights, text = name.endswith(".safetensors"), name.endswith(".json")
    if kind == "number":  # in settings; states and notes are guarded by checksums, or are hashes
        return text and (not name.startswith("run/") or "adapter_config" in name)
    return weights if kind == "number flipped" else kind in COUNTS or weights or text


def cases() -> Iterator[Any]:
    for target, files in FILES.items():
        names = files.split()
        if "training" in target:
            names = [RUN, *(f"{CHECKPOINT}/{name}" for name in names)]
        for name in names:
            for kind, number in (COUNTS | CHANGES).items():
                if not _applies(kind, name):
                    continue
                for seed in range(number * TIMES):
                    case = f"{target}-{Path(name).name}-{kind}-{seed}".replace(" ", "_")
                    yield pytest.param(target, name, kind, seed, id=case)


@pytest.mark.parametrize(("target", "name", "kind", "seed"), [*cases()])
def test_a_damaged_file_is_named_or_does_no_harm(
    target: str,
    name: str,
    kind: str,
    seed: int,
    targets: Callable[[str], tuple[Target, Result]],
    tmp_path: Path,
) -> None:
    attacked, expected = targets(target)
    copy, output = tmp_path / "copy", tmp_path / "output"
    shutil.copytree(attacked.folder, copy)
    others = [file for file in sorted(copy.rglob("*.*")) if file != copy / name]
    damage(copy / name, kind, Random(f"{target} {name} {kind} {seed} {SEED}"), others)
    before = files_in(tmp_path)
    names = [Path(name).name, "checkpoint-2", *SAID.get(Path(name).suffix, ())]
    result = keeps_the_rule(partial(attacked.use, copy, output), *names)
    if kind == "number flipped":
        assert result is None
    if result is None:
        assert files_in(tmp_path) == before  # nothing half done
    elif not equal(result, expected):
        assert attacked.says, "other numbers in silence"
        assert equal(result, attacked.says(copy))
