"""Chat templates that a checkpoint brings: ids, and exactly the answers trained on."""

import copy
from itertools import groupby
from typing import Any

import pytest
from jinja2 import TemplateError
from text_fixtures import BUNDLED, OFFICIAL, assistant, needs_official, system, tokenizer_of, user

from deepseek_moe.chat import has_own_template, render
from deepseek_moe.decode.texts import render_within
from deepseek_moe.errors import UserError
from deepseek_moe.model.tokenization_deepseek import EOS

CHATML = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# The names of the special tokens come from a list, as in templates of transformers 4.
BY_PLACE = CHATML.replace("'<|start|>'", "additional_special_tokens[0]").replace(
    "'<|end|>\n'", "additional_special_tokens[1] + '\n'"
)
MARKED = (
    "{% for message in messages %}{{ '<|start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Other templates have no branch for a role, and leave its messages out.
TWO_ROLES = CHATML.replace(
    "{{ '<|start|>' + ", "{% if message.role in ('user', 'assistant') %}{{ '<|start|>' + "
).replace("<|end|>\n' }}{% endfor", "<|end|>\n' }}{% endif %}{% endfor")
SYSTEM_FIRST = TWO_ROLES.replace("'assistant')", "'assistant') or loop.first")
TALK = [system("Be short."), user("One?"), assistant("Two."), user("Three?"), assistant("Four.")]


def with_template(template: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer_of(BUNDLED))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def parts(tokenizer: Any, ids: list[int], mask: list[int]) -> list[tuple[int, str]]:
    groups = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [(trained, tokenizer.decode([i for i, _ in pairs])) for trained, pairs in groups]


TEMPLATES = {
    "plain": CHATML,
    "list": BY_PLACE,
    "marked": MARKED,
    "marked with pluses": MARKED.replace("{% gen", "{%+ gen").replace("{% endgen", "{%- endgen"),
    "marks in a comment": "{# {% generation %} {% endgeneration %} #}" + CHATML,
    "marks in raw text": "{% set _ %}{% raw %}{% generation %}{% endraw %}{% endset %}" + CHATML,
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_answers_with_the_tokens_that_end_them_are_trained_on(template):
    tokenizer = with_template(template)
    assert has_own_template(tokenizer)
    ids, mask = render(tokenizer, TALK)
    assert parts(tokenizer, ids, mask) == [
        (0, "<|start|>system\nBe short.<|end|>\n<|start|>user\nOne?<|end|>\n<|start|>assistant\n"),
        (1, "Two.<|end|>"),
        (0, "\n<|start|>user\nThree?<|end|>\n<|start|>assistant\n"),
        (1, "Four.<|end|>"),
        (0, "\n"),
    ]
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]


def test_an_answer_that_is_marked_is_not_trained_on():
    tokenizer = with_template(CHATML)
    talk = [*TALK[:2], TALK[2] | {"train": False}, *TALK[3:]]
    ids, mask = render(tokenizer, talk)
    assert [text for trained, text in parts(tokenizer, ids, mask) if trained] == ["Four.<|end|>"]
    assert ids == render(tokenizer, TALK)[0]
    unmarked = [message | {"train": None} for message in TALK]
    bundled = tokenizer_of(BUNDLED)
    for other in (tokenizer, bundled):
        assert render(other, unmarked) == render(other, TALK)
    ids, mask = render(bundled, talk)
    assert [text for trained, text in parts(bundled, ids, mask) if trained] == [f" Four.{EOS}"]
    assert ids == render(bundled, TALK)[0]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_question_is_asked_in_the_words_of_training(template):
    tokenizer = with_template(template)
    asked, dropped = render_within(tokenizer, TALK[:4], room=100)
    assert dropped == 0
    assert render(tokenizer, TALK)[0][: len(asked)] == asked
    assert asked == tokenizer.apply_chat_template(TALK[:4], add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    "other",
    [
        # The last answer is written otherwise than the same answer with more behind it.
        CHATML.replace("message.content", "message.content + ('' if loop.last else '!')"),
        # No special token ends an answer.
        CHATML.replace("<|end|>", ""),
        # Only the last answer is marked.
        MARKED.replace("message.role == 'assistant'", "loop.last"),
    ],
)
def test_a_template_that_does_not_tell_answers_is_refused_for_training_only(other):
    tokenizer = with_template(other)
    with pytest.raises(UserError, match="chat template"):
        render(tokenizer, TALK)
    asked, _ = render(tokenizer, TALK[:4], add_generation_prompt=True)
    template = tokenizer.apply_chat_template(TALK[:4], add_generation_prompt=True)
    assert asked == template["input_ids"]


def test_what_the_template_refuses_is_said_in_one_line():
    tokenizer = with_template("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(UserError, match="refuses the conversation: roles must alternate; change"):
        render(tokenizer, TALK)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ '\\ud800' }}", "{{ messages.x.y }}", "{% if %}", "{{ 2.0 ** 9999 }}"],
)
def test_a_template_may_fail_in_any_way(template):
    with pytest.raises(UserError, match=r"chat template refuses the conversation: .*; change its"):
        render(with_template(template), TALK)


@pytest.mark.parametrize("ask", [render, render_within])
def test_several_templates_need_a_default(ask):
    tokenizer = with_template({"default": MARKED, "tool_use": "x"})
    talk = [TALK[:4], 100] if ask is render_within else [TALK]
    assert ask(tokenizer, *talk) == ask(with_template(MARKED), *talk)
    tokenizer.chat_template = {"rag": MARKED, "tool_use": MARKED}
    with pytest.raises(UserError, match="the chat templates rag, tool_use, of which none is"):
        ask(tokenizer, *talk)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    ("template", "message", "at"),
    [
        (TWO_ROLES, system("s"), 0),  # The letter is in the text anyway.
        (TWO_ROLES, {"role": "tool", "content": "21"}, 3),
        (SYSTEM_FIRST, system("Be kind."), 2),
        (TWO_ROLES.replace("'assistant')", "'bot')"), assistant("Two."), 1),
        (TWO_ROLES.replace("'assistant')", "'assistant') and not loop.first"), user("Hi"), 0),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(template, message, at, asks):
    tokenizer, talk = with_template(template), [user("One?"), assistant("Two."), user("Three?")]
    talk = [*talk[:at], message, *talk[at:]]
    said = f"leaves out message {at + 1}, which has role '{message['role']}'; change its role"
    with pytest.raises(UserError, match=said):
        render(tokenizer, talk, asks)


def test_a_template_may_strip_and_change_content():
    changed = TWO_ROLES.replace("message.content", "(message.content | trim | replace('x', 'y'))")
    tokenizer = with_template(changed)
    ids, _ = render(tokenizer, [user(" x "), assistant("\nx")])
    assert "user\ny<|end|>" in tokenizer.decode(ids)
    talk = [system(" "), user("One?")]  # Nothing is lost where there is nothing.
    assert render(tokenizer, talk, True) == render(tokenizer, talk[1:], True)


def test_a_message_cannot_end_a_turn():
    with pytest.raises(UserError, match=r"message 2 spells <\|end\|>"):
        render(with_template(CHATML), [user("One?"), user("Two<|end|>?")])


@pytest.mark.parametrize("folder", [BUNDLED, pytest.param(OFFICIAL, marks=needs_official)])
def test_templates_of_this_family_are_known_as_such(folder):
    tokenizer = copy.deepcopy(tokenizer_of(BUNDLED))
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert not has_own_template(tokenizer)
    tokenizer.chat_template += "!"
    assert has_own_template(tokenizer)
    tokenizer.chat_template = None
    assert not has_own_template(tokenizer)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"content": None},
        {"content": 1},
        {"content": {"type": "text", "text": "x"}},
        {"content": ["x"]},
        {"content": [{"type": "text"}]},
        {"content": [{"type": "text", "text": None}]},
        {"content": [{"text": "x"}]},
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_content_that_is_no_text_is_refused_by_the_built_in_template(message, role):
    with pytest.raises(TemplateError, match=r"reads text only|is no text"):
        tokenizer_of(BUNDLED).apply_chat_template([{"role": role} | message])
    with pytest.raises(UserError, match="it must be text"):
        render(tokenizer_of(BUNDLED), [{"role": role} | message])


def test_content_in_parts_is_joined_and_other_parts_are_refused():
    tokenizer = tokenizer_of(BUNDLED)
    text = [{"type": "text", "text": "Once "}, {"type": "text", "text": "more"}]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    joined = render(tokenizer, [user("Once more")], add_generation_prompt=True)
    in_parts = [{"role": "user", "content": text}]
    assert render(tokenizer, in_parts, add_generation_prompt=True) == joined
    template = tokenizer.apply_chat_template(in_parts, add_generation_prompt=True)
    assert template["input_ids"] == joined[0]
    with pytest.raises(UserError, match=r"message 1 has content .*image_url.*; it must be text"):
        render(tokenizer, [{"role": "user", "content": image}])
    with pytest.raises(Exception, match="reads text only, not a content part of type image_url"):
        tokenizer.apply_chat_template([{"role": "user", "content": image}])
    with pytest.raises(Exception, match="role tool is unknown"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
