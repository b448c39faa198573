"""Code that lies in a checkpoint folder is never run, whatever the folder's config says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from deepseek_moe import DeepseekForCausalLM, DeepseekTokenizer, load
from deepseek_moe.model.tokenization_deepseek import BOS, EOS

AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    "AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"],
}


@pytest.fixture
def trap(
    tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A good checkpoint whose files name code that leaves a mark when it is run."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    folder, mark = tmp_path / "model", tmp_path / "mark"
    tiny_model().save_pretrained(folder)
    words = {BOS: 0, EOS: 1} | {f"w{i}": i for i in range(2, 96)}
    Tokenizer(WordLevel(words, unk_token=EOS)).save(str(folder / "tokenizer.json"))
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for kind in ("configuration", "modeling", "tokenization"):
        (folder / f"{kind}_deepseek.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(): pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": EOS, "auto_map": AUTO_MAP})
    )
    return folder, mark


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer])
def test_auto_classes_leave_it_alone(auto: type, trap: tuple[Path, Path]) -> None:
    folder, mark = trap
    assert type(auto.from_pretrained(folder)).__module__.startswith("deepseek_moe.")
    assert not mark.exists()


def test_load_leaves_it_alone(trap: tuple[Path, Path]) -> None:
    folder, mark = trap
    model, tokenizer = load(str(folder), device="cpu")
    assert type(model) is DeepseekForCausalLM
    assert type(tokenizer) is DeepseekTokenizer
    assert not mark.exists()
