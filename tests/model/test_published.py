"""This model computes what the published code computes: logits, greedy tokens, every gradient.

The numbers of the published code are in published_reference.safetensors, next to the script that
made them. Each case goes the way of a real checkpoint: config.json and official names on disk.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepseek_moe.model.layout import official_parts

REFERENCE = Path(__file__).with_name("published_reference.safetensors")
TOLERANCE = 1e-5
with safe_open(REFERENCE, framework="pt") as file:
    # Sorted, for safetensors hands them out in another order each time.
    CONFIGS = {case: json.loads(fields) for case, fields in sorted(file.metadata().items())}


def read(case: str) -> dict[str, torch.Tensor]:
    with safe_open(REFERENCE, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
        return {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}


def load(
    case: str, folder: Path, changes: dict[str, Any] | None = None, **kwargs: str
) -> PreTrainedModel:
    """The case's weights in this model; `changes` are made to its config.json first."""
    weights = {k.removeprefix("weight/"): x for k, x in read(case).items() if "weight/" in k}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[case] | (changes or {})))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def compute(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the fixture holds besides weights and inputs, as `model` computes it."""
    ids, padded_ids, mask = inputs["input_ids"], inputs["padded_ids"], inputs["mask"]
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    out = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        for official, where in official_parts(name, tuple(parameter.shape)):
            out[f"grad/{official}"] = parameter.grad[where]
    model.eval()
    limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        out["logits"] = model(ids).logits
        padded = {"attention_mask": mask, "position_ids": inputs["positions"]}
        out["padded_logits"] = model(padded_ids, **padded).logits
        out["greedy"] = model.generate(padded_ids, attention_mask=mask, **limits)
    return out


def differences(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """By name, the largest difference to `expected`, relative to its scale if that is above 1."""
    actual = compute(model, expected)
    assert {name for name in expected if name.startswith("grad/")} <= actual.keys()
    real = expected["mask"].bool()  # what a model computes at padding means nothing
    found = {}
    for name, have in actual.items():
        want = expected[name]
        assert have.shape == want.shape, name
        if name == "padded_logits":
            have, want = have[real], want[real]
        # Greedy tokens fit in here too: two ids that differ do so by far more than the tolerance.
        found[name] = (have - want).abs().max().item() / max(1.0, want.abs().max().item())
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("case", CONFIGS)
def test_same_as_published(case: str, experts: str, attention: str, tmp_path: Path) -> None:
    kinds = {"experts_implementation": experts, "attn_implementation": attention}
    found = differences(load(case, tmp_path, **kinds), read(case))
    # `not <=`, so that a nan is caught too.
    assert not {name: worst for name, worst in found.items() if not worst <= TOLERANCE}


@pytest.mark.parametrize(
    ("case", "changes", "seen_in"),
    [
        ("base", {"aux_loss_alpha": 0.0}, "grad/model.layers.1.mlp.gate.weight"),
        ("base", {"seq_aux": False}, "grad/model.layers.1.mlp.gate.weight"),
        ("base", {"norm_topk_prob": True}, "logits"),
        ("base", {"num_experts_per_tok": 4}, "greedy"),
        ("grouped_heads", {"norm_topk_prob": False}, "padded_logits"),
        ("linear_rope", {"rope_scaling": None}, "logits"),
        ("dynamic_rope", {"rope_scaling": None}, "loss"),
    ],
)
def test_a_wrong_model_is_noticed(
    case: str, changes: dict[str, Any], seen_in: str, tmp_path: Path
) -> None:
    """The comparison is worth something: what one field changes is ten times the tolerance."""
    assert differences(load(case, tmp_path, changes), read(case))[seen_in] > 10 * TOLERANCE
