"""The engine on the twins of its kernels gives the ids of the plain way; so do the decoder's whole
steps with the kernels themselves, in Triton's interpreter."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from text_fixtures import BUNDLED, bundled_model

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode import decoder, engine
from deepseek_moe.decode.decoder import FEW, Decoder, StaticCache, joined_view
from deepseek_moe.decode.engine import Engine, size_for
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.int_quantizer import IntConfig
from deepseek_moe.decode.load import load
from deepseek_moe.decode.sampling import Sampler, greedy
from deepseek_moe.decode.supported import fits_kernels
from deepseek_moe.errors import UserError
from deepseek_moe.kernels.decode import torch_ops

MakeModel = Callable[..., DeepseekForCausalLM]


def with_engine(model: DeepseekForCausalLM, chunk: int = engine.CHUNK) -> Generator:
    """A generator whose engine runs step by step on the CPU, with the plain twins."""
    return Generator(model, engine=Engine(model, chunk, torch_ops))


def plain(model: DeepseekForCausalLM) -> Generator:
    return Generator(model, fast=False)


def test_the_way_of_many_equals_the_way_of_few(
    prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = with_engine(bundled_model()).generate(prompts, 12)
    monkeypatch.setattr(decoder, "FEW", 0)
    assert with_engine(bundled_model()).generate(prompts, 12) == few


@pytest.mark.parametrize(("chunk", "most"), [(1, 1), (7, 7), (20, 16)])
def test_prompts_in_chunks_equal_prompts_at_once(
    prompts: list[list[int]], chunk: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of up to `chunk` tokens: pieces of a long prompt, or several whole ones that are short."""
    model, sizes, prefill = bundled_model(), [], Decoder.prefill

    def spy(self: Decoder, ids_T: torch.Tensor, *args: object) -> torch.Tensor:
        sizes.append(len(ids_T))
        return prefill(self, ids_T, *args)

    at_once = with_engine(model).generate(prompts, 8)
    monkeypatch.setattr(Decoder, "prefill", spy)
    assert with_engine(model, chunk).generate(prompts, 8) == at_once
    assert sum(sizes) == sum(map(len, prompts))
    assert max(sizes) == most


def test_sequences_that_end_leave_the_batch(
    prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plain(bundled_model()).generate(prompts, 16)
    stops = {whole[1][3], whole[0][9]}
    sizes: list[int] = []
    step = Engine.step

    def spy(self: Engine, size: int, sample: Sampler) -> None:
        sizes.append(size)
        step(self, size, sample)

    monkeypatch.setattr(Engine, "step", spy)
    made = with_engine(bundled_model()).generate(prompts, 16, stop_ids=stops)
    assert made == plain(bundled_model()).generate(prompts, 16, stop_ids=stops)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_more_prompts_than_the_way_of_few_takes(prompts: list[list[int]]) -> None:
    many = (prompts * FEW)[: FEW + 4]
    few = with_engine(bundled_model()).generate(prompts, 6)
    assert with_engine(bundled_model()).generate(many, 6) == (few * FEW)[: FEW + 4]


def test_the_cache_grows_and_is_used_again(prompts: list[list[int]]) -> None:
    generator = with_engine(bundled_model())
    generator.generate(prompts[:1], 4)
    cache = generator.engine.cache
    assert generator.generate(prompts[1:2], 3) == plain(bundled_model()).generate(prompts[1:2], 3)
    assert generator.engine.cache is cache
    long = generator.generate(prompts[:1], engine.CACHE_BLOCK)
    assert generator.engine.cache is not cache
    assert long == plain(bundled_model()).generate(prompts[:1], engine.CACHE_BLOCK)


def test_quantised_weights(prompts: list[list[int]]) -> None:
    model, _ = load(str(BUNDLED), device="cpu", quantization="int4")
    expected = plain(model).generate(prompts, 12)
    assert with_engine(model).generate(prompts, 12) == expected
    assert plain(model).generate(prompts, 12) == expected  # its weights are views now


def test_the_model_is_as_before(prompts: list[list[int]]) -> None:
    """Though parameters that are read together have become views of one tensor."""
    model = DeepseekForCausalLM.from_pretrained(BUNDLED)
    ids = torch.tensor([prompts[2]])
    before = model(ids).logits
    state = {name: x.clone() for name, x in model.state_dict().items()}
    Engine(model, ops=torch_ops)
    assert torch.equal(model(ids).logits, before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    for name, x in after.items():
        assert torch.equal(x, state[name]), name


def test_a_stream_that_was_ended_leaves_the_second_alone(prompts: list[list[int]]) -> None:
    """Also if one of its own sequences has just ended."""
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


def test_looks_one_step_ahead_and_no_further(prompts: list[list[int]]) -> None:
    calls: list[int] = []

    def counting(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        return greedy(logits, seen)

    stream = with_engine(bundled_model()).stream(prompts, 4, counting)
    made = [len(calls) for _ in stream]
    assert made == [1, 3, 4, 4]  # the first id at once; then a step is always under way


def test_tensors_in_one_memory_are_one_only_if_they_follow_each_other() -> None:
    whole = torch.arange(24.0).view(6, 4)
    a, b, c = whole.split([1, 2, 3])
    assert torch.equal(joined_view([a, b, c]), whole)
    assert joined_view([a, b, c]).data_ptr() == whole.data_ptr()
    assert torch.equal(joined_view([b, c]), whole[1:])
    for parts in ([b, a], [a, c], [a, b.clone()], [whole[:, :2], whole[:, 2:]], [a, b.view(1, 8)],
                  [whole[::2], whole[1::2]], [a, b.view(torch.int32)]):  # fmt: skip
        assert joined_view(parts) is None


def test_sizes() -> None:
    assert [size_for(n) for n in (1, 2, 3, 9, 65, 256, 257, 500)] == [
        1, 2, 4, 16, 96, 256, 384, 512,
    ]  # fmt: skip


def test_the_engine_is_refused_where_it_cannot_run() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="NVIDIA"):
        Generator(bundled_model(), fast=True)


# ---- the decoder with the kernels ----


def few(decoder: Decoder, cache: StaticCache) -> torch.Tensor:
    return one_step(decoder, cache, 3)


def many(decoder: Decoder, cache: StaticCache) -> torch.Tensor:
    return one_step(decoder, cache, FEW + 3)


def one_step(decoder: Decoder, cache: StaticCache, rows: int) -> torch.Tensor:
    """Logits of the rows that hold a token, which are not all, in slots of another order."""
    ids_T = torch.arange(rows) * 7 % 96
    slot_T = torch.arange(rows, dtype=torch.int32).flip(0)
    position_T = torch.arange(rows, dtype=torch.int32) * 11 % 40
    position_T[1::5] = -1
    for slot, position in zip(slot_T.tolist(), position_T.tolist(), strict=True):
        cache.keys[:, slot, :, : max(position, 0)].normal_()
        cache.values[:, slot, :, : max(position, 0)].normal_()
    return decoder.step(ids_T, position_T, slot_T, cache)[position_T >= 0]


def prompts_in_chunks(decoder: Decoder, cache: StaticCache) -> torch.Tensor:
    """Two prompts in one chunk, then two chunks more of one of them."""
    chunks = [[(3, 0, 5), (0, 0, 9)], [(0, 9, 28)], [(0, 28, 30)]]
    logits = []
    for pieces in chunks:  # (slot, start, end)
        slot_T = torch.cat([torch.full((end - start,), slot) for slot, start, end in pieces])
        position_T = torch.cat([torch.arange(start, end) for _, start, end in pieces])
        ids_T = (position_T * 7 + slot_T * 5) % 96
        ends = torch.tensor([end - start for _, start, end in pieces]).cumsum(0).tolist()
        logits.append(decoder.prefill(ids_T.int(), position_T.int(), slot_T.int(), cache, ends))
    return torch.cat(logits)


@pytest.fixture(scope="module", params=[16, 4], ids=["16 bits", "int4"])
def model_for_kernels(
    request: pytest.FixtureRequest, tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> DeepseekForCausalLM:
    """Two heads with one pair of keys and values, widths that fill no tile."""
    sizes = {"hidden_size": 64, "intermediate_size": 72}
    sizes |= {"moe_intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(**sizes)
    if request.param == 16:
        return model
    folder: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return DeepseekForCausalLM.from_pretrained(folder, quantization_config=IntConfig(request.param))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does it on a GPU")
@pytest.mark.parametrize("way", [few, many, prompts_in_chunks])
@torch.inference_mode()
def test_whole_steps_with_kernels(
    model_for_kernels: DeepseekForCausalLM,
    way: Callable[[Decoder, StaticCache], torch.Tensor],
) -> None:
    """The same logits and the same cache, of which nothing is read that was not written."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from deepseek_moe.kernels.decode import triton_ops as fused

    kernels = SimpleNamespace(**vars(fused) | {"dense": torch_ops.dense})  # torch.mm, on GPUs only
    made = []
    for ops in (kernels, torch_ops):
        torch.manual_seed(0)
        cache = StaticCache(model_for_kernels, slots=FEW + 4, capacity=64)
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        decoder = Decoder(model_for_kernels, ops)
        made.append((way(decoder, cache), cache.keys, cache.values))
        assert not decoder.counters.any()
    (logits, *caches), (twin_logits, *twin_caches) = made
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, twin_logits, atol=1e-4, rtol=1e-4)
    for part, twin_part in zip(caches, twin_caches, strict=True):
        torch.testing.assert_close(part, twin_part, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_which_sizes_the_kernels_take(tiny_model: MakeModel) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2}
    assert fits_kernels(tiny_model(**sizes))
    for change in (
        {"n_shared_experts": None},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 4},
    ):
        assert not fits_kernels(tiny_model(**sizes | change))


def test_one_expert_is_not_normed(tiny_model: Callable[..., DeepseekForCausalLM]) -> None:
    model = tiny_model(num_experts_per_tok=1, norm_topk_prob=True).eval()
    prompts = [[5, 6, 7], [9]]
    assert with_engine(model).generate(prompts, 8) == plain(model).generate(prompts, 8)


def test_a_start_that_fails_ends_the_stream_before(prompts: list[list[int]]) -> None:
    generator = with_engine(bundled_model())
    first = generator.stream(prompts, 5)
    next(first)

    def fails(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        next(generator.stream(prompts[::-1], 5, fails))
    with pytest.raises(UserError, match="another generation"):
        next(first)


def test_a_cast_model_is_taken_anew(prompts: list[list[int]]) -> None:
    """What else may become of a model, test_supported.py tries."""
    model = DeepseekForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    generator = with_engine(model)
    generator.generate(prompts, 2)
    model.bfloat16()
    made = generator.generate(prompts, 12)
    assert generator.engine.cache.keys.dtype == torch.bfloat16
    assert made == with_engine(model).generate(prompts, 12)


def test_nothing_is_kept_of_a_batch_that_is_over(prompts: list[list[int]]) -> None:
    generator = with_engine(bundled_model())
    generator.generate(prompts, 3)
    assert generator.engine.batch is None
    left = generator.stream(prompts, 5)
    next(left)
    assert generator.engine.batch is not None
    left.close()
    assert generator.engine.batch is None
