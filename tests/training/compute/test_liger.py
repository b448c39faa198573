"""The fused forwards change nothing of what the model computes.

Of Liger's kernels only `liger_rope` runs here, in Triton's interpreter and in one test. The
interpreter cannot run the others, which are replaced by torch. So this compares how the functions
are put together.
"""

import hashlib
import inspect
from typing import Any

import pytest
import torch
from adapter_fixtures import add_random_adapters
from finetune_fixtures import liger_in_torch
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU, tests/gpu compares them", allow_module_level=True)

from liger_kernel.transformers import functional

from deepseek_moe.training.compute.liger import use_fused_forwards

IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])
PARTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, -1, -1]])
ROPE = functional.liger_rope


@pytest.fixture(autouse=True)
def kernels_that_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (liger_in_torch() | {"liger_rope": apply_rotary_pos_emb}).items():
        monkeypatch.setattr(functional, name, function)


def run(model: torch.nn.Module, labels: torch.Tensor, **inputs: Any) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=labels, sequence_ids=PARTS, use_cache=False, **inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out, grads


ADAPTED: dict[str, dict[str, Any] | None] = {
    "all weights": None,
    "adapters": {},  # with dropout: test_fused_lora.py
    "a head that trains beside adapters": {"names": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("num_items", [None, 9])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_loss_and_gradients_stay_the_same(adapted, num_items, tiny_model, monkeypatch):
    torch.manual_seed(1)
    model = tiny_model(experts_implementation="grouped", aux_loss_alpha=0.01).train()
    if adapted == "all weights" and num_items:
        monkeypatch.setattr(functional, "liger_rope", ROPE)
    if (options := ADAPTED[adapted]) is not None:
        model = add_random_adapters(model, **options)
    labels = IDS.masked_fill(PARTS < 0, -100)
    labels[0, :3] = -100
    want, want_grads = run(model, labels, num_items_in_batch=num_items)
    use_fused_forwards(model)
    have, have_grads = run(model, labels, num_items_in_batch=num_items)
    assert have.logits is None and want.logits is not None
    torch.testing.assert_close(have.loss, want.loss)
    assert have_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert (have_grads[name] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


def test_a_head_with_an_adapter_keeps_its_logits(tiny_model):
    model = add_random_adapters(tiny_model().train(), ["lm_head"])
    use_fused_forwards(model)
    assert run(model, IDS)[0].logits is not None


def test_a_batch_without_labels_trains_nothing(tiny_model):
    model = tiny_model(aux_loss_alpha=0.0).train()
    use_fused_forwards(model)
    out, grads = run(model, torch.full_like(IDS, -100), num_items_in_batch=5)
    assert out.loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_evaluation_and_generation_stay_the_same(tiny_model):
    model = tiny_model().eval()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    want, made = model(input_ids=IDS, labels=IDS), model.generate(IDS, **options)
    use_fused_forwards(model)
    have = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(have.logits, want.logits)
    torch.testing.assert_close(have.loss, want.loss)
    assert torch.equal(model.generate(IDS, **options), made)


def test_training_and_evaluation_take_turns(tiny_model):
    model = add_random_adapters(tiny_model(), dropout=0.5)
    use_fused_forwards(model)
    for mode in (True, False, False, True, True):
        assert (model.train() if mode else model.eval()) is model
        assert {module.training for module in model.modules()} == {mode}


def test_the_attention_that_is_repeated_here_has_not_changed():
    """If this fails, compare transformers' forward with `FusedAttention.forward`, mend that, and
    put the new hash here. The first one is that of 5.17 to 5.23, the second that of 5.24."""
    source = inspect.getsource(LlamaAttention.forward)
    found = hashlib.sha256("".join(source.split()).encode()).hexdigest()
    assert found[:16] in ("3c5ec3430ccfa6ac", "9e3ca961f287a83b")
