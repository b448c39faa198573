"""The base of QLoRA: the experts are really small, and compute what their round trip gives."""

import gc
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixtures import LINEARS, add_random_adapters, stored_bytes
from safetensors.torch import load_file, save_file
from torch import nn

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.training.torch_ops import unpack_4bit
from deepseek_moe.model.modeling_deepseek import DeepseekExperts
from deepseek_moe.training.compute import grouped_experts as experts
from deepseek_moe.training.merge_lora import merged_tensors
from deepseek_moe.training.quantized_base import (
    Linear4bit,
    Quantization,
    dequantize,
    full_shape,
)
from deepseek_moe.training.trainable import parameter_table

bnb = pytest.importorskip("bitsandbytes", reason="it quantises: pip install bitsandbytes")

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
FOUR_BITS = {name: way for name, way in WAYS.items() if way.bits == 4}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_four = pytest.mark.parametrize("way", FOUR_BITS.values(), ids=FOUR_BITS)


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


def stacks(model: nn.Module) -> list[nn.Parameter]:
    found = [m for m in model.modules() if isinstance(m, DeepseekExperts)]
    return [x for m in found for x in (m.gate_up_proj, m.down_proj)]


def roundtripped(base: Path, way: Quantization) -> DeepseekForCausalLM:
    """The unquantised model with each weight that is quantised replaced by what it becomes."""
    model = load(base)
    linears = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for weight in [*linears, *stacks(model)]:
            before = weight.clone()
            weight.copy_(way.roundtrip(weight))
            assert not torch.equal(weight, before)
    return model


# ---- numbers ----


def by_hand(weight: torch.Tensor, way: Quantization) -> torch.Tensor:
    """Without the second quantisation of the scales. The last block may be short."""
    if way.bits == 8:
        weight = weight.half().float()  # as bitsandbytes wants it
        scale = weight.abs().amax(dim=-1, keepdim=True)
        return (weight / scale * 127).round() / 127 * scale
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = bnb.functional.get_4bit_type(way.quant_type, device="cpu")
    nearest = (blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(dim=-1)
    return (levels[nearest] * scale).flatten()[: weight.numel()].view_as(weight)


def as_stored(weight: nn.Parameter) -> torch.Tensor:
    """The numbers that the stored codes and scales of a 4-bit weight mean, in fp32."""
    assert weight.quant_state.dtype == torch.float32
    return unpack_4bit(weight.detach().as_subclass(torch.Tensor), weight.quant_state)


# Rows that are no multiple of 64 share scales with the next ones.
SHAPES = [(8, 128, 64), (64, 64), (5, 24, 8), (48, 48), (4, 96, 80), (33, 112), (81, 144), (46, 33)]


@every_way
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_the_nearest_levels(shape: tuple[int, ...], way: Quantization) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    stored = way.quantize(weight)
    assert full_shape(stored) == weight.shape
    have = dequantize(stored, torch.float32)
    wanted = by_hand(weight, way)
    assert have.shape == weight.shape
    assert have.dtype == torch.float32
    assert torch.equal(have, way.roundtrip(weight))
    if way.bits == 4:
        assert torch.equal(have, as_stored(stored))
    scales_again = way.bits == 4 and way.double_quant  # off by some per cent
    error = (have - wanted).norm() / wanted.norm()
    assert error <= (0.03 if scales_again else 1e-3)  # a tie may be rounded up or down
    assert (error > 1e-3) == scales_again


@every_way
def test_round_trip_is_of_the_dtype_that_was_loaded(way: Quantization) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64, 64)
    low = Quantization(way.bits, way.quant_type, way.double_quant, "bfloat16")
    have = low.roundtrip(weight)
    assert have.dtype == torch.bfloat16
    assert torch.equal(have, low.roundtrip(weight.bfloat16()))
    assert not torch.equal(have.float(), way.roundtrip(weight))


def test_values_that_nothing_implements_are_refused() -> None:
    with pytest.raises(UserError, match="bits is 3; use 4, 8, or 16"):
        Quantization(3)
    with pytest.raises(UserError, match="quant_type is 'int4'; use nf4 or fp4"):
        Quantization(4, "int4")


def test_it_is_kept_beside_the_adapter(tmp_path: Path) -> None:
    assert Quantization.load(tmp_path) is None
    for way in WAYS.values():
        way.save(tmp_path)
        assert Quantization.load(tmp_path) == way
    assert json.loads((tmp_path / "base_quantization.json").read_text())["bits"] == 8


# ---- what is in memory ----


@every_way
def test_the_experts_are_really_small(base: Path, way: Quantization) -> None:
    model = load(base, way)
    [moe] = [m for m in model.modules() if isinstance(m, DeepseekExperts)]
    numbers = sum(full_shape(p).numel() for p in moe.parameters())
    assert numbers == 8 * 3 * 64 * 64
    for stack in stacks(model):
        assert stack.element_size() == 1
        assert stack.numel() * 8 == full_shape(stack).numel() * way.bits
    assert stored_bytes(moe) / numbers <= (0.6 if way.bits == 4 else 1.1)
    assert stored_bytes(moe) > sum(p.numel() for p in moe.parameters())  # the scales count


def test_scales_quantised_again_take_less(base: Path) -> None:
    once, twice = (stored_bytes(load(base, WAYS[name])) for name in ("nf4", "nf4-double"))
    assert twice < once


@every_way
def test_router_norms_embedding_and_head_stay_as_loaded(base: Path, way: Quantization) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        low = Quantization(way.bits, way.quant_type, way.double_quant, str(dtype)[6:])
        plain = dict(load(base, dtype=dtype).named_parameters())
        left_alone = set()
        for name, parameter in load(base, low, dtype=dtype).named_parameters():
            if isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params):
                continue
            left_alone.add(name)
            assert parameter.dtype == dtype, name
            assert torch.equal(parameter, plain[name]), name
        norms = {name for name in plain if "norm" in name}
        others = {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"}
        assert left_alone == norms | others


@pytest.mark.parametrize("wrong", ["missing", "surplus", "shape"])
def test_wrong_tensors_are_named(base: Path, tmp_path: Path, wrong: str) -> None:
    shutil.copy(base / "config.json", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = load_file(base / file.name)
    if wrong == "missing":
        del tensors[name]
    else:
        other = name if wrong == "shape" else "model.odd.weight"
        tensors[other] = torch.ones(64, 72)
    save_file(tensors, file, metadata={"format": "pt"})
    said = {"missing": f"{name} is missing", "surplus": "model.odd.weight is not of this model"}
    with pytest.raises(ValueError, match=said.get(wrong, f"{name} has shape")):
        load(tmp_path, WAYS["nf4-double"])


def test_modules_to_save_are_left_alone(base: Path) -> None:
    within = ("self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.experts")
    config = WAYS["nf4"].config([f"model.layers.1.{name}" for name in within])
    model = DeepseekForCausalLM.from_pretrained(base, quantization_config=config)
    layer = model.model.layers[1]
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert type(layer.mlp.shared_experts.up_proj) is nn.Linear
    assert type(layer.self_attn.q_proj) is not nn.Linear
    assert layer.mlp.experts.gate_up_proj.dtype == torch.float32


@every_way
def test_parameter_table_counts_full_shapes(base: Path, way: Quantization) -> None:
    table = parameter_table(load(base, way))
    assert [row[:2] for row in table] == [row[:2] for row in parameter_table(load(base))]
    adapters = [parameter_table(add_random_adapters(load(base, one))) for one in (way, None)]
    assert adapters[0] == adapters[1]


# ---- what it computes ----


WIDTHS = {  # none a multiple of 64, which a scale is for, and 80 none of 32 either
    "48-80-96": {"hidden_size": 48, "moe_intermediate_size": 80, "intermediate_size": 96},
    "80-96-48": {"hidden_size": 80, "moe_intermediate_size": 96, "intermediate_size": 48},
    "96-48-80": {"hidden_size": 96, "moe_intermediate_size": 48, "intermediate_size": 80},
}


@pytest.fixture(scope="module", params=WIDTHS.values(), ids=WIDTHS)
def odd_base(
    request: pytest.FixtureRequest,
    tiny_model: MakeModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    tiny_model(**(WIDE | request.param)).save_pretrained(folder)
    return folder


@every_four
def test_every_width_computes_what_is_stored(odd_base: Path, way: Quantization) -> None:
    """In training and in evaluation, forwards and backwards."""
    model, plain = load(odd_base, way), load(odd_base)
    of_plain = dict(plain.named_parameters())
    quantized = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, bnb.nn.Params4bit):
                of_plain[name].copy_(as_stored(parameter))
                quantized += 1
    assert quantized == 2 * 4 + 3 + 3 + 2
    models = [add_random_adapters(one) for one in (model, plain)]
    for mode in (False, True, False):
        logits = [one.train(mode)(IDS, labels=IDS, use_cache=False) for one in models]
        torch.testing.assert_close(logits[0].logits, logits[1].logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        have, want = (one(IDS, use_cache=False).logits for one in models)
    torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)
    for out in logits:
        out.loss.backward()
    for (name, have), want in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        if "lora_" in name:
            scale = max(1e-3, want.grad.abs().max().item())
            assert (have.grad - want.grad).abs().max() <= 1e-3 * scale, name


def stored_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights, and of the scales of those that are quantised."""
    parts = {}
    for name, parameter in model.named_parameters():
        parts[name] = parameter.detach().as_subclass(torch.Tensor).clone()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            parts[f"{name}.scales"] = state.absmax.clone()
            if state.nested:
                parts[f"{name}.scales of scales"] = state.state2.absmax.clone()
    return parts


@every_way
def test_an_evaluation_leaves_every_bit_of_the_base(base: Path, way: Quantization) -> None:
    """bitsandbytes' own 4-bit layer packs its weights anew on some CPUs, and rounds the scales."""
    model = load(base, way).train()
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {type(one) for one in linears} <= {Linear4bit}
    assert len(linears) == (2 * 4 + 3 + 3 if way.bits == 4 else 0)
    before = stored_parts(model)
    with torch.no_grad():
        logits = [model.train(mode)(IDS, use_cache=False).logits for mode in (True, False, True)]
    after = stored_parts(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(logits[2], logits[0])
    if way.bits == 4:  # in evaluation, bitsandbytes' 8-bit layer computes in another dtype
        assert torch.equal(logits[1], logits[0])


def test_8_bits_train_close_to_their_round_trip(base: Path) -> None:
    """Not closer, because bitsandbytes rounds the inputs of linears to 8 bits, too."""
    found = []
    for model in (load(base, WAYS["8"]), roundtripped(base, WAYS["8"])):
        model = add_random_adapters(model).train()
        out = model(IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        assert len(grads) == 2 * (2 * 4 + 3 + 3 + 2)
        found.append((out.logits.detach(), torch.cat(grads)))
    (logits, grad), (wanted, wanted_grad) = found
    assert (logits - wanted).norm() < 0.1 * wanted.norm()
    assert torch.cosine_similarity(grad, wanted_grad, dim=0) > 0.9


@every_way
def test_experts_alone_are_exactly_those_of_the_round_trip(base: Path, way: Quantization) -> None:
    torch.manual_seed(2)
    index, shares = torch.tensor([[0, 3], [3, 5], [7, 0]]), torch.rand(3, 2)
    hidden, probe = torch.randn(3, 64), torch.randn(3, 64)
    found = []
    for model in (load(base, way), roundtripped(base, way)):
        x = hidden.clone().requires_grad_()
        moe = model.eval().model.layers[1].mlp.experts.requires_grad_(False)
        out = moe(x, index, shares)
        (out * probe).sum().backward()
        found.append((out.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def large_floats() -> set[int]:
    some = (x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))
    return {id(x) for x in some if x.is_floating_point() and x.numel() >= STACK}


@pytest.mark.parametrize("way", [None, *WAYS.values()], ids=["bf16", *WAYS])
def test_nothing_dequantised_is_kept_for_the_backward_pass(
    base: Path, way: Quantization | None
) -> None:
    """Nor are weights copied that are not quantised."""
    dtype = torch.float32 if way else torch.bfloat16
    model = add_random_adapters(load(base, way, dtype=dtype)).train()
    saved: list[torch.Tensor] = []
    before = large_floats()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks:
        loss = model(IDS, labels=IDS, use_cache=False).loss
    assert len(saved) > 100
    assert not large_floats() - before
    if way:
        assert not [x.shape for x in saved if x.is_floating_point() and x.numel() >= STACK]
    loss.backward()
    assert not large_floats() - before


def test_every_width_can_be_merged_after_training(odd_base: Path, tmp_path: Path) -> None:
    """Beside a module that was left as it is and saved whole."""
    way = WAYS["nf4-double"]
    config = way.config([f"model.layers.1.mlp.shared_experts.{name}" for name in LINEARS])
    model = load(odd_base, quantization_config=config)
    model = add_random_adapters(model, modules_to_save=["shared_experts"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    with torch.no_grad():
        wanted = model.eval()(IDS, use_cache=False).logits
    assert (wanted - before).abs().max() > 0.05
    model.save_pretrained(tmp_path / "adapter")
    way.save(tmp_path / "adapter")

    load(odd_base).save_pretrained(tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = dict(merged_tensors(odd_base, tmp_path / "adapter"))
    assert tensors.keys() == load_file(file).keys()
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    with torch.no_grad():
        found = load(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_deepspeed_still_marks_the_parameters_that_it_divides() -> None:
    """By the attributes that `is_divided` and `full_shape` read."""
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent
    source = (folder / "runtime" / "zero" / "partition_parameters.py").read_text(encoding="utf-8")
    assert "param.ds_id = " in source and "param.ds_shape = param.shape" in source
