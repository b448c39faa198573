"""Attention in packed rows without a mask, and with one where that is needed."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from deepseek_moe.model.modeling_deepseek import CACHE
from deepseek_moe.training.compute import varlen_attention as attention

IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])


def packed(device: str = "cpu") -> dict[str, Any]:
    """Two rows of 12 as the collator makes them: 5 + 7 tokens, and 4 with padding."""
    torch.manual_seed(1)
    lengths = torch.tensor([5, 7, 4, 8])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 12)
    batch = {"input_ids": torch.randint(2, 96, (2, 12)).to(device)}
    batch |= {"position_ids": positions.to(device), "max_length_q": 8, "max_length_k": 8}
    return batch | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}


@torch.no_grad()
def test_varlen_without_examples_in_a_row_is_sdpa(tiny_model):
    """So evaluating and generating with a model that trained works, also with padding."""
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    want, have = (tiny_model(attn_implementation=name) for name in ("sdpa", attention.VARLEN))
    assert have.config._attn_implementation == attention.VARLEN
    assert torch.equal(have(IDS).logits, want(IDS).logits)
    assert torch.equal(have(IDS, attention_mask=mask).logits, want(IDS, attention_mask=mask).logits)
    assert not torch.equal(want(IDS, attention_mask=mask).logits, want(IDS).logits)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(have.generate(IDS, **options), want.generate(IDS, **options))
    cache = have(IDS[:, :3], use_cache=True)[CACHE]
    later = have(IDS[:, 3:], cache=cache).logits
    torch.testing.assert_close(later, want(IDS).logits[:, 3:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("heads", [None, 2])
def test_varlen_gets_the_examples_and_makes_no_mask(heads, tiny_model, monkeypatch):
    """The kernel replaced by loops over the examples; what reaches it must be whole rows."""

    def loops(q: Any, k: Any, v: Any, ends: Any, _: Any, longest: int, *args: Any, **options: Any):
        assert options["window_size"] == (-1, 0)
        lengths = ends.diff().tolist()
        assert longest == max(lengths)
        outs = []
        for example in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            heads_first = (x.transpose(0, 1)[None] for x in example)
            out = F.scaled_dot_product_attention(
                *heads_first, is_causal=True, scale=options["scale"]
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    want = tiny_model(num_key_value_heads=heads)(**packed(), use_cache=False).logits
    monkeypatch.setattr(attention, "varlen_attn", loops)
    monkeypatch.setattr(attention, "sdpa_mask", lambda **_: pytest.fail("a mask was made"))
    model = tiny_model(attn_implementation=attention.VARLEN, num_key_value_heads=heads)
    have = model(**packed(), use_cache=False).logits
    torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention needs an NVIDIA GPU")
def test_varlen_equals_the_block_mask(tiny_model):
    batch, found = packed("cuda"), []
    ways = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), (attention.VARLEN, torch.bfloat16)]
    for name, dtype in ways:
        # Dense, for bf16 would route some tokens elsewhere; heads of 16, which kernels want.
        changes = {"hidden_size": 64, "n_routed_experts": None, "initializer_range": 0.1}
        model = tiny_model(attn_implementation=name, **changes).to("cuda", dtype).train()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    exact, plain, varlen = found
    rounding = (plain - exact).norm() / exact.norm()
    assert (varlen - exact).norm() / exact.norm() < 2 * rounding + 1e-3
