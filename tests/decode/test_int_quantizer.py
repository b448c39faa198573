"""Weights in int8 and int4: the layout that kernels read, how near they are, and that a model has
them and computes what the dequantised ones would."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from text_fixtures import BUNDLED, ROOT
from torch import nn
from torch.nn import functional as F

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode import int_quantizer
from deepseek_moe.decode import load as load_module
from deepseek_moe.decode.int_quantizer import BITS, IntConfig, quantize, quantized_bytes
from deepseek_moe.decode.load import load as load_checkpoint
from deepseek_moe.decode.quantized import QuantizedExperts, QuantizedLinear
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.int_weights import dequantize
from deepseek_moe.memory import free_memory

MakeModel = Callable[..., DeepseekForCausalLM]
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91, 33], [0, 3, 62, 9, 9, 31, 7, 1]])
# 192 and 160 columns: a row of groups, and one whose last group is smaller.
WIDE = {"hidden_size": 192, "intermediate_size": 160, "num_hidden_layers": 2}
WIDE |= {"moe_intermediate_size": 16, "initializer_range": 0.1, "vocab_size": 1024}
every_width = pytest.mark.parametrize("bits", [8, 4])


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (
            4,
            [-8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1, 0],
            [0x76543210, 0x89ABCDEF - 2**32],  # columns 0, 2, 4, ... and 1, 3, 5, ...
        ),
        (8, [-128, 127, -1, 0, 1, 2, 3, 4], [0x83817F00 - 2**32, 0x848280FF - 2**32]),
    ],
)
def test_layout(bits, values, words):
    weight = torch.tensor([values], dtype=torch.float32)
    stored, scale = quantize(weight * 0.5, bits)
    assert stored.dtype == torch.int32
    assert stored.tolist() == [words]
    assert scale.tolist() == [[0.5]]
    assert torch.equal(dequantize(stored, scale, bits, torch.float32), weight * 0.5)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.0065), (4, 0.0935)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_nearest_that_the_stored_scale_has(bits, most, dtype):
    """The error in 4 bits would be 0.095 without a choice of scales, 0.108 with 15 levels."""
    torch.manual_seed(0)
    weight = (torch.randn(6, 160) * 0.02).to(dtype)
    words, scale = quantize(weight, bits)
    have = dequantize(words, scale, bits, dtype)
    assert scale.dtype == have.dtype == dtype
    assert words.shape == (6, 160 * bits // 32)
    assert scale.shape == (6, 3)  # two groups of 64 and a smaller one
    # 64 values share a scale: those of 2 * bits words side by side.
    group = [(column % words.shape[1]) // (2 * bits) for column in range(160)]
    levels = scale.float()[:, group, None] * torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    nearest = (levels - weight.float().unsqueeze(-1)).abs().argmin(dim=-1, keepdim=True)
    assert torch.equal(have, levels.gather(-1, nearest).squeeze(-1).to(dtype))
    weight = (torch.randn(64, 2048) * 0.02).to(dtype)
    have = dequantize(*quantize(weight, bits), bits, torch.float32)
    assert most / 2 < (have - weight.float()).norm() / weight.float().norm() < most


@every_width
def test_zeros_and_the_value_of_largest_magnitude_are_kept(bits):
    """In either direction."""
    end = 2 ** (bits - 1)
    weight = torch.zeros(3, 64)
    weight[0, 5], weight[1, 9] = -3.0, 3.0
    words, scale = quantize(weight, bits)
    assert torch.equal(dequantize(words, scale, bits, torch.float32), weight)
    assert scale.tolist() == [[3 / end], [-3 / end], [0]]


@every_width
def test_a_stack_in_pieces_is_each_of_its_matrices(bits):
    """Pieces of 5 rows at most, so that little memory is needed at once."""
    stack = torch.randn(3, 7, 96).transpose(0, 1)
    each = [quantize(matrix, bits) for matrix in stack]
    rows = patch.object(int_quantizer, "_quantize_rows", wraps=int_quantizer._quantize_rows)
    with patch.object(int_quantizer, "NUMBERS_AT_ONCE", 500), rows as watched:
        words, scale = quantize(stack, bits)
    assert {len(call.args[0]) for call in watched.call_args_list} == {5, 1}
    assert torch.equal(words, torch.stack([one for one, _ in each]))
    assert torch.equal(scale, torch.stack([one for _, one in each]))


@pytest.fixture
def base(tiny_model: MakeModel, tmp_path: Path) -> Path:
    tiny_model(**WIDE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path, bits: int | None = None, **options: Any) -> DeepseekForCausalLM:
    if bits is not None:
        options["quantization_config"] = IntConfig(bits)
    options = {"dtype": torch.float32, "experts_implementation": "eager"} | options
    return DeepseekForCausalLM.from_pretrained(base, **options)


@pytest.mark.parametrize(
    ("bits", "dtype", "changes"),
    [
        (4, torch.bfloat16, {}),
        (8, torch.bfloat16, {}),
        (4, torch.float32, {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
@torch.no_grad()
def test_model_is_the_one_with_the_dequantised_weights(tiny_model, tmp_path, bits, dtype, changes):
    tiny = tiny_model(**WIDE, **changes)
    for name, parameter in tiny.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    tiny.save_pretrained(tmp_path)
    model = load(tmp_path, bits, dtype=dtype)
    have = model(IDS).logits
    assert have.dtype == dtype
    twin = load(tmp_path, dtype=dtype)
    original = twin(IDS).logits
    for name, weight in twin.named_parameters():
        if "_proj" in name and weight.dim() > 1:
            weight.copy_(dequantize(*quantize(weight, bits), bits, dtype))
    if changes:  # a tied head stays the embedding
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, tiny.lm_head.weight)
    else:
        head = twin.lm_head.weight
        head.copy_(dequantize(*quantize(head, 8), 8, dtype))
    want = twin(IDS).logits
    torch.testing.assert_close(have, want, rtol=0, atol=1e-5)
    assert (want - original).abs().max() > (0.3 if bits == 4 else 0.02)
    size = sum(parameter.nbytes for parameter in model.parameters())
    claimed = quantized_bytes(tiny.num_parameters(), model.config, bits, dtype)
    assert claimed == pytest.approx(size, rel=0.03)
    # The other ways through the experts, which cannot read words, do not apply.
    grouped = load(tmp_path, bits, dtype=dtype, experts_implementation="grouped_mm")
    assert torch.equal(grouped(IDS).logits, have)


@every_width
def test_which_weights_are_quantised_and_not_saved(base, bits, tmp_path):
    model, before = load(base, bits), dict(load(base).named_parameters())
    modules = dict(model.named_modules())
    assert not [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    assert isinstance(modules["lm_head"], QuantizedLinear)
    assert isinstance(modules["model.layers.1.mlp.experts"], QuantizedExperts)
    down = modules["model.layers.0.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (160, 192)
    now = dict(model.named_parameters())
    scales = {name for name in now if name.endswith("_scale")}
    assert now.keys() - scales == before.keys()
    quantized = {name.removesuffix("_scale") for name in scales}
    for name, old in before.items():
        new = now[name]
        # transformers asks for this size while the parameters have their full shapes.
        size = model.hf_quantizer.param_element_size(model, name, old)
        if name in quantized:
            own_bits = 8 if name == "lm_head.weight" else bits
            assert (size, new.dtype) == (own_bits / 8, torch.int32), name
            assert new.numel() == old.numel() * own_bits // 32, name
        else:
            assert size == 4 and torch.equal(new, old), name
    assert {name.split(".")[-2] for name in before.keys() - quantized} == {
        "embed_tokens", "norm", "gate", "input_layernorm", "post_attention_layernorm"
    }  # fmt: skip
    assert not any(now[name].requires_grad for name in quantized | scales)
    with pytest.raises(UserError, match=r"cannot be saved; save the original[^\n]*$"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_each_weight_is_quantised_before_the_next_is_read(base):
    read: list[weakref.ref] = []
    alive: list[int] = []

    def watched(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        alive.append(sum(ref() is not None for ref in read))
        read.append(weakref.ref(weight))
        return quantize(weight, bits)

    one = patch.object(int_quantizer, "NUMBERS_AT_ONCE", 1)
    with patch.object(int_quantizer, "quantize", watched), one:
        load(base, 4)
    experts = 3 * 8  # the gate, up and down matrices of the only layer that has them
    assert len(alive) == 2 * 4 + 3 + 3 + experts + 1
    assert max(alive) <= 1  # the one before, until its name is taken by the next


def test_columns_that_fill_no_word(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="6 columns, but int8 needs a multiple of 4"):
        quantize(torch.ones(2, 6), 8)
    tiny_model(moe_intermediate_size=12).save_pretrained(tmp_path)
    load(tmp_path, 8)
    with pytest.raises(ValueError, match="12 columns, but int4 needs a multiple of 8"):
        load(tmp_path, 4)


def test_memory_that_suffices_when_quantised():
    """Bytes as bf16 15.1 M, int8 8.6 M, int4 5.6 M; as fp32 with int4 7.4 M, alone 30 M."""

    def dtype(free: int, quantization: str | None) -> torch.dtype:
        with patch.object(load_module, "free_memory", return_value=free):
            return load_checkpoint(str(BUNDLED), device="cpu", quantization=quantization)[0].dtype

    with pytest.raises(UserError, match=r"GB as bfloat16.* use .*--quantization int4"):
        dtype(8_000_000, None)
    with pytest.raises(UserError, match="GB as int8"):
        dtype(8_000_000, "int8")
    assert dtype(20_000_000, None) == torch.bfloat16
    assert dtype(7_000_000, "int4") == torch.bfloat16
    assert dtype(8_000_000, "int4") == torch.float32
    with pytest.raises(UserError, match="GB as int4"):
        dtype(5_000_000, "int4")


@torch.inference_mode()
def test_loss_of_the_bundled_model() -> None:
    """Nats a token (int4: 0.018 with a head of 4 bits). On more of its own kind of text int8 costs
    0.0004 and int4 0.018."""
    rows = json.loads((ROOT / "examples/data/sample.json").read_text(encoding="utf-8"))
    text = "\n\n".join(row["output"] for row in rows)

    def loss(quantization: str | None) -> float:
        model, tokenizer = load_checkpoint(str(BUNDLED), "bfloat16", "cpu", quantization)
        ids = torch.tensor([tokenizer(text, verbose=False).input_ids[:1024]])
        logits = model(ids).logits[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).item()

    original = loss(None)
    for quantization, most in (("int8", 0.003), ("int4", 0.012)):
        assert 1e-5 < abs(loss(quantization) - original) < most, quantization


@pytest.mark.parametrize(
    ("free", "picked"), [(19.9e6, None), (19.8e6, "int8"), (13.2e6, "int4"), (5.7e6, "int4")]
)
def test_auto_picks_the_best_that_fits(free, picked, capsys):
    """The weights take the bytes above, and the cache of the whole context of 1,024 tokens 4.7 M,
    which need not fit if nothing smaller is left."""
    with patch.multiple(load_module, free_memory=lambda _: free, WORK=0):
        model, _ = load_checkpoint(str(BUNDLED), "bfloat16", "cpu", "auto")
    quantized = [module.bits for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert set(quantized) == ({BITS[picked]} if picked else set())
    said = capsys.readouterr()
    assert said.out == "" and f"quantization: {picked or 'none, bfloat16'}, " in said.err


@pytest.mark.parametrize(
    ("fraction", "free"), [(1.0, 30 + 5), (0.5, 50 - 15), (0.2, 20 - 15), (0.9, 30 + 5)]
)
def test_free_memory_of_a_gpu(fraction, free):
    """By what the GPU has free and PyTorch holds unused, and by PyTorch's cap."""
    cuda = patch.multiple(
        torch.cuda,
        mem_get_info=lambda _: (30, 100),
        memory_allocated=lambda _: 15,
        memory_reserved=lambda _: 20,
        get_per_process_memory_fraction=lambda _: fraction,
    )
    with cuda:
        assert free_memory(torch.device("cuda", 0)) == free
