"""What the tests of text share: both tokenizers and the bundled model, each loaded only once."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import deepseek_moe  # noqa: F401  (registers the model)

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "models" / "tiny-base"
OFFICIAL = ROOT.parent / "shared" / "official"

# The format of the chat models without marks of answers, as in templates that go with their files.
UNMARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the official files are not in ../shared/official"
)
both_tokenizers = pytest.mark.parametrize(
    "folder",
    [
        pytest.param(BUNDLED, id="bundled"),
        pytest.param(OFFICIAL, id="official", marks=needs_official),
    ],
)


@cache
def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@cache
def bundled_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}
