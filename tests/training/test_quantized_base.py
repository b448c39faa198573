"""The base of QLoRA: the experts are really small, and compute what their round trip gives.

compute/test_fused_experts.py compares quantised experts with what they stand for, and
test_merge_lora.py the tensors of a loaded model.
"""

import gc
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from adapter_fixtures import add_random_adapters, stored_bytes
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.errors import UserError
from deepseek_moe.training.compute import grouped_experts as experts
from deepseek_moe.training.parameter_counts import parameter_table
from deepseek_moe.training.quantized_base import Linear4bit, Quantization, dequantize, full_shape

MakeModel = Callable[..., DeepseekForCausalLM]
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91, 33], [0, 3, 62, 9, 9, 31, 7, 1]])
# 64: bitsandbytes quantises blocks of 64 numbers. The stacks are larger than all else here.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
WIDE |= {"num_hidden_layers": 2, "initializer_range": 0.15}
STACK = 8 * 64 * 64  # of down_proj, the smaller one
WAYS = {
    "nf4-double": Quantization(4, "nf4", True, "float32"),
    "nf4": Quantization(4, "nf4", False, "float32"),
    "fp4-double": Quantization(4, "fp4", True, "float32"),
    "fp4": Quantization(4, "fp4", False, "float32"),
    "8": Quantization(8, dtype="float32"),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def base(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(**WIDE).save_pretrained(folder)
    return folder


def load(base: Path, way: Quantization | None = None, **options: Any) -> DeepseekForCausalLM:
    """As `build_model` does: by default experts in one grouped product, ready to train."""
    if way is not None:
        options["quantization_config"] = way.config([])
    options = {"experts_implementation": experts.GROUPED, "dtype": torch.float32} | options
    return DeepseekForCausalLM.from_pretrained(base, **options)


# Rows that are no multiple of 64 share scales with the next ones. bitsandbytes' own way back was
# wrong by a quarter for some of these shapes.
@every_way
@pytest.mark.parametrize("shape", [(8, 128, 64), (5, 24, 8), (4, 96, 80), (33, 112), (46, 33)])
def test_numbers_come_back_as_well_as_their_bits_allow(shape, way):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    stored = way.quantize(weight)
    assert full_shape(stored) == weight.shape
    have = dequantize(stored, torch.float32)
    assert have.shape == weight.shape and have.dtype == torch.float32
    assert torch.equal(have, way.roundtrip(weight))
    most = 0.01 if way.bits == 8 else {"nf4": 0.1, "fp4": 0.14}[way.quant_type]
    assert 0.4 * most < (have - weight).norm() / weight.norm() < most
    # The round trip is of the dtype that was loaded.
    low = replace(way, dtype="bfloat16").roundtrip(weight)
    assert low.dtype == torch.bfloat16
    assert not torch.equal(low.float(), have)


def test_it_is_kept_beside_the_adapter_and_checked(tmp_path):
    assert Quantization.load(tmp_path) is None
    for way in WAYS.values():
        way.save(tmp_path)
        assert Quantization.load(tmp_path) == way
    assert json.loads((tmp_path / "base_quantization.json").read_text())["bits"] == 8
    file = tmp_path / "base_quantization.json"
    for damaged in ("", "[4]", "{}", '{"bits": 3}', '{"bits": 4, "dtype": "load"}', '{"x": 1}'):
        file.write_text(damaged)
        with pytest.raises(UserError, match=rf"{file}.*; get the adapter anew"):
            Quantization.load(tmp_path)
    with pytest.raises(UserError, match="bits is 3; use 4, 8, or 16"):
        Quantization(3)
    with pytest.raises(UserError, match="quant_type is 'int4'; use nf4 or fp4"):
        Quantization(4, "int4")


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_and_experts_are_small_and_all_else_stays_as_loaded(base, way, dtype):
    way = replace(way, dtype=str(dtype).removeprefix("torch."))
    model, plain = load(base, way, dtype=dtype), load(base, dtype=dtype)
    of_plain = dict(plain.named_parameters())
    left_alone = set()
    for name, parameter in model.named_parameters():
        assert full_shape(parameter) == of_plain[name].shape
        if not isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params):
            left_alone.add(name)
            assert parameter.dtype == dtype and torch.equal(parameter, of_plain[name]), name
    others = {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"}
    assert left_alone == others | {name for name in of_plain if "norm" in name}
    moe, numbers = model.model.layers[1].mlp.experts, 3 * STACK
    weights = sum(stack.nbytes for stack in moe.parameters())
    assert weights * 8 == numbers * way.bits
    scale = (stored_bytes(moe) - weights) / (numbers / 64)  # bytes of the scale of 64 numbers
    assert 1 < scale < 1.5 if way.bits == 4 and way.double_quant else scale == 4
    tables = [parameter_table(add_random_adapters(one)) for one in (model, plain)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("way", "hidden", "expert", "dense"),  # none a multiple of 64, and 80 none of 32 either
    [("nf4-double", 48, 80, 96), ("nf4", 80, 96, 48), ("fp4", 96, 48, 80)],
)
def test_every_width_computes_what_is_stored(way, hidden, expert, dense, tiny_model, tmp_path):
    """Forwards and backwards, in evaluation and in training afterwards. On some CPUs, bitsandbytes'
    own 4-bit layer packs its weights anew in the first evaluation and rounds the scales for good.
    """
    widths = {"moe_intermediate_size": expert, "intermediate_size": dense}
    tiny_model(**(WIDE | widths | {"hidden_size": hidden})).save_pretrained(tmp_path)
    model, plain = load(tmp_path, WAYS[way]), load(tmp_path)
    of_plain = dict(plain.named_parameters())
    quantized = [n for n, p in model.named_parameters() if isinstance(p, bnb.nn.Params4bit)]
    assert len(quantized) == 2 * 4 + 3 + 3 + 2  # attention; dense; shared; routed
    assert {type(m) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)} == {Linear4bit}
    with torch.no_grad():
        for name in quantized:
            of_plain[name].copy_(dequantize(model.get_parameter(name), torch.float32))
    models = [add_random_adapters(one) for one in (model, plain)]
    for mode in (False, True):
        with torch.set_grad_enabled(mode):
            outs = [one.train(mode)(IDS, labels=IDS, use_cache=False) for one in models]
        torch.testing.assert_close(outs[0].logits, outs[1].logits, atol=1e-4, rtol=1e-4)
    for out in outs:
        out.loss.backward()
    of_plain = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        if "lora_" in name:
            want = of_plain[name].grad
            scale = max(1e-3, want.abs().max().item())
            assert (parameter.grad - want).abs().max() <= 1e-3 * scale, name


def large_floats() -> set[int]:
    some = (x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))
    return {id(x) for x in some if x.is_floating_point() and x.numel() >= STACK}


@pytest.mark.parametrize("way", ["bf16", "nf4-double", "8"])
def test_nothing_dequantised_is_kept_for_the_backward_pass(base, way):
    """Nor are weights copied that are not quantised."""
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    model = add_random_adapters(load(base, WAYS.get(way), dtype=dtype)).train()
    saved: list[torch.Tensor] = []
    before = large_floats()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks:
        loss = model(IDS, labels=IDS, use_cache=False).loss
    assert len(saved) > 100
    assert not large_floats() - before
    if way != "bf16":
        assert not [x.shape for x in saved if x.is_floating_point() and x.numel() >= STACK]
    loss.backward()
    assert not large_floats() - before


def test_deepspeed_still_marks_the_parameters_that_it_divides():
    """By the attributes that `is_divided` and `full_shape` read."""
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent
    source = (folder / "runtime" / "zero" / "partition_parameters.py").read_text(encoding="utf-8")
    assert "param.ds_id = " in source and "param.ds_shape = param.shape" in source
