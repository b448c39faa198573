"""Forty kills: a repeated command ends bit for bit as one that nobody killed, on one thread.

A seed decides the moments: after some time of computing, before a change of a file or folder (while
a file is being written, between the files of a save, around a rename, while old files are removed),
or with half of a file written.
"""

import json
import os
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accident_fixtures import die_after, die_at_touch, die_before_renaming_to, die_in_file
from finetune_fixtures import SCRIPT, Ended, assert_same, checkpoints, options, run, run_ranks

from deepseek_moe.training.resume import Layout, find_damage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("deepspeed_extensions", "free_buffers"),
]
LORA = {"use_lora": True, "lora_rank": 3, "lora_dropout": 0.2}
TWO = {"per_device_train_batch_size": 2}
CONFIGS = SCRIPT.parent / "configs"


RENAMES = [
    partial(die_before_renaming_to, f"out/{name}")
    for name in ("checkpoint-4", "tokenizer_config.json")
]
WEIGHTS = partial(die_in_file, 2, weights=True)  # the first ones after those of the rehearsal


class Mode(NamedTuple):
    kills: int
    changes: dict[str, Any]
    layout: Layout
    critical: list[partial] = RENAMES  # the last kills; the others are drawn


MODES = {
    "full": Mode(8, {}, Layout(1, None, adapter=False), [WEIGHTS, *RENAMES]),
    "lora": Mode(6, LORA, Layout(1, None, adapter=True)),
    "merge": Mode(
        8,
        LORA | {"merge_on_save": True},
        Layout(1, None, adapter=True),
        # The weights are the merged ones: PEFT writes those of adapters.
        [RENAMES[0], WEIGHTS, partial(die_before_renaming_to, "out/adapter"), RENAMES[1]],
    ),
    "zero2": Mode(
        7,
        TWO | {"deepspeed": CONFIGS / "ds_config_zero2_no_offload.json"},
        Layout(2, 2, adapter=False),
    ),
    "zero3": Mode(
        7, TWO | {"deepspeed": CONFIGS / "ds_config_zero3.json"}, Layout(2, 3, adapter=False)
    ),
}
EXPORTS = 4  # kills of exports: 40 in all
Accident = partial | None


def on_one_thread(accident: Accident, rank: int) -> None:
    torch.set_num_threads(1)
    if accident and int(os.environ.get("RANK", 0)) == rank:
        accident()


def draw(chance: random.Random, folder: Path, seconds: float, touches: int) -> partial:
    """An accident that befalls a run which computes for about `seconds` and `touches` `folder`."""
    return chance.choice(
        [
            partial(die_after, chance.uniform(0.1, seconds)),
            partial(die_at_touch, chance.randint(1, touches), folder),
            partial(die_at_touch, chance.randint(1, touches), folder),
            partial(die_in_file, chance.randint(1, 9)),
            partial(die_in_file, chance.randint(1, 4), weights=True),
        ]
    )


def go(words: Sequence[str], log: Path, mode: Mode, accident: Accident, rank: int) -> list[Ended]:
    before = partial(on_one_thread, accident, rank)
    count = mode.layout.processes
    return [run(words, log, before)] if count == 1 else run_ranks(words, log, count, before)


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def assert_nothing_is_half(output: Path, whole: Path, layout: Layout) -> None:
    """What has its name has all its files, with the bits of the run that nobody killed."""
    for name in [f"checkpoint-{step}" for step in checkpoints(output)]:
        assert files_of(output / name) == files_of(whole / name)
        assert find_damage(output / name, layout) is None
        assert_same(output / name, whole / name)
    if (output / "adapter").exists():
        assert files_of(output / "adapter") == files_of(whole / "adapter")
        assert_same(output / "adapter", whole / "adapter")
    known = (output / "config.json", output / "adapter_config.json")
    if any(file.exists() for file in known):
        names = {file.name for file in whole.iterdir() if file.is_file()}
        assert names <= {file.name for file in output.iterdir()}
        assert_same(output, whole)
    if (output / "run.json").exists():
        finished = json.loads((output / "run.json").read_text())["finished"]
        assert not finished or any(file.exists() for file in known)


@pytest.mark.parametrize("name", MODES)
def test_runs(name, argv, tmp_path):
    mode, chance = MODES[name], random.Random(name)
    whole, output, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"

    def command(folder: Path, **changes: Any) -> list[str]:
        return argv(folder, **mode.changes, **changes, max_steps=6, save_steps=2)

    for done in go(command(whole), log, mode, None, 0):
        assert done.code == 0, done.err
    gone = {name for name in files_of(whole) if name.startswith("checkpoint-2")}
    killed, accident = 0, None
    while accident or not killed:
        accident = None
        if killed < mode.kills:
            at = killed - (mode.kills - len(mode.critical))
            accident = mode.critical[at] if at >= 0 else draw(chance, output, 3, 60)
        both = accident and accident.func in (die_after, die_in_file)
        rank = chance.randrange(mode.layout.processes) if both else 0
        ended = go(command(output, save_total_limit=2), log, mode, accident, rank)
        assert_nothing_is_half(output, whole, mode.layout)
        if any(done.code < 0 for done in ended):
            killed += 1
            continue
        assert [done.code for done in ended] == [0] * len(ended), ended
        assert files_of(output) == sorted(set(files_of(whole)) - gone)
        assert_same(output, whole)
        shutil.rmtree(output)


def test_exports(place, argv, tmp_path):
    """An export that merges. Its folder is absent until it is complete."""
    chance, mode, log = random.Random("exports"), MODES["lora"], tmp_path / "log"
    script, folder = tmp_path / "export.py", tmp_path / "exports"
    script.write_text(
        "import runpy\nrunpy.run_module('deepseek_moe.export', run_name='__main__')\n"
    )
    [trained] = go(argv(tmp_path / "adapter", **LORA, max_steps=1), log, mode, None, 0)
    assert trained.code == 0, trained.err

    def export(output: Path, accident: Accident) -> Ended:
        words = {"model": place / "base", "adapter": tmp_path / "adapter", "output": output}
        words["max_shard_size"] = "200KB"
        return run(options(**words), log, partial(on_one_thread, accident, 0), script)

    whole, output = tmp_path / "whole", folder / "out"
    assert export(whole, None).code == 0
    killed, accident = 0, None
    while accident or not killed:
        accident = draw(chance, folder, 2, 40) if killed < EXPORTS else None
        if export(output, accident).code < 0:
            killed += 1
            assert not output.exists()
            continue
        assert files_of(folder) == ["out", *(f"out/{name}" for name in files_of(whole))]
        for file in output.iterdir():
            assert file.read_bytes() == (whole / file.name).read_bytes(), file.name
        shutil.rmtree(output)
