"""Adapters of transformers 4, with LoRA on the linears of each expert: merged, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixtures import LINEARS, load, peft, tensors_in
from safetensors.torch import save_file

from deepseek_moe.errors import UserError
from deepseek_moe.model.layout import official_tensors
from deepseek_moe.training.merge_lora import merged_tensors

RANK, ALPHA = 2, 8


def write_old_adapter(base: Path, folder: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """Writes an adapter on all linears of a checkpoint, and returns B A of each."""
    torch.manual_seed(0)
    adapter, products = {}, {}
    for name, (rows, *columns) in official_tensors(load(base).config):
        if name.split(".")[-2] in LINEARS:
            a, b = torch.randn(RANK, *columns), torch.randn(rows, RANK)
            stem = "base_model.model." + name.removesuffix(".weight")
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            products[name] = b @ a
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    config |= {"target_modules": LINEARS, "base_model_name_or_path": str(base)} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return products


@pytest.mark.parametrize(("fields", "scale"), [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5)])
def test_each_expert_gets_its_own_product(fields, scale, base, tmp_path):
    products = write_old_adapter(base, tmp_path / "old", **fields)
    assert sum(".experts." in name for name in products) == 2 * 8 * 3  # layers, experts, matrices
    before, after = tensors_in(base), dict(merged_tensors(base, tmp_path / "old"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = scale * products[name] if name in products else torch.zeros(())
        torch.testing.assert_close(after[name], tensor + change, rtol=1e-5, atol=1e-5)


def test_an_incomplete_one_is_refused(base, tmp_path):
    write_old_adapter(base, tmp_path / "old")
    tensors = tensors_in(tmp_path / "old")
    lost = "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{lost} is missing"):
        merged_tensors(base, tmp_path / "old")


def test_peft_and_transformers_do_not_leave_the_experts_out(base, tmp_path):
    write_old_adapter(base, tmp_path / "old")
    said = "LoRA on the linears of single experts.*deepseek_moe.export"
    with pytest.raises(ValueError, match=said):
        peft.PeftModel.from_pretrained(load(base), tmp_path / "old")
    with pytest.raises(ValueError, match=said):
        load(base).load_adapter(str(tmp_path / "old"))
