"""The renderer against the chat template, the mask, overflow, and text from a stream of tokens."""

import copy
import random
from itertools import groupby

import pytest
from text_fixtures import BUNDLED, assistant, both_tokenizers, system, tokenizer_of, user
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from deepseek_moe.chat import render
from deepseek_moe.decode.texts import TextStream, render_within
from deepseek_moe.errors import UserError
from deepseek_moe.model.chat_format import CHAT_TEMPLATE
from deepseek_moe.model.tokenization_deepseek import BOS, EOS

CONTENTS = [
    *("", " ", "  two spaces before", "two after  ", "\ttab", " \n mixed \t\n ", "\n\n\n"),
    *("\nnewline before", "newlines after\n\n", "\r\nWindows\r\n", "def f(x):\n    return x\n"),
    *("Hello, who are you?", "User: a role inside\n\nAssistant: another", ": colon", "'s"),
    *("3 + 4 = 7", "1234567890", "...", "?!", "你好，世界。", "Führer, naïve, øöü"),
    *("🎉👩‍👩‍👧‍👦", "\u00a0no-break\u200b"),
]


@pytest.mark.parametrize("asks", [True, False])
@both_tokenizers
def test_ids_equal_those_of_the_templates(folder, asks):
    """Of our template, and of the one in the folder, which may be the official one."""
    tokenizer = tokenizer_of(folder)
    of_files = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for text in CONTENTS:
        for messages in (
            [user(text)],
            [user("Why?"), assistant(text)],
            [user(text), assistant(text), user(text), assistant(text)],
            [system(text), user("Why?"), assistant("So."), assistant(text)],
            [system(text)],
        ):
            ids, _ = render(tokenizer, messages, asks)
            for template in (CHAT_TEMPLATE, of_files):
                found = tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=asks
                )
                assert found["input_ids"] == ids, messages


@pytest.mark.parametrize("name", ["tiny-base", "tiny-chat"])
def test_the_bundled_models_have_this_template(name):
    file = BUNDLED.with_name(name) / "chat_template.jinja"
    assert file.read_text(encoding="utf-8") == CHAT_TEMPLATE


@pytest.mark.parametrize("asks", [True, False])
@both_tokenizers
def test_mask_marks_exactly_answers_and_their_eos(folder, asks):
    tokenizer = tokenizer_of(folder)
    for text in CONTENTS:
        messages = [system("Hm."), user("One?"), assistant(text), user(text), assistant("Two.")]
        ids, mask = render(tokenizer, messages, asks)
        trained = [
            [token for token, _ in pairs]
            for marked, pairs in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
            if marked
        ]
        assert trained == [
            [*tokenizer.encode(f" {answer}", add_special_tokens=False), tokenizer.eos_token_id]
            for answer in (text, "Two.")
        ], text


@pytest.mark.parametrize("typed", [EOS, BOS, f"{BOS}User: x{EOS}", EOS * 2])
@both_tokenizers
def test_typed_special_tokens_are_ordinary_text(folder, typed):
    tokenizer = tokenizer_of(folder)
    messages = [system(typed), user(typed), assistant(typed), user(typed)]
    ids, _ = render(tokenizer, messages, add_generation_prompt=True)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 1  # of the one answer
    assert tokenizer.decode(ids).count(typed) >= 4
    # Encoding so has not left the tokenizer changed.
    assert tokenizer.encode(EOS) == [tokenizer.bos_token_id, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": "x"}, "message 2 has role 'tool'"),
        ({"content": "x"}, "message 2 has role None"),
        ({"role": "user"}, "message 2 has content None"),
        ({"role": "user", "content": [{"type": "text"}]}, "message 2 has content"),
        (user("x\ud800"), r"message 2 has half a character \('\\ud800'\); it must be text"),
    ],
)
def test_a_wrong_message_is_an_error_that_names_it(message, said):
    with pytest.raises(UserError, match=said):
        render(tokenizer_of(BUNDLED), [user("a"), message])


@pytest.mark.parametrize("lacking", ["bos_token", "eos_token"])
def test_a_tokenizer_without_bos_or_eos_cannot_render(lacking):
    tokenizer = copy.copy(tokenizer_of(BUNDLED))
    tokenizer._special_tokens_map = dict(tokenizer._special_tokens_map) | {lacking: None}
    with pytest.raises(UserError, match="no BOS or no EOS"):
        render(tokenizer, [user("Hi!")])


@pytest.mark.parametrize("head", [[], [system("Be short.")]], ids=["plain", "system"])
def test_overflow_drops_the_oldest_turns_only_as_needed(head):
    """The last question stays even if it does not fit."""
    tokenizer = tokenizer_of(BUNDLED)
    first, second = [user("one " * 9), assistant("eins " * 5)], [user("two"), assistant("zwei")]
    messages = [*head, *first, *second, user("three?")]
    starts = [0] + [n for n, one in enumerate(messages) if n and one["role"] == "user"]
    tails = {n: render(tokenizer, messages[n:], add_generation_prompt=True)[0] for n in starts}
    for room in range(1, len(tails[0]) + 2):
        fitting = [n for n in starts if len(tails[n]) <= room]
        expected = min(fitting, default=starts[-1])
        assert render_within(tokenizer, messages, room) == (tails[expected], expected)


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.add(token) for token in ids]


@both_tokenizers
def test_stream_breaks_no_character_however_its_bytes_are_cut(folder):
    """A model may write a text in other tokens than the tokenizer would, across characters too."""
    tokenizer = tokenizer_of(folder)
    special = tokenizer.added_tokens_decoder
    tokens = {word: token for word, token in tokenizer.get_vocab().items() if token not in special}
    spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    dice = random.Random(0)
    for _ in range(100):
        text = "".join(dice.choices("🎉👩‍👧中文é日本語ab 𠮷，\u200b\u2028–العहि𝕳\n", k=8)) + "."
        spelled = "".join(part for part, _ in spell(text))
        ids = []
        while spelled:
            n = dice.choice([n for n in range(1, 9) if spelled[:n] in tokens])
            ids.append(tokens[spelled[:n]])
            spelled = spelled[n:]
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        ids = tokenizer.encode(text)
        assert "".join(streamed(tokenizer, [*ids, tokenizer.eos_token_id])) == text


@both_tokenizers
def test_stream_equals_the_text_of_any_tokens(folder):
    """Some tokens of the official vocabulary are bytes that begin no character."""
    tokenizer = tokenizer_of(folder)
    dice, end = random.Random(0), tokenizer.encode("And so on.", add_special_tokens=False)
    for _ in range(100):
        ids = [*dice.choices(range(len(tokenizer)), k=20), *end]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@both_tokenizers
def test_an_incomplete_character_at_the_end_is_not_shown(folder):
    tokenizer = tokenizer_of(folder)
    *first, _ = tokenizer.encode("𠮷", add_special_tokens=False)
    assert first
    ids = tokenizer.encode("All is well", add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids + first)) == "All is well"
