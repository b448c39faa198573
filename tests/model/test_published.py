"""This model computes what the published code computes: logits, greedy tokens, every gradient.

The numbers of the published code are in published_reference.safetensors, next to the script that
made them. Each case goes the way of a real checkpoint: config.json and official names on disk.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepseek_moe.model.layout import official_parts

REFERENCE = Path(__file__).with_name("published_reference.safetensors")
with safe_open(REFERENCE, framework="pt") as file:
    # Sorted, for safetensors hands them out in another order each time.
    CONFIGS = {case: json.loads(fields) for case, fields in sorted(file.metadata().items())}


def read(case: str) -> dict[str, torch.Tensor]:
    with safe_open(REFERENCE, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
        return {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("case", CONFIGS)
def test_same_as_published(case, experts, attention, tmp_path):
    expected = read(case)
    weights = {k.removeprefix("weight/"): x for k, x in expected.items() if "weight/" in k}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[case]))
    kinds = {"experts_implementation": experts, "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **kinds)
    actual = compute(model, expected)
    assert {name for name in expected if name.startswith("grad/")} <= actual.keys()
    real = expected["mask"].bool()  # what a model computes at padding means nothing
    for name, have in actual.items():
        want = expected[name]
        assert have.shape == want.shape, name
        if name == "padded_logits":
            have, want = have[real], want[real]
        # Greedy tokens fit in here too: two ids that differ do so by far more than the tolerance.
        assert (have - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item()), name
