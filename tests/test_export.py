"""Exports: what is written, nothing if that fails, and code that works without this package."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from adapter_fixtures import ADAPTED, add_tokenizer, load, make_adapter, peft, tensors_in
from finetune_fixtures import free_port
from flip_fixtures import flipped
from safetensors.torch import load_file, save_file
from stranger_fixtures import run_as_stranger
from text_fixtures import BUNDLED
from transformers import AutoTokenizer

from deepseek_moe import checkpoint_writer, export
from deepseek_moe.checkpoint import Checkpoint, fingerprint
from deepseek_moe.checkpoint_writer import AUTO_MAP, add_code, write_checkpoint
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.training.adapter_config import ADAPTER_FILE
from deepseek_moe.training.merge_lora import merged_tensors


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(load(base), tmp_path / "adapter", **ADAPTED)


def words(model: Path, output: Path, *options: Any) -> list[Any]:
    return [export, "--model", model, "--output", output, *options]


@pytest.fixture
def run(run_module: Callable[..., None]) -> Callable[..., None]:
    return lambda *args: run_module(*words(*args))


@pytest.fixture
def error(refusal: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: refusal(*words(*args))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("config.json", {field: value})
            for field in ("num_key_value_heads", "rope_scaling", "rms_norm_eps", "dtype")
            for value in (-1, "x", [1])
        ),
        ("config.json", {"scoring_func": "sigmoid"}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("generation_config.json", {"temperature": "hot"}),
        ("generation_config.json", {"eos_token_id": ["x"]}),
        *((name, "[" * 10**5) for name in ("config.json", "generation_config.json")),
        *((name, "[" * 10**5) for name in ("tokenizer.json", "tokenizer_config.json")),
    ],
)
def test_a_damaged_file_is_neither_used_nor_copied(name, content, base, tmp_path, error):
    file = base / name
    if isinstance(content, dict):
        content = json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | content)
    file.write_text(content)
    assert str(base) in error(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--adapter", "--delta", "--deepspeed_checkpoint", "--output"])
def test_a_name_that_no_file_can_have(option, base, tmp_path, error):
    assert "x" * 40 in error(base, tmp_path / "out", option, "x" * 5000)


def test_a_merged_model_is_written_in_shards(base, adapter, tmp_path, capsys, run):
    merged = tmp_path / "new" / "merged"
    options = ["--dtype", "bfloat16", "--max_shard_size", "20KB"]
    run(base, merged, "--adapter", adapter, *options)
    assert capsys.readouterr().out == f"{merged}\n"
    places = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(merged.glob("model-*.safetensors"))
    assert len(files) > 3
    for file in files:
        held = load_file(file)
        assert held.keys() == {name for name, place in places.items() if place == file.name}
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 20_000
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    model = load(base)
    wanted = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
    for name, x in load(merged).state_dict().items():
        torch.testing.assert_close(x, wanted.state_dict()[name], msg=name)
    assert sorted(p.name for p in merged.parent.iterdir()) == ["merged"]


def test_base_dtypes_are_kept_but_added_in_fp32(base, adapter, tmp_path, run):
    half, merged = tmp_path / "half", tmp_path / "merged"
    run(base, half, "--dtype", "bfloat16")
    run(half, merged, "--adapter", adapter)
    full = load(half, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(full, adapter).merge_and_unload().state_dict()
    for name, x in load(merged).state_dict().items():
        torch.testing.assert_close(x, wanted[name].bfloat16(), msg=name)


def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path, monkeypatch, run, error):
    """Only one expert differs. The run.json of the fine-tuning, there or above, tells it."""
    (adapter / "run.json").write_text(json.dumps({"settings": {"model": fingerprint(base)}}))
    run(base, tmp_path / "merged", "--adapter", adapter)
    tensors = tensors_in(base)
    tensors["model.layers.2.mlp.experts.6.up_proj.weight"].zero_()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    new, link = tmp_path / "new", tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(adapter)
    monkeypatch.chdir(adapter)
    for file in (adapter / "run.json", adapter.parent / "run.json"):
        (adapter / "run.json").rename(file)  # the first time onto itself
        for given in (adapter, link, "."):
            said = error(base, new, "--adapter", given)
            assert f"was not trained over {base}, by {file}" in said
    assert not new.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"settings": 3}', ""),
        ('{"settings": {"model": "0123456789abcdef"}}', "it was not checked that"),
    ],
    ids=["another program's", "an older version's"],
)
def test_a_run_json_that_tells_no_base(content, said, base, adapter, tmp_path, capsys, run):
    (adapter / "run.json").write_text(content)
    run(base, tmp_path / "merged", "--adapter", adapter)
    assert said in capsys.readouterr().err
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_run_json_that_is_damaged_is_named(base, adapter, tmp_path, error):
    """It may be that of the adapter's own run, which says what the base must be."""
    file = adapter / "run.json"
    for content in ("[broken", "[" * 10**5, '"x"'):
        file.write_text(content)
        assert f"error: {file} " in error(base, tmp_path / "out", "--adapter", adapter)


def test_without_adapter_the_base_is_written_as_it_is(base, tmp_path, run):
    new, name = tmp_path / "new", "generation_config.json"
    run(base, new)
    before, after = tensors_in(base), tensors_in(new)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (new / name).read_text() == (base / name).read_text()
    assert AutoTokenizer.from_pretrained(new).model_max_length == 64
    # Who may read the config may read the weights.
    assert len({file.stat().st_mode & 0o777 for file in new.iterdir()}) == 1


TRAIN = """
import sys
import deepspeed, torch
from transformers import AutoModelForCausalLM
import deepseek_moe
base, stage, folder, wanted = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(base)
model.model.embed_tokens.weight.requires_grad_(False)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": int(stage)},
    "zero_allow_untested_optimizer": True,
}
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
ids = torch.tensor([[0, 17, 5, 44, 80, 2, 91]])
engine.backward(engine(input_ids=ids, labels=ids).loss)
engine.step()
engine.save_checkpoint(folder)
with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
    torch.save({name: p.detach().clone() for name, p in engine.module.named_parameters()}, wanted)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_extensions")
@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_deepspeed_checkpoint_is_what_was_trained(stage, base, tiny_model, tmp_path, run, error):
    pytest.importorskip("deepspeed", reason="it wrote the checkpoint")
    folder, wanted, output = tmp_path / "checkpoint-1", tmp_path / "wanted.pt", tmp_path / "new"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", TRAIN, base, stage, folder, wanted]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(base, output, "--deepspeed_checkpoint", folder)
    trained, before = torch.load(wanted), dict(load(base).named_parameters())
    for name, parameter in load(output).named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert torch.equal(parameter, before[name]) == (name == "model.embed_tokens.weight"), name
    tiny_model(moe_intermediate_size=4).save_pretrained(tmp_path / "narrow")
    add_tokenizer(tmp_path / "narrow")
    found = error(tmp_path / "narrow", tmp_path / "no", "--deepspeed_checkpoint", folder)
    assert "is of another model: model.layers.1.mlp.experts.gate_up_proj" in found
    states = next(folder.glob("global_step*/*optim_states.pt"))
    with flipped(states):
        found = error(base, tmp_path / "no", "--deepspeed_checkpoint", folder)
        assert f"{states} is damaged (the checksum of" in found
    states.unlink()
    found = error(base, tmp_path / "no", "--deepspeed_checkpoint", folder)
    assert "cannot be put together" in found


def test_command_refuses_in_one_line(base, adapter, tmp_path, error):
    out = tmp_path / "out"
    assert "is there already" in error(base, base)
    assert "adapter_config.json does not exist" in error(base, out, "--adapter", tmp_path)
    assert "pass it as --adapter" in error(base, out, "--deepspeed_checkpoint", adapter)
    assert "no file 'latest'" in error(base, out, "--deepspeed_checkpoint", tmp_path)
    assert "is no size" in error(base, out, "--max_shard_size", "5 potatoes")
    (adapter / ADAPTER_FILE).write_bytes(b"broken")
    assert "get the adapter anew" in error(base, out, "--adapter", adapter)
    tensors = {name: tensor.to(torch.int8) for name, tensor in tensors_in(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "is stored as" in error(base, out)
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert "holds a llama model" in error(base, out)
    assert not out.exists()


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
def test_wrong_tensors_leave_no_folder(change, message, base, tmp_path):
    tensors = tensors_in(base)
    change(tensors)
    with pytest.raises(UserError, match=message):
        write_checkpoint(iter(tensors.items()), Checkpoint(base), tmp_path / "new", torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_one_line_and_leaves_nothing(base, tmp_path, monkeypatch, run):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        run(base, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_disk_that_is_too_small_is_refused_before_the_work(base, tmp_path, monkeypatch, run):
    numbers = sum(tensor.numel() for tensor in tensors_in(base).values())
    for dtype, need in (("float16", 2 * numbers), ("float32", 4 * numbers)):
        monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=need - 1)))
        with pytest.raises(RunError, match=r"MB, and .* are free"):
            run(base, tmp_path / "a" / "b", "--dtype", dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_the_code_is_all_that_the_model_imports_and_no_more(tmp_path):
    shutil.copyfile(BUNDLED / "config.json", tmp_path / "config.json")
    old = json.loads((tmp_path / "config.json").read_text())
    stale = {"auto_map": {"AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"]}}
    (tmp_path / "config.json").write_text(json.dumps(old | stale))
    add_code(tmp_path)
    code = ["balance_loss", "configuration_deepseek", "fast_generation", "layout"]
    assert sorted(f.stem for f in tmp_path.glob("*.py")) == [*code, "modeling_deepseek"]
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("auto_map") == AUTO_MAP
    assert fields == old


def test_exported_folder_works_with_transformers_alone(tmp_path):
    adapter = make_adapter(load(BUNDLED), tmp_path / "adapter", scale=0.02, **ADAPTED)
    merged = tmp_path / "merged"
    tensors = merged_tensors(BUNDLED, adapter)
    write_checkpoint(tensors, Checkpoint(BUNDLED), merged, torch.float32)
    ids, found, made = run_as_stranger(merged, tmp_path)
    model = load(BUNDLED, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(found, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(made, load(merged).generate(ids, max_new_tokens=5, do_sample=False))
