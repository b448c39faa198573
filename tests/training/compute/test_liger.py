"""Liger's kernels change nothing of what the model computes: in Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finetune_fixtures import liger_in_torch

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU, tests/gpu compares them", allow_module_level=True)

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.training.compute.liger import use_fused_forwards
from deepseek_moe.training.trainable import add_lora

MakeModel = Callable[..., DeepseekForCausalLM]
LINEARS = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])
PARTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, -1, -1]])


@pytest.fixture(autouse=True)
def beyond_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels that round what is no tensor's; tests/gpu calls them, on a GPU."""
    from liger_kernel.transformers import functional

    for name, function in liger_in_torch().items():
        monkeypatch.setattr(functional, name, function)


def run(model: torch.nn.Module, labels: torch.Tensor, **inputs: Any) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=labels, sequence_ids=PARTS, use_cache=False, **inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out, grads


@pytest.mark.parametrize("num_items", [None, 9])
@pytest.mark.parametrize("adapted", [False, True])
def test_loss_and_gradients_stay_the_same(
    adapted: bool, num_items: Any, tiny_model: MakeModel
) -> None:
    torch.manual_seed(1)
    model = tiny_model(experts_implementation="grouped", aux_loss_alpha=0.01).train()
    if adapted:
        model = add_lora(model, LINEARS, 3, 6.0, 0.0)  # dropout: test_fused_linears.py
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    labels = IDS.masked_fill(PARTS < 0, -100)
    labels[0, :3] = -100
    inputs = {"num_items_in_batch": num_items} if num_items else {}
    want, want_grads = run(model, labels, **inputs)
    use_fused_forwards(model)
    have, have_grads = run(model, labels, **inputs)
    assert have.logits is None
    torch.testing.assert_close(have.loss, want.loss)
    assert have_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert (have_grads[name] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_head_that_trains_beside_adapters(saved: list[str], tiny_model: MakeModel) -> None:
    model = add_lora(tiny_model().train(), ["q_proj"], 3, 6.0, 0.0, saved)
    want, want_grads = run(model, IDS)
    use_fused_forwards(model)
    have, have_grads = run(model, IDS)
    assert have.logits is None and want.logits is not None
    torch.testing.assert_close(have.loss, want.loss)
    assert sum("lm_head" in name for name in want_grads) == 1
    for name, grad in want_grads.items():
        torch.testing.assert_close(have_grads[name], grad, rtol=1e-4, atol=1e-5)


def test_a_head_with_an_adapter_keeps_its_logits(tiny_model: MakeModel) -> None:
    model = add_lora(tiny_model().train(), ["lm_head"], 3, 6.0, 0.0)
    use_fused_forwards(model)
    assert run(model, IDS)[0].logits is not None


def test_a_batch_without_labels_trains_nothing(tiny_model: MakeModel) -> None:
    model = tiny_model(aux_loss_alpha=0.0).train()
    use_fused_forwards(model)
    out, grads = run(model, torch.full_like(IDS, -100), num_items_in_batch=5)
    assert out.loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_evaluation_has_logits(tiny_model: MakeModel) -> None:
    model = tiny_model().eval()
    want = model(input_ids=IDS, labels=IDS)
    use_fused_forwards(model)
    have = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(have.logits, want.logits)
    torch.testing.assert_close(have.loss, want.loss)


def test_generation_with_a_cache_stays_the_same(tiny_model: MakeModel) -> None:
    model = tiny_model().eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    want = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    use_fused_forwards(model)
    assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options), want)


def test_training_and_evaluation_take_turns(tiny_model: MakeModel) -> None:
    model = add_lora(tiny_model(), LINEARS, 3, 6.0, 0.5)
    use_fused_forwards(model)
    for mode in (True, False, False, True, True):
        assert (model.train() if mode else model.eval()) is model
        assert {module.training for module in model.modules()} == {mode}
