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
    peft,
    tensors_in,
)
from safetensors.torch import load_file, save_file
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint_writer import write_checkpoint
from deepseek_moe.errors import UserError
from deepseek_moe.training import merge_lora as merge
from deepseek_moe.training.merge_lora import merged_tensors

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


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


@pytest.mark.parametrize(
    "fields",
    [
        ADAPTED,
        {"r": 4, "lora_alpha": 1, "target_modules": LINEARS, "target_parameters": EXPERTS},
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS},
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS[:1]},
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS[1:]},
        {"r": 3, "target_modules": LINEARS},
        {"r": 3, "target_modules": ["q_proj", "lm_head"]},
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
    write_checkpoint(merged_tensors(base, adapter), base, merged, dtype=None)
    before = logits(load(base))
    wanted = logits(peft.PeftModel.from_pretrained(load(base), adapter))
    found = logits(load(merged))
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# --- over a quantised base -----------------------------------------------------------------------

# 64: bitsandbytes quantises blocks of 64 numbers. The experts' double quantisation spans them all.
QUANTIZABLE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
# These are quantised all the same.
WITHOUT_ADAPTER = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in ("k", "o")]
WAYS = {
    "4-double": {"bits": 4, "double_quant": True},
    "4": {"bits": 4, "double_quant": False},
    "4-fp4": {"bits": 4, "quant_type": "fp4"},
    "8": {"bits": 8},
}
all_ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


@pytest.fixture
def wide_base(tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path) -> Path:
    pytest.importorskip("bitsandbytes", reason="it quantises")
    folder = tmp_path / "base"
    tiny_model(**QUANTIZABLE, initializer_range=0.15).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def make_quantized(folder: Path, base: Path, **options: Any) -> tuple[Path, nn.Module]:
    """An adapter as fine-tuning over a quantised base saves it, and the model it belongs to."""
    from deepseek_moe.training.quantized_base import Quantization

    quantization = Quantization(**options)
    dtype = getattr(torch, quantization.dtype)
    model = load(base, dtype=dtype, quantization_config=quantization.config([]))
    adapted = add_random_adapters(model, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    adapted.save_pretrained(folder)
    quantization.save(folder)
    return folder, adapted


def give_exact_inputs(model: nn.Module) -> None:
    """Lets 8-bit linears multiply in full. bitsandbytes rounds their inputs to 8 bits, too."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is bnb.nn.Linear8bitLt:
            codes, scale = module.weight.data, module.weight.SCB / 127
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(codes * scale[:, None], requires_grad=False)
            model.set_submodule(name, plain)


@all_ways
def test_over_a_quantised_base_merged_equals_unmerged(
    options: dict[str, Any], wide_base: Path, tmp_path: Path
) -> None:
    merged, other = tmp_path / "merged", tmp_path / "other"
    adapter, model = make_quantized(tmp_path / "adapter", wide_base, **options, dtype="float32")
    write_checkpoint(merged_tensors(wide_base, adapter), wide_base, merged, None)
    give_exact_inputs(model)
    # While training, bitsandbytes multiplies in fp32. In evaluation its CPU kernel does not.
    wanted = logits(model.train())
    torch.testing.assert_close(logits(load(merged)), wanted, atol=1e-4, rtol=0)
    (adapter / "base_quantization.json").unlink()
    write_checkpoint(merged_tensors(wide_base, adapter), wide_base, other, None)
    # The equality above means something: without the quantisation, the merged model is far off.
    assert (logits(load(other)) - wanted).abs().max() > (0.1 if options["bits"] == 4 else 0.005)


@all_ways
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_what_the_quantised_base_computes_with(
    dtype: str, options: dict[str, Any], wide_base: Path, tmp_path: Path
) -> None:
    """To the bit where there is no adapter; exact sums with the adapters of experts. The stored
    numbers are fp32, and not what was loaded in bf16."""
    from deepseek_moe.training.quantized_base import dequantize

    adapter, model = make_quantized(tmp_path / "adapter", wide_base, **options, dtype=dtype)
    merged, stored = dict(merged_tensors(wide_base, adapter)), tensors_in(wide_base)
    number_type = getattr(torch, dtype)
    for linear in WITHOUT_ADAPTER:
        found, weight = (
            merged[f"{linear}.weight"],
            model.get_base_model().get_submodule(linear).weight,
        )
        if options["bits"] == 8:
            weight.SCB = weight.SCB.view(-1, 1)
        assert found.dtype == number_type
        assert torch.equal(found, dequantize(weight, number_type))
        assert not torch.equal(found.float(), stored[f"{linear}.weight"])
    outer = model.get_base_model().get_submodule("model.layers.1.mlp.experts")
    for wrapper in (outer, outer.base_layer):
        stack = dequantize(wrapper.get_param(), number_type).float()
        stack = stack + wrapper.get_delta_weight("default")
        gate_up = wrapper.parameter_name == "gate_up_proj"
        parts = ("gate_proj", "up_proj") if gate_up else ("down_proj",)
        for expert in range(8):
            names = [f"model.layers.1.mlp.experts.{expert}.{part}.weight" for part in parts]
            found = torch.cat([merged[name] for name in names])
            torch.testing.assert_close(found, stack[expert], atol=1e-6, rtol=1e-6)
    for name in ("lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"):
        assert torch.equal(merged[name], stored[name])


# --- what is refused -----------------------------------------------------------------------------


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / merge.ADAPTER_FILE)
    change(tensors)
    save_file(tensors, adapter / merge.ADAPTER_FILE)


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
    "integers": (
        lambda x: x.update({Q_PROJ.format("A"): x[Q_PROJ.format("A")].to(torch.int8)}),
        "lora_A.weight is stored as I8, not as one of",
    ),
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
        merged_tensors(base, adapter)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True; only plain LoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "VERA"}, "only LoRA can be merged"),
        ({"peft_type": "NO_SUCH"}, "cannot be used"),
        ({"target_modules": ["no_such"], "target_parameters": None}, "does not fit this base"),
        ({"r": 4}, "does not fit this base: .* is wanted"),
    ],
    ids=str,
)
def test_adapters_of_another_kind_are_refused(
    fields: dict[str, Any], message: str, base: Path, adapter: Path
) -> None:
    change_config(adapter, **fields)
    with pytest.raises(UserError, match=message):
        merged_tensors(base, adapter)


def test_adapter_that_leaves_its_saved_modules_as_they_are_is_refused(
    base: Path, tmp_path: Path
) -> None:
    fields = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    same = make_adapter(load(base), tmp_path / "same", scale=0, **fields)
    with pytest.raises(UserError, match="changes nothing"):
        merged_tensors(base, same)
    change_tensors(same, lambda x: x["base_model.model.lm_head.weight"][0].add_(1))
    merged_tensors(base, same)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["experts"]},
    ],
    ids=["stacks", "linears"],
)
def test_adapters_inside_of_what_is_saved_whole_are_refused(
    fields: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(load(base), tmp_path / "adapter", r=3, **fields)
    with pytest.raises(UserError, match="inside of a module that was saved whole"):
        merged_tensors(base, adapter)


def test_adapter_of_the_head_of_a_tied_base_is_refused(
    tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path
) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    fields = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapter = make_adapter(model, tmp_path / "adapter", **fields)
    with pytest.raises(UserError, match="ties to each other"):
        merged_tensors(tmp_path / "tied", adapter)


def test_tensors_are_read_when_they_are_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than one stack of experts is read ahead of what has been handed on."""
    read: list[str] = []
    original = merge.Checkpoint.read

    def note(self: Any, parameter: str) -> torch.Tensor:
        read.append(parameter)
        return original(self, parameter)

    tensors = merged_tensors(base, adapter)
    monkeypatch.setattr(merge.Checkpoint, "read", note)
    assert not read
    parameters = list(merge.Checkpoint(base).parameters)
    for name, _ in tensors:
        before = name.split(".experts.")[0]
        assert read[-1].startswith(before)
        assert read == parameters[: len(read)]
