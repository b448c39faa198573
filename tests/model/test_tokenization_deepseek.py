"""The tokenizer: BOS exactly once on every path, left padding, the chat template."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_fixtures import (
    BUNDLED,
    OFFICIAL,
    UNMARKED,
    assistant,
    both_tokenizers,
    needs_official,
    tokenizer_of,
    user,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from deepseek_moe.model import tokenization_deepseek
from deepseek_moe.model.chat_format import CHAT_TEMPLATE
from deepseek_moe.model.tokenization_deepseek import BOS, EOS, DeepseekTokenizer

TALK = [user("Hi!"), assistant("Hello, who are you?"), user("Me?\nNobody.")]


def copy(folder: Path, to: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, to)


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "tokenizer_config.json"
    old = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(old | fields), encoding="utf-8")


def rendered_again(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text.startswith(BOS)
    return [tokenizer(text).input_ids, tokenizer([text]).input_ids[0]]


PATHS = {
    "plain": lambda t: [t("Hello world").input_ids],
    "encode": lambda t: [t.encode("Hello world")],
    "BOS in tokens": lambda t: [
        t.convert_tokens_to_ids(t.tokenize(BOS + "a", add_special_tokens=True))
    ],
    "empty text": lambda t: [t("").input_ids],
    "batch": lambda t: t(["Hello", "Hello world, here we are"]).input_ids,
    "padded batch": lambda t: t(["Hello", "Hello world, here we are"], padding=True).input_ids,
    "tensor": lambda t: t("Hello", return_tensors="pt").input_ids.tolist(),
    "truncated": lambda t: [t("Hello world, here we are", truncation=True, max_length=3).input_ids],
    "words": lambda t: [t(["Hello", "world"], is_split_into_words=True).input_ids],
    "BOS in the text": lambda t: [t(BOS + "Hello world").input_ids],
    "BOS in the encoded text": lambda t: [t.encode(BOS + "Hello world")],
    "BOS in a batch": lambda t: t([BOS + "Hello", "Hello, world"], padding=True).input_ids,
    "rendered chat": rendered_again,
    "chat template": lambda t: [t.apply_chat_template(TALK).input_ids],
    "batch of chats": lambda t: t.apply_chat_template([TALK, TALK[:1]], padding=True).input_ids,
}


@pytest.mark.parametrize("path", PATHS)
@both_tokenizers
def test_bos_is_there_exactly_once(folder, path):
    tokenizer = tokenizer_of(folder)
    for ids in PATHS[path](tokenizer):
        real = ids[next(i for i, token in enumerate(ids) if token != tokenizer.pad_token_id) :]
        assert real[0] == tokenizer.bos_token_id
        assert real.count(tokenizer.bos_token_id) == 1


@both_tokenizers
def test_bos_of_the_text_and_without_special_tokens(folder):
    tokenizer = tokenizer_of(folder)
    ids = tokenizer("Hello world").input_ids
    assert tokenizer.encode(BOS + "Hello world") == ids
    assert tokenizer("Hello world", add_special_tokens=False).input_ids == ids[1:]
    assert tokenizer.encode("Hello world", add_special_tokens=False) == ids[1:]
    # Who asks for the text as it is gets it as it is.
    assert tokenizer.encode(BOS + "Hello world", add_special_tokens=False) == ids
    switched_off = AutoTokenizer.from_pretrained(folder, add_bos_token=False)
    assert switched_off("Hello world").input_ids == ids[1:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True, "return_tensors": "pt"},
        {"padding": True, "return_tensors": "np"},
        {"max_length": 4, "stride": 1},
    ],
)
@both_tokenizers
def test_offsets_point_into_the_given_text(folder, options):
    """Where all, some or none of the texts begin with BOS, padded, or cut into several rows."""
    tokenizer = tokenizer_of(folder)
    if "max_length" in options:
        options = options | {"truncation": True, "return_overflowing_tokens": True}
    for texts in ([BOS + "Hello, my world", "Hello"], [BOS + "Hello", BOS + "world"], ["Hello"]):
        found = tokenizer(texts, return_offsets_mapping=True, **options)
        numbers = found.get("overflow_to_sample_mapping", range(len(texts)))
        for ids, offsets, number in zip(
            found.input_ids, found.offset_mapping, numbers, strict=True
        ):
            pieces = [texts[number][begin:end] for begin, end in offsets]
            real = [i not in (tokenizer.bos_token_id, tokenizer.eos_token_id) for i in ids]
            assert [p for p, is_text in zip(pieces, real, strict=True) if is_text] == [
                tokenizer.decode([i]) for i, is_text in zip(ids, real, strict=True) if is_text
            ]


@needs_official
def test_official_ids():
    tokenizer = tokenizer_of(OFFICIAL)
    assert tokenizer("Hello world").input_ids == [100000, 17464, 1843]
    assert tokenizer(EOS).input_ids == [100000, 100001]
    # Single letters that are tokens of their own: a quirk of the official files.
    assert tokenizer("ü").input_ids == [100000, 100014]


@both_tokenizers
def test_a_batch_is_padded_on_the_left(folder):
    tokenizer = tokenizer_of(folder)
    short, long = tokenizer("Hello").input_ids, tokenizer("Hello world, here we are").input_ids
    batch = tokenizer(["Hello", "Hello world, here we are"], padding=True)
    pads = len(long) - len(short)
    assert batch.input_ids == [[tokenizer.eos_token_id] * pads + short, long]
    assert batch.attention_mask == [[0] * pads + [1] * len(short), [1] * len(long)]


WITHOUT_NAMES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_text("{}"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "null": lambda file: file.write_text('{"bos_token": null, "eos_token": null}'),
    "another class": lambda file: file.write_text('{"tokenizer_class": "BertTokenizer"}'),
}


@pytest.mark.parametrize("change", WITHOUT_NAMES)
def test_bos_and_eos_are_known_if_the_files_name_none(change, tmp_path):
    copy(BUNDLED, tmp_path)
    WITHOUT_NAMES[change](tmp_path / "tokenizer_config.json")
    for door in (DeepseekTokenizer, AutoTokenizer):
        tokenizer = door.from_pretrained(tmp_path)
        assert type(tokenizer) is DeepseekTokenizer
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, EOS)
        for path in ("plain", "BOS in the text", "padded batch", "chat template"):
            assert PATHS[path](tokenizer) == PATHS[path](tokenizer_of(BUNDLED))
        assert tokenizer.get_vocab() == tokenizer_of(BUNDLED).get_vocab()


def with_other_names(folder: Path, adds_bos: bool = False, **config: Any) -> None:
    """A tokenizer as other checkpoints of this architecture have one, of which no file says more
    than config.json does."""
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hi": 3}, unk_token="<unk>"))
    words.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        words.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    words.save(str(folder / "tokenizer.json"))
    fields = {"model_type": "deepseek", "vocab_size": 8} | config
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("door", "eos", "adds_bos"), [(DeepseekTokenizer, 2, False), (AutoTokenizer, [2, 3], True)]
)
def test_bos_and_eos_are_those_of_the_config_if_ours_are_unknown(door, eos, adds_bos, tmp_path):
    with_other_names(tmp_path, adds_bos, bos_token_id=1, eos_token_id=eos)
    tokenizer = door.from_pretrained(tmp_path)
    assert tokenizer("hi").input_ids == tokenizer("<s>hi").input_ids == [1, 3]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    assert len(tokenizer) == 4
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids == [1, 3]


@pytest.mark.parametrize(
    ("config", "named", "said"),
    [
        ({}, {}, "says which of its tokens is bos_token"),
        ({"bos_token_id": 4}, {}, "says which of its tokens is bos_token"),
        ({"bos_token_id": "1"}, {}, "says which of its tokens is bos_token"),
        ({"bos_token_id": 1, "eos_token_id": []}, {}, "says which of its tokens is eos_token"),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"bos_token": "<bos>"}, "lacks <bos>"),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token": EOS}, f"lacks {EOS}"),
    ],
)
def test_a_tokenizer_without_bos_or_eos_is_refused(config, named, said, tmp_path):
    """Not given a new id, which the model has never seen."""
    with_other_names(tmp_path, **config)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{said}.*; "):
        DeepseekTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("code", [["tok.T", "tok.T"], {"AutoTokenizer": ["tok.T", None]}])
def test_code_that_the_files_name_makes_autotokenizer_warn(code, tmp_path, monkeypatch):
    """transformers then takes the class that is named beside it, whatever is registered."""
    copy(BUNDLED, tmp_path)
    said: list[str] = []
    monkeypatch.setattr(tokenization_deepseek.logger, "warning_once", said.append)
    AutoTokenizer.from_pretrained(tmp_path)
    assert not said
    change_config(tmp_path, auto_map=code, tokenizer_class="LlamaTokenizerFast")
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is LlamaTokenizer
    (warning,) = said
    assert "LlamaTokenizerFast" in warning and "adds no BOS" in warning
    tokenizer = DeepseekTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Hello").input_ids == tokenizer_of(BUNDLED)("Hello").input_ids


def test_the_template_is_that_of_the_files_or_built_in(tmp_path):
    copy(BUNDLED, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template([user("mine")], tokenize=False) == "mine"


@pytest.mark.parametrize("folder", [None, pytest.param(OFFICIAL, marks=needs_official)])
def test_a_template_that_writes_the_same_text_gets_marks_of_answers(folder, tmp_path):
    copy(BUNDLED, tmp_path)
    if folder is None:
        (tmp_path / "chat_template.jinja").write_text(UNMARKED, encoding="utf-8")
    else:
        shutil.copy(folder / "chat_template.jinja", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    made = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True)
    marked = [i for i, on in zip(made["input_ids"], made["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(marked) == f" {TALK[1]['content']}{EOS}"
    assert tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "other",
    [
        UNMARKED + "!",
        "{% if messages[0].role != 'system' %}{{ 'Be brief.\n\n' }}{% endif %}" + UNMARKED,
        "{{ tools if tools }}" + UNMARKED,
        UNMARKED.replace(
            "{% endif %}{% endfor", "{% else %}{{ message['content'] }}{% endif %}{% endfor"
        ),
        UNMARKED.replace("message['content']", "message['content'] | trim"),
        UNMARKED.replace("message['role'] == 'system'", "raise_exception('no system')"),
        "{% for",
    ],
)
def test_a_template_that_writes_anything_else_stays(other, tmp_path):
    copy(BUNDLED, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(other, encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == other


@both_tokenizers
def test_saved_files_serve_other_readers_and_give_the_same_ids(folder, tmp_path):
    """They hold neither the limits of the last call, which transformers leaves in the tokenizer,
    nor names of code that stays behind."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    copy(folder, old)
    code = {"AutoTokenizer": [None, "tokenization_deepseek.DeepseekTokenizer"]}
    change_config(old, auto_map=code, tokenizer_class="DeepseekTokenizer")
    tokenizer = AutoTokenizer.from_pretrained(old)
    assert type(tokenizer) is DeepseekTokenizer
    ids = {path: PATHS[path](tokenizer) for path in PATHS}
    tokenizer(["Hello world", "a"], truncation=True, padding="max_length", max_length=3)
    tokenizer.save_pretrained(new)
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in new.iterdir()) == names
    plain = Tokenizer.from_file(str(new / "tokenizer.json"))
    assert [plain.encode("Hello world").ids] == ids["plain"]
    assert plain.truncation is plain.padding is None
    saved = json.loads((new / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (saved["add_bos_token"], saved["add_eos_token"]) == (True, False)
    assert [saved[f"{name}_token"] for name in ("bos", "eos", "pad")] == [BOS, EOS, EOS]
    assert saved["padding_side"] == "left"
    assert not saved.keys() & {"auto_map", "is_local", "local_files_only"}
    # Without config.json transformers takes its own class, which may double a BOS of the text.
    reloaded = AutoTokenizer.from_pretrained(new)
    for path in ids.keys() - {path for path in ids if "BOS in" in path} - {"rendered chat"}:
        assert PATHS[path](reloaded) == ids[path], path
    shutil.copy(folder / "config.json", new)
    reloaded = AutoTokenizer.from_pretrained(new)
    assert {path: PATHS[path](reloaded) for path in PATHS} == ids
