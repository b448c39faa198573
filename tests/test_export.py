"""Merged equals unmerged, exports load with transformers alone, nothing is left half written."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deepseek_moe import DeepseekForCausalLM, DeepseekTokenizer, export
from deepseek_moe.cli import one_line_errors
from deepseek_moe.errors import RunError, UserError
from deepseek_moe.tokenization_deepseek import BOS, EOS
from deepseek_moe.weights import official_tensors

peft = pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")

LINEARS = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91]])
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def base(tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path) -> Path:
    """A small fp32 checkpoint with a tokenizer."""
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    words = {BOS: 0, EOS: 1} | {f"w{i}": i for i in range(2, 96)}
    Tokenizer(WordLevel(words, unk_token=EOS)).save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": BOS, "eos_token": EOS, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def make_adapter(model: PreTrainedModel, folder: Path, scale: float = 0.1, **fields: Any) -> Path:
    """An adapter as PEFT saves it, with random numbers in every tensor that trains."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(
        load(base), tmp_path / "adapter", r=3, target_modules=LINEARS, target_parameters=EXPERTS
    )


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits.float()


def run(monkeypatch: pytest.MonkeyPatch, *args: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
    export.main()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3, "target_modules": LINEARS, "target_parameters": EXPERTS},
        {"r": 4, "lora_alpha": 1, "target_modules": LINEARS, "target_parameters": EXPERTS},
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS},
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS[:1]},
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS[1:]},
        {"r": 3, "target_modules": LINEARS},
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"r": 3, "use_rslora": True, "target_modules": LINEARS, "target_parameters": EXPERTS},
        {
            "r": 3,
            "target_modules": LINEARS,
            "target_parameters": EXPERTS,
            "rank_pattern": {"mlp.experts.down_proj": 2, r"layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"mlp.experts.gate_up_proj": 20},
        },
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_merged_equals_unmerged(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter, merged = make_adapter(load(base), tmp_path / "adapter", **fields), tmp_path / "merged"
    export.write_checkpoint(export.merged_tensors(base, adapter), base, merged, dtype=None)
    before = logits(load(base))
    wanted = logits(peft.PeftModel.from_pretrained(load(base), adapter))
    found = logits(load(merged))
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


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
    export.write_checkpoint(export.merged_tensors(base, adapter), base, merged, None)
    for file in merged.glob("*.py"):
        file.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    assert type(load(merged)) is DeepseekForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert type(tokenizer) is DeepseekTokenizer
    assert tokenizer(f"{BOS}w7").input_ids == tokenizer("w7").input_ids == [0, 7]
    assert tokenizer.model_max_length == 64
    assert not mark.exists()


def test_code_is_everything_the_model_imports(base: Path) -> None:
    """Of the package it imports nothing that is left behind, or that needs more than torch."""
    export.add_code(base)
    names = {file.name for file in base.glob("*.py")}
    assert {"configuration_deepseek.py", "modeling_deepseek.py", "weights.py"} < names
    export.add_code(base)  # again does no harm
    fields = json.loads((base / "config.json").read_text())
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_deepseek.DeepseekForCausalLM"
    assert fields["n_routed_experts"] == 8
    assert not list(base.glob("*.tmp"))


def make_quantized(folder: Path, base: Path, quantization: Any) -> tuple[Path, torch.nn.Module]:
    """An adapter as fine-tuning over a quantised base saves it, and the model it belongs to."""
    from deepseek_moe.adapters import add_lora

    config = quantization.config(torch.float32, [])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    trainable = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = add_lora(model, trainable, rank=3, alpha=6, dropout=0.0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    quantization.save(folder)
    return folder, adapted


# 64: bitsandbytes quantises blocks of 64 numbers. The experts' double quantisation spans them all.
QUANTIZABLE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"bits": 4, "double_quant": True}, 1e-4),
        ({"bits": 4, "double_quant": False}, 1e-4),
        ({"bits": 8}, 0.1),  # bitsandbytes rounds the inputs of the linears to 8 bits too
    ],
    ids=["4-double", "4", "8"],
)
def test_over_a_quantised_base_merged_equals_unmerged(
    options: dict[str, Any],
    tolerance: float,
    tiny_model: Callable[..., DeepseekForCausalLM],
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes", reason="it quantises")
    from deepseek_moe.quantization import Quantization

    base, merged = tmp_path / "base", tmp_path / "merged"
    tiny_model(**QUANTIZABLE, initializer_range=0.15).save_pretrained(base)
    add_tokenizer(base)
    adapter, model = make_quantized(tmp_path / "adapter", base, Quantization(**options))
    export.write_checkpoint(export.merged_tensors(base, adapter), base, merged, None)
    # While training bitsandbytes multiplies in fp32; in evaluation mode its CPU kernel does not.
    wanted, found = logits(model.train()), logits(load(merged))
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
    (adapter / "base_quantization.json").unlink()
    other = tmp_path / "other"
    export.write_checkpoint(export.merged_tensors(base, adapter), base, other, None)
    if options["bits"] == 4:  # what it would be without the quantisation is far off
        assert (logits(load(other)) - wanted).abs().max() > 0.1
    k_proj = (
        "model.layers.1.self_attn.k_proj.weight"  # has no adapter, and is quantised all the same
    )
    assert not torch.equal(tensors_in(merged)[k_proj], tensors_in(base)[k_proj])
    for name in ("lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"):
        assert torch.equal(tensors_in(merged)[name], tensors_in(base)[name])


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
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
assert type(tokenizer).__module__.startswith("transformers_modules.")
bos, text = tokenizer.bos_token, "Once upon a time"
ids = tokenizer(text, return_tensors="pt").input_ids
assert ids.tolist() == tokenizer(bos + text, return_tensors="pt").input_ids.tolist()
assert ids[0].tolist().count(tokenizer.bos_token_id) == 1 and ids[0, 0] == tokenizer.bos_token_id
chat = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}], add_generation_prompt=True, tokenize=False
)
assert chat == bos + "User: Hello\\n\\nAssistant:", chat
assert tokenizer.padding_side == "left"
with torch.no_grad():
    logits = model(ids).logits
made = model.generate(ids, max_new_tokens=5, do_sample=False)
torch.save((ids, logits, made, transformers.__file__), {result!r})
"""


def test_exported_folder_works_with_transformers_alone(
    bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"r": 3, "target_modules": LINEARS, "target_parameters": EXPERTS}
    adapter = make_adapter(load(bundled_model), tmp_path / "adapter", scale=0.02, **fields)
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


# --- what is refused -----------------------------------------------------------------------------


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / export.ADAPTER_FILE)
    change(tensors)
    save_file(tensors, adapter / export.ADAPTER_FILE)


def change_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def zero_b(tensors: dict[str, torch.Tensor]) -> None:
    for name, x in tensors.items():
        if "lora_B" in name:
            x.zero_()


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "zero": (zero_b, "changes nothing"),
    "missing": (lambda x: x.pop(Q_PROJ.format("A")), "q_proj.lora_A.weight is missing"),
    "surplus": (lambda x: x.update(extra=torch.ones(1)), "extra is surplus"),
    "nan": (lambda x: x[Q_PROJ.format("B")][0].fill_(torch.nan), "NaN or inf"),
    "shape": (
        lambda x: x.update({Q_PROJ.format("A"): torch.ones(3, 31)}),
        r"\[3, 31\] where \[3, 32\] is wanted",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_adapters_with_bad_tensors_are_refused(fault: str, base: Path, adapter: Path) -> None:
    change, message = TENSOR_FAULTS[fault]
    change_tensors(adapter, change)
    with pytest.raises(UserError, match=message):
        export.merged_tensors(base, adapter)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True; only plain LoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "VERA"}, "only LoRA can be merged"),
        ({"peft_type": "NO_SUCH"}, "cannot be used"),
        ({"target_modules": ["no_such"], "target_parameters": None}, "does not fit this base"),
        ({"r": 4}, "is wanted"),
    ],
    ids=str,
)
def test_adapters_of_another_kind_are_refused(
    fields: dict[str, Any], message: str, base: Path, adapter: Path
) -> None:
    change_config(adapter, **fields)
    with pytest.raises(UserError, match=message):
        export.merged_tensors(base, adapter)


def test_adapter_that_leaves_its_saved_modules_as_they_are_is_refused(
    base: Path, tmp_path: Path
) -> None:
    fields = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    same = make_adapter(load(base), tmp_path / "same", scale=0, **fields)
    with pytest.raises(UserError, match="changes nothing"):
        export.merged_tensors(base, same)
    change_tensors(same, lambda x: x["base_model.model.lm_head.weight"][0].add_(1))
    export.merged_tensors(base, same)


def test_adapter_of_another_base_is_refused(
    adapter: Path, tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path
) -> None:
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match="does not fit this base"):
        export.merged_tensors(tmp_path / "wider", adapter)


def test_adapter_of_the_head_of_a_tied_base_is_refused(
    tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path
) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    fields = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapter = make_adapter(model, tmp_path / "adapter", **fields)
    with pytest.raises(UserError, match="ties to each other"):
        export.merged_tensors(tmp_path / "tied", adapter)


def command_error(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: Any) -> str:
    with pytest.raises(SystemExit) as left, one_line_errors():
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
    (adapter / export.ADAPTER_FILE).write_bytes(b"broken")
    assert "get the adapter anew" in error("--adapter", adapter)
    (base / "tokenizer.json").write_text("{}")
    assert "no usable tokenizer" in error()
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
        export.write_checkpoint(iter(tensors.items()), base, tmp_path / "new", torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# --- complete or absent --------------------------------------------------------------------------


def test_killed_in_the_middle_leaves_no_folder_and_the_next_run_cleans_up(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, aside = tmp_path / "new", tmp_path / "new.partial"
    script = f"""
from pathlib import Path
from deepseek_moe import export
def slowly():
    for number, one in enumerate(export.base_tensors(Path({str(base)!r}))):
        if number == 20:
            print("now", flush=True)
            time.sleep(60)
        yield one
export.write_checkpoint(slowly(), Path({str(base)!r}), Path({str(output)!r}), None, "5KB")
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not output.exists()
    assert list(aside.glob("*.safetensors"))
    run(monkeypatch, "--model", base, "--output", output)
    assert not aside.exists()
    assert [p.name for p in output.glob("*.safetensors")] == ["model.safetensors"]
    load(output)


def test_full_disk_is_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(RunError, match="No space left"):
        run(monkeypatch, "--model", base, "--output", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_only_an_empty_folder_is_filled(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "new"
    output.mkdir()
    export.write_checkpoint(export.base_tensors(base), base, output, None)
    load(output)
    with pytest.raises(UserError, match="is there already"):
        export.write_checkpoint(export.base_tensors(base), base, output, None)


def test_tensors_are_read_when_they_are_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than one stack of experts is read ahead of what has been handed on."""
    read: list[str] = []
    original = export._Checkpoint.read

    def note(self: Any, parameter: str) -> torch.Tensor:
        read.append(parameter)
        return original(self, parameter)

    tensors = export.merged_tensors(base, adapter)
    monkeypatch.setattr(export._Checkpoint, "read", note)
    assert not read
    parameters = list(export._Checkpoint(base).parameters)
    for name, _ in tensors:
        before = name.split(".experts.")[0]
        assert read[-1].startswith(before)
        assert read == parameters[: len(read)]
