"""The fingerprint of a base model: every change that counts shows, and no other does."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from text_fixtures import BUNDLED
from transformers import AutoModelForCausalLM

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint import SAMPLE, STRIDE, fingerprint
from deepseek_moe.errors import UserError


@pytest.fixture
def folder(tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path) -> Path:
    """A small checkpoint in bf16."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_tensor_counts(tmp_path):
    """One after another, each expert, norm and router is zeroed."""
    file = Path(shutil.copytree(BUNDLED, tmp_path / "model")) / "model.safetensors"
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    changed = [name for name in header if re.search(r"norm|gate\.weight|experts.*down_proj", name)]
    assert len(changed) == 6 * 2 + 1 + 5 + 5 * (24 + 1)
    seen = {fingerprint(file.parent)}
    with file.open("r+b", buffering=0) as handle:
        for name in changed:
            begin, end = (length + offset for offset in header[name]["data_offsets"])
            handle.seek(begin)
            handle.write(bytes(end - begin))
            seen.add(fingerprint(file.parent))
            handle.seek(begin)
            handle.write(content[begin:end])
    assert len(seen) == 1 + len(changed)


def test_a_large_tensor_is_sampled_at_several_places(folder):
    """A change in a sixth of it shows, wherever that begins."""
    size = 5 * STRIDE + SAMPLE
    tensor, seen = torch.zeros(size, dtype=torch.uint8), set()
    for begin in (*range(0, size, size // 6 + 1), size):  # the last changes nothing
        changed = tensor.clone()
        changed[begin : begin + size // 6 + 1] = 1
        save_file({"x": changed}, folder / "model.safetensors")
        seen.add(fingerprint(folder))
    assert len(seen) == 7


def test_a_copy_in_other_files_has_the_same_fingerprint(folder, tmp_path):
    one, model = fingerprint(folder), AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == one
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path / "shards") == one
    model.float().save_pretrained(tmp_path / "other dtype")
    assert fingerprint(tmp_path / "other dtype") != one


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"norm_topk_prob": True}, True),
        ({"num_experts_per_tok": 2}, True),
        ({"rms_norm_eps": 1e-5}, True),
        ({"rope_theta": 10001}, True),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, True),
        ({"hidden_act": "gelu"}, True),
        ({"aux_loss_alpha": 0.2}, True),
        ({"max_position_embeddings": 128}, True),
        ({"rope_theta": 10000.0}, False),
        ({"use_cache": False}, False),
        ({"transformers_version": "6.0.0"}, False),
        ({"auto_map": {"AutoConfig": "x.Y"}}, False),
        ({"torch_dtype": "float16"}, False),
        ({"pad_token_id": 5}, False),
    ],
    ids=str,
)
def test_fields_count_if_numbers_depend_on_them(changes, counts, folder):
    before, file = fingerprint(folder), folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert (fingerprint(folder) != before) == counts


def test_a_broken_file_is_an_error(folder):
    content = (folder / "model.safetensors").read_bytes()
    for broken in (b"", b"\xff" * 1000, content[:-100]):
        (folder / "model.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match=r"truncated or corrupt.*; get it anew"):
            fingerprint(folder)
