"""The engine on the twins of its kernels gives the ids of the plain way; so do the decoder's whole
steps with the kernels themselves, in Triton's interpreter."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from gpu_fixtures import with_engine
from text_fixtures import bundled_model

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode import engine, reading
from deepseek_moe.decode.decoder import FEW, Decoder, StaticCache, joined_view
from deepseek_moe.decode.engine import Engine, size_for
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.int_quantizer import IntConfig
from deepseek_moe.decode.supported import fits_kernels
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.decode import torch_ops


def test_more_prompts_than_the_way_of_few_takes(prompts):
    generator = with_engine(bundled_model())
    few = generator.generate(prompts, 6)
    assert generator.generate((prompts * FEW)[: FEW + 4], 6) == (few * FEW)[: FEW + 4]


@pytest.mark.parametrize(("chunk", "most"), [(1, 1), (7, 7), (20, 16)])
def test_prompts_in_chunks_equal_prompts_at_once(prompts, chunk, most):
    """Of up to `chunk` tokens: pieces of a long prompt, or several whole ones that are short."""
    model = bundled_model()
    generator = with_engine(model, chunk)
    decoder = generator.engine.decoder
    with patch.object(decoder, "prefill", wraps=decoder.prefill) as prefill:
        made = generator.generate(prompts, 8)
    assert made == with_engine(model).generate(prompts, 8)
    sizes = [len(call.args[0]) for call in prefill.call_args_list]
    assert sum(sizes) == sum(map(len, prompts))
    assert max(sizes) == most


def test_the_cache_grows_and_is_used_again(prompts, monkeypatch):
    """It takes no more than the texts that are there, and twice their room at a time."""
    monkeypatch.setattr(engine, "CACHE_BLOCK", 16)
    generator, new = with_engine(bundled_model()), 4 * engine.CACHE_BLOCK
    whole = generator.generate(prompts, new)
    assert whole == Generator(bundled_model(), fast=False).generate(prompts, new)
    growing = with_engine(bundled_model())
    capacities = []
    with patch.object(engine, "FIRST_CACHE", 1):
        for number, ids in enumerate(growing.stream(prompts, new)):
            assert ids == [text[number] for text in whole]
            capacities.append(growing.engine.cache.capacity)
        assert growing.generate(prompts, new) == whole
    longest = max(map(len, prompts))
    assert list(dict.fromkeys(capacities)) == [32, 64, 80]
    for made, capacity in enumerate(capacities, 1):
        assert longest + made - 1 <= capacity and capacity <= max(32, 2 * (longest + made + 2))
    cache = growing.engine.cache
    assert growing.generate(prompts[1:2], 3) == [whole[1][:3]]
    assert growing.engine.cache is cache
    with patch.object(StaticCache, "grow", side_effect=torch.OutOfMemoryError):
        growing.engine.cache = None
        with pytest.raises(torch.OutOfMemoryError), patch.object(engine, "FIRST_CACHE", 1):
            growing.generate(prompts, new)
    assert growing.generate(prompts, new) == whole


def test_sizes_of_the_cache_and_of_chunks_of_prompts():
    """The cache holds what is asked and no more than the batch can need; chunks fit free memory."""
    for slots, positions, most, capacity in (
        (1, 5, 4096, 1024),
        (1, 1025, 4096, 2048),
        (1, 2049, 3000, 3008),
        (1, 4096, 4096, 4096),
        (64, 100, 4096, 128),
        (64, 100, 110, 128),
    ):
        assert engine.capacity_for(slots, positions, most) == capacity
    for free, chunk in ((10**9, 1000), (800_000, 1000), (799_999, 500), (360_000, 250), (0, 250)):
        assert reading.chunk_for(1000, 100, free) == chunk


def test_another_generation_ends_the_one_before(prompts):
    """Also if one of its own sequences has just ended, and if the other one fails."""
    generator = with_engine(bundled_model())
    whole = generator.generate(prompts, 6)
    first = generator.stream(prompts, 6, stop_ids={whole[0][0]})
    assert next(first)[0] is None
    second = generator.stream(prompts, 6)
    steps = [next(second)]
    with pytest.raises(UserError, match="another generation has begun"):
        next(first)
    steps += second
    assert [list(ids) for ids in zip(*steps, strict=True)] == whole

    def fails(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    third = generator.stream(prompts, 6)
    next(third)
    with pytest.raises(RuntimeError, match="no"):
        next(generator.stream(prompts, 6, fails))
    with pytest.raises(UserError, match="another generation has begun"):
        next(third)


def test_nothing_is_kept_of_a_batch_that_is_over(prompts):
    generator = with_engine(bundled_model())
    generator.generate(prompts, 3)
    assert generator.engine.batch is None
    left = generator.stream(prompts, 5)
    next(left)
    assert generator.engine.batch is not None
    left.close()
    assert generator.engine.batch is None


def test_tensors_in_one_memory_are_one_only_if_they_follow_each_other():
    whole = torch.arange(24.0).view(6, 4)
    a, b, c = whole.split([1, 2, 3])
    assert torch.equal(joined_view([a, b, c]), whole)
    assert joined_view([a, b, c]).data_ptr() == whole.data_ptr()
    assert torch.equal(joined_view([b, c]), whole[1:])
    for parts in ([b, a], [a, c], [a, b.clone()], [whole[:, :2], whole[:, 2:]], [a, b.view(1, 8)],
                  [whole[::2], whole[1::2]], [a, b.view(torch.int32)]):  # fmt: skip
        assert joined_view(parts) is None


def test_sizes(tiny_config):
    """Of batches, and of models that the kernels take."""
    sizes = {1: 1, 2: 2, 3: 4, 9: 16, 65: 96, 256: 256, 257: 384, 500: 512}
    assert {count: size_for(count) for count in sizes} == sizes
    fields = {"hidden_size": 64, "num_attention_heads": 2}
    assert fits_kernels(tiny_config(**fields))
    for change in ({"num_attention_heads": 4}, {"hidden_size": 96}, {"moe_intermediate_size": 12}):
        assert not fits_kernels(tiny_config(**fields | change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_engine_is_refused_where_it_cannot_run():
    for make in (Engine, lambda model: Generator(model, fast=True)):
        with pytest.raises(UserError, match=r"float32 on cpu.*NVIDIA"):
            make(bundled_model())


def one_step(rows: int, decoder: Decoder, cache: StaticCache) -> torch.Tensor:
    """Logits of the rows that hold a token, which are not all, in slots of another order."""
    ids_T = torch.arange(rows) * 7 % 96
    slot_T = torch.arange(rows, dtype=torch.int32).flip(0)
    position_T = torch.arange(rows, dtype=torch.int32) * 11 % 40
    position_T[1::5] = -1
    for slot, position in zip(slot_T.tolist(), position_T.tolist(), strict=True):
        for keys, values in cache.layers:
            keys[slot, :, : max(position, 0)].normal_()
            values[slot, :, : max(position, 0)].normal_()
    return decoder.step(ids_T, position_T, slot_T, cache)[position_T >= 0]


def prompts_in_chunks(decoder: Decoder, cache: StaticCache) -> torch.Tensor:
    """Two prompts in one chunk, then another chunk of one of them, and then more of both. Some
    tokens are asked for, then the last, then all."""
    chunks = [[(3, 0, 5), (0, 0, 9)], [(0, 9, 28)], [(0, 28, 31), (3, 5, 22)]]  # slot, start, end
    logits = []
    for pieces, rows in zip(chunks, ([2, 4, 13], [18], range(20)), strict=True):
        slot_T = torch.cat([torch.full((end - start,), slot) for slot, start, end in pieces])
        position_T = torch.cat([torch.arange(start, end) for _, start, end in pieces])
        ids_T = (position_T * 7 + slot_T * 5) % 96
        ends = torch.tensor([end - start for _, start, end in pieces]).cumsum(0).tolist()
        places = (position_T.int(), slot_T.int(), cache, ends, [*rows])
        logits.append(decoder.logits(decoder.prefill(ids_T.int(), *places)))
    return torch.cat(logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does it on a GPU")
@pytest.mark.parametrize(
    ("way", "bits"),
    [(partial(one_step, 3), 4), (partial(one_step, FEW + 3), 16), (prompts_in_chunks, 16)],
    ids=["few", "many", "prompts"],
)
@torch.inference_mode()
def test_whole_steps_with_kernels(way, bits, tiny_model, tmp_path):
    """The same logits and the same cache, of which nothing is read that was not written. Two heads
    have one pair of keys and values, and the widths fill no tile."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from deepseek_moe.kernels.decode import triton_ops as fused

    sizes = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 2}
    sizes |= {"moe_intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(**sizes)
    if bits < 16:
        model.save_pretrained(tmp_path)
        model = DeepseekForCausalLM.from_pretrained(tmp_path, quantization_config=IntConfig(bits))
    kernels = SimpleNamespace(**vars(fused) | {"dense": torch_ops.dense})  # torch.mm, on GPUs only
    made = []
    for ops in (kernels, torch_ops):
        torch.manual_seed(0)
        cache = StaticCache(model, slots=FEW + 4, capacity=64)
        parts = [part.fill_(float("nan")) for layer in cache.layers for part in layer]
        decoder = Decoder(model, ops)
        made.append((way(decoder, cache), *parts))
        assert not decoder.counters.any()
    (logits, *caches), (twin_logits, *twin_caches) = made
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, twin_logits, atol=1e-4, rtol=1e-4)
    for part, twin_part in zip(caches, twin_caches, strict=True):
        torch.testing.assert_close(part, twin_part, atol=1e-4, rtol=1e-4, equal_nan=True)
