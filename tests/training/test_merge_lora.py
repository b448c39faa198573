"""Merged equals unmerged, over quantised bases too; adapters that cannot be merged are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixtures import (
    ADAPTED,
    EXPERTS,
    LINEARS,
    add_random_adapters,
    add_tokenizer,
    load,
    logits,
    make_adapter,
    move_what_trains,
    peft,
)
from safetensors.torch import load_file, save_file

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint import Checkpoint
from deepseek_moe.checkpoint_writer import write_checkpoint
from deepseek_moe.errors import UserError
from deepseek_moe.training import merge_lora as merge
from deepseek_moe.training.merge_lora import merged_tensors
from deepseek_moe.training.quantized_base import Quantization, dequantize

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(load(base), tmp_path / "adapter", **ADAPTED)


def merged(base: Path, adapter: Path) -> DeepseekForCausalLM:
    folder = adapter.with_name("merged")
    add_tokenizer(base)  # without which no checkpoint is written
    write_checkpoint(merged_tensors(base, adapter), Checkpoint(base), folder, dtype=None)
    return load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "fields",
    [
        ADAPTED,
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS[:1]},
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS[1:]},
        {"r": 3, "target_modules": ["q_proj", "lm_head"]},
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        ADAPTED | {"use_rslora": True, "lora_alpha": 1},
        ADAPTED
        | {
            "rank_pattern": {"mlp.experts.down_proj": 2, r"layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"mlp.experts.gate_up_proj": 20},
        },
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_merged_equals_unmerged(fields, base, tmp_path):
    adapter = make_adapter(load(base), tmp_path / "adapter", **fields)
    wanted = logits(peft.PeftModel.from_pretrained(load(base), adapter))
    assert (wanted - logits(load(base))).abs().max() > 0.01
    torch.testing.assert_close(logits(merged(base, adapter)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("way", "widths"),  # none a multiple of 64, which a scale is for
    [
        (Quantization(4), (48, 80, 96)),
        (Quantization(4, dtype="float32"), (96, 48, 80)),
        (Quantization(4, double_quant=False, dtype="float32"), (80, 96, 48)),
        (Quantization(4, "fp4", dtype="float32"), (48, 80, 96)),
        (Quantization(8), (48, 80, 96)),
        (Quantization(8, dtype="float32"), (96, 48, 80)),
    ],
    ids=str,
)
def test_over_a_quantised_base_merged_is_what_it_computes_with(way, widths, tiny_model, tmp_path):
    """Weights without an adapter are quantised too, but not those that are saved whole."""
    base, adapter, dtype = tmp_path / "base", tmp_path / "adapter", getattr(torch, way.dtype)
    sizes = zip(("hidden_size", "moe_intermediate_size", "intermediate_size"), widths, strict=True)
    tiny_model(**dict(sizes), initializer_range=0.15).save_pretrained(base)
    saved = [
        f"model.layers.{i}.mlp.shared_experts.{name}" for i in range(3) for name in LINEARS[4:]
    ]
    model = load(base, dtype=dtype, quantization_config=way.config(saved))
    plain, quantized = load(base), set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dtype != dtype:
                quantized.add(name)
                if way.bits == 8:
                    parameter.SCB = parameter.SCB.view(*parameter.shape[:-1], 1)
                plain.get_parameter(name).copy_(dequantize(parameter, dtype))
    assert len(quantized) == 3 * 4 + 3 + 2 * 2  # attention; dense; experts
    names = [name for name in LINEARS if name != "k_proj"]
    adapted = add_random_adapters(model, names, modules_to_save=["shared_experts"])
    move_what_trains(adapted).save_pretrained(adapter)
    way.save(adapter)

    found, tensors = merged(base, adapter), dict(merged_tensors(base, adapter))
    wanted = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)
    for name, kept in (("lm_head", True), ("model.layers.0.self_attn.k_proj", False)):
        stored = load(base).get_parameter(f"{name}.weight")
        assert tensors[f"{name}.weight"].dtype == (torch.float32 if kept else dtype)
        assert torch.equal(tensors[f"{name}.weight"].float(), stored) == kept


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / merge.ADAPTER_FILE)
    change(tensors)
    save_file(tensors, adapter / merge.ADAPTER_FILE)


def zero_b(tensors: dict[str, torch.Tensor]) -> None:
    for name, x in tensors.items():
        if "lora_B" in name:
            x.zero_()


def replace_a(tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({Q_PROJ.format("A"): tensor})


@pytest.mark.parametrize(
    ("change", "message"),  # of the tensors, or fields of the config
    [
        (zero_b, "changes nothing"),
        (lambda x: x.pop(Q_PROJ.format("A")), "q_proj.lora_A.weight is missing"),
        (lambda x: x.update(extra=torch.ones(1)), "extra is surplus"),
        (lambda x: x[Q_PROJ.format("B")][0].fill_(torch.nan), "NaN or inf"),
        (replace_a(torch.ones(3, 32, dtype=torch.int8)), "lora_A.weight is stored as I8, "),
        (replace_a(torch.ones(3, 31)), r"\[3, 31\] where \[3, 32\] is wanted"),
        ({"use_dora": True}, "use_dora=True; only plain LoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "VERA"}, "only LoRA can be merged"),
        ({"peft_type": "NO_SUCH"}, "cannot be used"),
        ({"target_modules": ["no_such"], "target_parameters": None}, "does not fit this base"),
        # PEFT takes these for regular expressions, and this one would run for ever.
        *(
            ({name: value}, rf"adapter_config.json has '.*' in {name}, which is no name; write")
            for expression in ("(.*a|.*b)*c", "(x+x+)+y", "q" * 10**4)
            for name, value in (
                *(("target_modules", expression), ("exclude_modules", [expression])),
                *(("layers_pattern", [expression]), ("rank_pattern", {expression: 2})),
            )
        ),
        *(({"target_modules": value}, "in target_modules, which is") for value in (5, [[]], [1])),
        *(({"r": value}, "in r; give a number") for value in ("x", [], True, 10**30, 0)),
        ({"lora_alpha": float("nan")}, "nan in lora_alpha; give a number"),
        ({"alpha_pattern": {"q_proj": None, "k_proj": "x"}}, "'x' in alpha_pattern"),
        ({"r": 10**9}, r"1000000000, 32\] is wanted"),  # no model is built with it
    ],
)
def test_broken_adapters_and_those_of_other_kinds_are_refused(change, message, base, adapter):
    if callable(change):
        change_tensors(adapter, change)
    else:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        merged_tensors(base, adapter)


def test_adapter_that_leaves_its_saved_modules_as_they_are_is_refused(base, tmp_path):
    fields = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    same = make_adapter(load(base), tmp_path / "same", scale=0, **fields)
    with pytest.raises(UserError, match="changes nothing"):
        merged_tensors(base, same)
    change_tensors(same, lambda x: x["base_model.model.lm_head.weight"][0].add_(1))
    merged_tensors(base, same)


WITHIN = "inside of a module that was saved whole"


@pytest.mark.parametrize(
    ("tied", "fields", "message"),
    [
        (False, {"target_parameters": EXPERTS, "modules_to_save": ["mlp"]}, WITHIN),
        (False, {"target_modules": ["gate_proj"], "modules_to_save": ["experts"]}, WITHIN),
        (True, {"modules_to_save": ["embed_tokens"]}, "ties to each other"),
        (False, {"target_modules": ["embed_tokens"]}, "only linears and experts can be merged"),
    ],
    ids=str,
)
def test_changes_that_no_merge_can_make_are_refused(tied, fields, message, tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    fields = {"r": 3, "target_modules": ["q_proj"]} | fields
    adapter = make_adapter(model, tmp_path / "adapter", **fields)
    with pytest.raises(UserError, match=message):
        merged_tensors(tmp_path / "base", adapter)


def test_tensors_are_read_when_they_are_written(base, adapter, monkeypatch):
    """No more than one stack of experts is read ahead of what has been handed on."""
    read: list[str] = []
    original = merge.Checkpoint.read

    def note(self: Any, parameter: str, *device: torch.device) -> torch.Tensor:
        read.append(parameter)
        return original(self, parameter, *device)

    tensors = merged_tensors(base, adapter)
    monkeypatch.setattr(merge.Checkpoint, "read", note)
    parameters = list(merge.Checkpoint(base).parameters)
    for name, _ in tensors:
        assert read[-1].startswith(name.split(".experts.")[0])
        assert read == parameters[: len(read)]


@pytest.mark.parametrize(("gpu", "free", "device"), [(0, 0, "cpu"), (1, 1, "cuda"), (1, -1, "cpu")])
def test_it_is_merged_on_a_gpu_with_room(gpu, free, device, base, monkeypatch):
    checkpoint = Checkpoint(base)
    largest = max(checkpoint.read(name).numel() for name in checkpoint.parameters)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(merge, "free_memory", lambda _: 16 * largest + free)
    assert merge.device_to_merge_on(checkpoint).type == device


@pytest.mark.gpu
@pytest.mark.parametrize("way", [None, Quantization(4)], ids=str)
def test_merged_on_a_gpu_is_merged_on_the_cpu(way, base, adapter):
    """Within a rounding to bfloat16."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU was found")
    if way:
        way.save(adapter)
    here, there = (
        dict(merged_tensors(base, adapter, torch.device(device))) for device in ("cpu", "cuda")
    )
    assert here.keys() == there.keys()
    assert {x.device.type for x in there.values()} == {"cpu", "cuda"}
    for name, tensor in here.items():
        torch.testing.assert_close(there[name].cpu(), tensor, rtol=2**-7, atol=1e-6, msg=name)
