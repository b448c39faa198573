"""Exports load with transformers alone and natively; nothing is left half written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_fixtures import (
    ADAPTED,
    add_tokenizer,
    load,
    make_adapter,
    peft,
    tensors_in,
)
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from deepseek_moe import DeepseekForCausalLM, DeepseekTokenizer, checkpoint_writer, export
from deepseek_moe.checkpoint import ADAPTER_FILE, base_tensors
from deepseek_moe.errors import RunError, UserError, exit_on_user_error
from deepseek_moe.files import write_aside
from deepseek_moe.fingerprint import fingerprint
from deepseek_moe.model.layout import official_tensors
from deepseek_moe.model.tokenization_deepseek import BOS
from deepseek_moe.training.merge_lora import merged_tensors


@pytest.fixture
def base(tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path) -> Path:
    """A small fp32 checkpoint with a tokenizer."""
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(load(base), tmp_path / "adapter", **ADAPTED)


def run(monkeypatch: pytest.MonkeyPatch, *args: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
    export.main()


def test_command_writes_shards_with_the_official_names(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    merged = tmp_path / "new" / "merged"
    options = ["--dtype", "bfloat16", "--max_shard_size", "20KB"]
    run(monkeypatch, "--model", base, "--adapter", adapter, "--output", merged, *options)
    assert capsys.readouterr().out == f"{merged}\n"
    tensors, model = tensors_in(merged), load(base)
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    assert shapes == official_tensors(model)
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    places = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    assert places.keys() == tensors.keys()
    files = sorted(merged.glob("model-*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(places.values())
    for file in files:
        held = load_file(file)
        assert held.keys() == {name for name, place in places.items() if place == file.name}
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 20_000
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    wanted = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
    for name, x in load(merged).state_dict().items():
        torch.testing.assert_close(x, wanted.state_dict()[name], msg=name)
    assert sorted(p.name for p in merged.parent.iterdir()) == ["merged"]


def test_base_dtypes_are_kept_but_added_in_fp32(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, merged = tmp_path / "half", tmp_path / "merged"
    run(monkeypatch, "--model", base, "--output", half, "--dtype", "bfloat16")
    run(monkeypatch, "--model", half, "--adapter", adapter, "--output", merged)
    full = load(half, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(full, adapter).merge_and_unload()
    for name, x in load(merged).state_dict().items():
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x, wanted.state_dict()[name].bfloat16(), msg=name)


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By the note that fine-tuning left; one expert is all that differs."""
    note = json.dumps({"settings": {"model": fingerprint(base)}})
    (adapter / "run.json").write_text(note)
    run(monkeypatch, "--model", base, "--adapter", adapter, "--output", tmp_path / "merged")
    tensors = tensors_in(base)
    tensors["model.layers.2.mlp.experts.6.up_proj.weight"].zero_()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        run(monkeypatch, "--model", base, "--adapter", adapter, "--output", tmp_path / "new")
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "was not trained over" in line
    assert not (tmp_path / "new").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(adapter)
    (adapter / "run.json").rename(adapter.parent / "run.json")
    monkeypatch.chdir(adapter)
    for given in (".", str(tmp_path / "elsewhere" / "link")):
        with pytest.raises(UserError, match="was not trained over"):
            run(monkeypatch, "--model", base, "--adapter", given, "--output", tmp_path / "new")


@pytest.mark.parametrize("content", ["[broken", '{"id": 5}', '{"settings": 3}'])
def test_a_run_json_of_another_program_says_nothing(
    content: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter / "run.json").write_text(content)
    run(monkeypatch, "--model", base, "--adapter", adapter, "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_private_folder_stays_private(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir(mode=0o700)
    run(monkeypatch, "--model", base, "--output", tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_an_adapter_of_an_older_version_is_merged_with_a_note(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its run.json has a fingerprint of another kind, which says nothing about the base."""
    (adapter / "run.json").write_text(json.dumps({"settings": {"model": "0123456789abcdef"}}))
    run(monkeypatch, "--model", base, "--adapter", adapter, "--output", tmp_path / "merged")
    assert "it was not checked that" in capsys.readouterr().err
    assert (tmp_path / "merged" / "config.json").is_file()


def test_without_adapter_the_base_is_written_as_it_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--model", base, "--output", tmp_path / "new", "--max_shard_size", "1GB")
    before, after = tensors_in(base), tensors_in(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    generation = (tmp_path / "new" / "generation_config.json").read_text()
    assert generation == (base / "generation_config.json").read_text()
    stored = {p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()}
    assert len(stored) == 1  # who may read the config may read the weights


def test_exported_folder_loads_natively_and_its_code_is_not_run(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged, mark = tmp_path / "merged", tmp_path / "mark"
    checkpoint_writer.write_checkpoint(merged_tensors(base, adapter), base, merged, None)
    for file in merged.glob("*.py"):
        file.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    assert type(load(merged)) is DeepseekForCausalLM
    again = tmp_path / "again"
    load(merged).save_pretrained(again)
    AutoTokenizer.from_pretrained(merged).save_pretrained(again)
    for folder in (merged, again):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert type(tokenizer) is DeepseekTokenizer
        assert tokenizer(f"{BOS}w7").input_ids == tokenizer("w7").input_ids == [0, 7]
        assert tokenizer.model_max_length == 64
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "auto_map" not in fields
    assert not mark.exists()


def test_code_is_all_that_the_model_imports_and_no_more(base: Path) -> None:
    old = json.loads((base / "config.json").read_text())
    stale = {"auto_map": {"AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"]}}
    (base / "config.json").write_text(json.dumps(old | stale))
    for _ in range(2):  # again does no harm
        checkpoint_writer.add_code(base)
    names = {file.name for file in base.glob("*.py")}
    assert names == {"configuration_deepseek.py", "modeling_deepseek.py", "weights.py"}
    fields = json.loads((base / "config.json").read_text())
    assert fields.pop("auto_map") == {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    assert fields == old
    assert not list(base.glob("*.tmp"))


TRAIN = """
import deepspeed, torch
from transformers import AutoModelForCausalLM
import deepseek_moe
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({base!r})
model.model.embed_tokens.weight.requires_grad_(False)
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {{"stage": {stage}}},
    "zero_allow_untested_optimizer": True,
}}
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
ids = torch.tensor([[0, 17, 5, 44, 80, 2, 91]])
engine.backward(engine(input_ids=ids, labels=ids).loss)
engine.step()
engine.save_checkpoint({folder!r})
with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
    state = {{name: p.detach().clone() for name, p in engine.module.named_parameters()}}
    torch.save(state, {wanted!r})
"""


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_checkpoint_becomes_what_was_trained(
    stage: int,
    base: Path,
    tiny_model: Callable[..., DeepseekForCausalLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    pytest.importorskip("deepspeed", reason="it wrote the checkpoint")
    folder, wanted = tmp_path / "checkpoint-1", tmp_path / "wanted.pt"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    one |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = TRAIN.format(base=str(base), stage=stage, folder=str(folder), wanted=str(wanted))
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | one, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "new"
    run(monkeypatch, "--model", base, "--deepspeed_checkpoint", folder, "--output", output)
    assert capsys.readouterr().out == f"{output}\n"
    trained, before = torch.load(wanted), dict(load(base).named_parameters())
    for name, parameter in load(output).named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert torch.equal(parameter, before[name]) == (name == "model.embed_tokens.weight"), name
    tiny_model(moe_intermediate_size=4).save_pretrained(tmp_path / "narrow")
    add_tokenizer(tmp_path / "narrow")
    options = ["--deepspeed_checkpoint", folder, "--output", tmp_path / "no"]
    found = command_error(monkeypatch, capsys, "--model", tmp_path / "narrow", *options)
    assert "is of another model: model.layers.1.mlp.experts.gate_up_proj" in found
    next(folder.glob("global_step*/*optim_states.pt")).unlink()
    assert "cannot be put together" in command_error(monkeypatch, capsys, "--model", base, *options)


# --- where this package is not installed ---------------------------------------------------------


def only(folder: Path, *names: str) -> Path:
    """A folder of links to the installed distributions `names` and what they require, no other."""
    folder.mkdir()
    seen, wanted = set(), list(names)
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name in seen:
            continue
        seen.add(name)
        for line in found.requires or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                wanted.append(need.name)
        for file in found.files or []:
            link = folder / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(found.locate_file(file.parts[0]))
    return folder


STRANGER = """
import sys, importlib.util, torch
sys.path.insert(0, {packages!r})
for name in ("deepseek_moe", "peft", "accelerate", "bitsandbytes", "datasets", "psutil"):
    assert importlib.util.find_spec(name) is None, name
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
talk = [{{"role": "user", "content": "Hello"}}]
for trust in (False, True):  # engines that know the model load its tokenizer without trust
    tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=trust)
    assert type(tokenizer).__module__.startswith("transformers."), type(tokenizer)
    assert tokenizer.padding_side == "left"
    bos = tokenizer.bos_token_id
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert ids[0, 0] == bos and ids[0].tolist().count(bos) == 1, ids
    chat = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert chat == tokenizer.bos_token + "User: Hello\\n\\nAssistant:", chat
    found = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True).input_ids
    assert found[0] == bos and found.count(bos) == 1, found
    assert found == tokenizer(chat, add_special_tokens=False).input_ids
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
config = AutoConfig.from_pretrained({folder!r}, trust_remote_code=True)
config.use_cache = False
given = AutoModelForCausalLM.from_pretrained({folder!r}, config=config, trust_remote_code=True)
assert not given.config.use_cache
with torch.no_grad():
    logits = model(ids).logits
made = model.generate(ids, max_new_tokens=5, do_sample=False)
torch.save((ids, logits, made, transformers.__file__), {result!r})
"""


def test_exported_folder_works_with_transformers_alone(
    bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(load(bundled_model), tmp_path / "adapter", scale=0.02, **ADAPTED)
    merged, result = tmp_path / "merged", tmp_path / "result.pt"
    options = ["--adapter", adapter, "--output", merged, "--dtype", "float32"]
    run(monkeypatch, "--model", bundled_model, *options)
    packages = only(tmp_path / "packages", "torch", "transformers")
    script = STRANGER.format(packages=str(packages), folder=str(merged), result=str(result))
    script = f"import sys; sys.path.insert(0, {str(packages)!r})\n{script}"
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # -I -S: no site-packages, no PYTHONPATH, not the folder it is run in
        [sys.executable, "-I", "-S", "-c", script],
        env=os.environ | modules,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ids, found, made, where = torch.load(result)
    assert where.startswith(str(packages))
    model = load(bundled_model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(found, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(made, load(merged).generate(ids, max_new_tokens=5, do_sample=False))


def command_error(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: Any) -> str:
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        run(monkeypatch, *args)
    assert left.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_command_refuses_in_one_line(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def error(*args: Any, output: Path = tmp_path / "out") -> str:
        return command_error(monkeypatch, capsys, "--model", base, *args, "--output", output)

    assert "is there already" in error(output=base)
    assert "is there already" in error(output=base / "config.json")
    assert "adapter_config.json does not exist" in error("--adapter", tmp_path)
    assert "pass it as --adapter" in error("--deepspeed_checkpoint", adapter)
    assert "no file 'latest'" in error("--deepspeed_checkpoint", tmp_path)
    assert "is no size" in error("--max_shard_size", "5 potatoes")
    (adapter / ADAPTER_FILE).write_bytes(b"broken")
    assert "get the adapter anew" in error("--adapter", adapter)
    change = json.loads((base / "tokenizer.json").read_text())
    change["model"]["vocab"]["w96"] = 96
    (base / "tokenizer.json").write_text(json.dumps(change))
    assert "has ids up to 96" in error()
    (base / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be used" in error()
    assert not (tmp_path / "out").exists()
    change = json.loads((base / "config.json").read_text()) | {"model_type": "llama"}
    (base / "config.json").write_text(json.dumps(change))
    assert "holds a llama model" in error()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda x: x.update(more=torch.ones(1)), "more .* is not of this base"),
        (lambda x: x.update({"model.norm.weight": torch.ones(3)}), "is not of this base"),
        (lambda x: x["model.norm.weight"].fill_(1e6), "NaN or inf as float16; use another --dtype"),
    ],
    ids=["missing", "surplus", "shape", "overflow"],
)
def test_wrong_tensors_leave_no_folder(
    change: Callable[..., Any], message: str, base: Path, tmp_path: Path
) -> None:
    tensors = tensors_in(base)
    change(tensors)
    with pytest.raises(UserError, match=message):
        checkpoint_writer.write_checkpoint(
            iter(tensors.items()), base, tmp_path / "new", torch.float16
        )
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# --- complete or absent --------------------------------------------------------------------------


# A writer in a process of its own. It waits in the middle of the tensors for a line of input.
SLOW_WRITER = """
import sys
from pathlib import Path
from deepseek_moe.checkpoint import base_tensors
from deepseek_moe.checkpoint_writer import write_checkpoint
from deepseek_moe.errors import exit_on_user_error
base, output = map(Path, sys.argv[1:])
def slowly():
    for number, one in enumerate(base_tensors(base)):
        if number == 20:
            print("now", flush=True)
            input()
        yield one
with exit_on_user_error():
    write_checkpoint(slowly(), base, output, None, "5KB")
"""


def start_slow_writer(base: Path, output: Path) -> subprocess.Popen:
    """Returns when it waits."""
    command = [sys.executable, "-c", SLOW_WRITER, base, output]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, text=True, **pipes)
    assert child.stdout.readline() == "now\n"
    return child


def test_killed_in_the_middle_leaves_no_folder_and_the_next_run_cleans_up(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new"
    with start_slow_writer(base, output) as child:
        child.send_signal(signal.SIGKILL)
    assert not output.exists()
    [aside] = tmp_path.glob("new*")
    assert list(aside.glob("*.safetensors"))
    run(monkeypatch, "--model", base, "--output", output)
    assert not aside.exists()
    assert list(tmp_path.glob("new*")) == [output]
    assert [p.name for p in output.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(output.glob(".*"))
    load(output)


def test_what_another_process_writes_is_left_to_it_and_never_mixed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new"
    with start_slow_writer(base, output) as child:
        run(monkeypatch, "--model", base, "--output", output, "--dtype", "bfloat16")
        before = {file.name: file.read_bytes() for file in output.iterdir()}
        _, said = child.communicate("go on\n")
    assert child.returncode == 1
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert f"{output} was written by another process meanwhile" in said
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert {x.dtype for x in tensors_in(output).values()} == {torch.bfloat16}
    assert list(tmp_path.glob("new*")) == [output]


def test_two_exports_in_one_process_do_not_mix(base: Path, tmp_path: Path) -> None:
    """The second begins and ends within the first."""
    output = tmp_path / "new"

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, one in enumerate(base_tensors(base)):
            if number == 20:
                checkpoint_writer.write_checkpoint(base_tensors(base), base, output, torch.bfloat16)
            yield one

    with pytest.raises(RunError, match="was written by another process meanwhile"):
        checkpoint_writer.write_checkpoint(tensors(), base, output, None)
    assert {x.dtype for x in tensors_in(output).values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert list(tmp_path.glob("new*")) == [output]


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 0.1, 0.3])
def test_of_two_exports_at_a_time_one_is_there(
    offset: float, bundled_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new"
    command = [sys.executable, "-m", "deepseek_moe.export", "--model", bundled_model]
    processes = {}
    for dtype in ("bfloat16", "float32"):
        options = ["--output", output, "--dtype", dtype]
        processes[dtype] = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        time.sleep(offset)
    said = {dtype: process.communicate()[1] for dtype, process in processes.items()}
    [winner] = [dtype for dtype, process in processes.items() if process.returncode == 0]
    [loser] = processes.keys() - {winner}
    assert f"error: {output} " in said[loser] and "Traceback" not in said[loser]
    assert json.loads((output / "config.json").read_text())["dtype"] == winner
    assert {str(x.dtype) for x in tensors_in(output).values()} == {f"torch.{winner}"}
    assert list(tmp_path.iterdir()) == [output]


def test_files_of_the_user_beside_what_is_written_stay(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under names that were once used to write aside, and under those that look like them."""
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.mine.partial").mkdir()
    mine = [tmp_path / "new.partial" / "x", tmp_path / "new.mine.partial" / "x"]
    mine += [base / "config.json.tmp", base / "tokenizer_config.tmp"]
    for file in mine:
        file.write_text("mine")
    run(monkeypatch, "--model", base, "--output", tmp_path / "new")
    checkpoint_writer.add_code(base)
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    assert [file.read_text() for file in mine] == ["mine"] * len(mine)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "note.txt"
    write_aside(file, "old")
    with pytest.raises(FileExistsError):
        write_aside(file, "new", overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", None)
        with pytest.raises(TypeError):
            write_aside(file, "new")
    assert file.read_text() == "old"
    write_aside(file, "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_to_an_empty_folder_is_filled(base: Path, tmp_path: Path) -> None:
    place, output = tmp_path / "place", tmp_path / "new"
    place.mkdir()
    output.symlink_to(place)
    checkpoint_writer.write_checkpoint(base_tensors(base), base, output, None)
    assert output.is_symlink()
    load(place)


def test_a_mounted_folder_is_refused_before_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rename can put a folder there."""
    output = tmp_path / "new"
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
    with pytest.raises(UserError, match="a file system is mounted"):
        checkpoint_writer.write_checkpoint(iter([]), base, output, None)


def test_full_disk_is_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        run(monkeypatch, "--model", base, "--output", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = sum(tensor.numel() for tensor in tensors_in(base).values())
    for dtype, free in (("float16", 2 * numbers - 1), ("float32", 4 * numbers - 1)):
        monkeypatch.setattr(
            checkpoint_writer.shutil, "disk_usage", lambda _, n=free: SimpleNamespace(free=n)
        )
        with pytest.raises(RunError, match=r"MB, and .* are free"):
            run(monkeypatch, "--model", base, "--output", tmp_path / "a" / "b", "--dtype", dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_base_that_is_no_floats_is_refused(
    dtype: torch.dtype, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_in(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is stored as"):
        run(monkeypatch, "--model", base, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_an_empty_folder_is_filled(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "new"
    output.mkdir()
    checkpoint_writer.write_checkpoint(base_tensors(base), base, output, None)
    load(output)
    with pytest.raises(UserError, match="is there already"):
        checkpoint_writer.write_checkpoint(base_tensors(base), base, output, None)
