"""The fingerprint of a base model: every change that counts shows, and no other does."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint import SAMPLE, STRIDE, fingerprint
from deepseek_moe.errors import UserError

MakeModel = Callable[..., DeepseekForCausalLM]


def test_every_tensor_counts(bundled_model: Path, tmp_path: Path) -> None:
    """One after another, each expert, norm and router is zeroed."""
    shutil.copytree(bundled_model, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    changed = [name for name in header if re.search(r"norm|gate\.weight|experts.*down_proj", name)]
    assert len(changed) == 6 * 2 + 1 + 5 + 5 * (24 + 1)
    seen = {fingerprint(tmp_path)}
    with file.open("r+b") as handle:
        for name in changed:
            begin, end = (length + offset for offset in header[name]["data_offsets"])
            handle.seek(begin)
            handle.write(bytes(end - begin))
            handle.flush()
            seen.add(fingerprint(tmp_path))
            handle.seek(begin)
            handle.write(content[begin:end])
    assert len(seen) == 1 + len(changed)


def test_a_large_tensor_is_sampled_at_several_places(tiny_model: MakeModel, tmp_path: Path) -> None:
    """A change in a sixth of it shows, wherever that begins."""
    tiny_model().config.save_pretrained(tmp_path)
    size = 5 * STRIDE + SAMPLE
    tensor = torch.zeros(size, dtype=torch.uint8)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    seen = {fingerprint(tmp_path)}
    for begin in range(0, size, size // 6 + 1):
        changed = tensor.clone()
        changed[begin : begin + size // 6 + 1] = 1
        save_file({"x": changed}, tmp_path / "model.safetensors")
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 7


def test_a_copy_in_other_files_has_the_same_fingerprint(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    one = fingerprint(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path / "shards") == one
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == one
    model.float().save_pretrained(tmp_path / "other dtype")
    assert fingerprint(tmp_path / "other dtype") != one


def test_fields_count_if_numbers_depend_on_them(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file, before = tmp_path / "config.json", fingerprint(tmp_path)
    fields = json.loads(file.read_text())

    def changed(**changes: Any) -> str:
        file.write_text(json.dumps(fields | changes))
        return fingerprint(tmp_path)

    for changes in (
        {"norm_topk_prob": True},
        {"num_experts_per_tok": 2},
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 10001},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"aux_loss_alpha": 0.2},
        {"max_position_embeddings": 128},
    ):
        assert changed(**changes) != before, changes
    for changes in (
        {"rope_theta": 10000.0},
        {"use_cache": False},
        {"transformers_version": "6.0.0"},
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"torch_dtype": "float16"},
        {"pad_token_id": 5},
    ):
        assert changed(**changes) == before, changes


def test_a_broken_file_is_an_error(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    for broken in (b"", b"\xff" * 1000, content[:-100]):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match=r"truncated or corrupt.*; get it anew"):
            fingerprint(tmp_path)
