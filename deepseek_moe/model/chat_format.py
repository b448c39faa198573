"""The chat format of this family as a Jinja template, and whether another one writes the same."""

from functools import lru_cache
from itertools import product
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

# The format of the chat models. chat.py renders the same, and a test compares them. The generation
# marks tell other trainers what an answer is. They change no character of the text.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- set parts = [{"type": "text", "text": content}] -%}
{%- if content is defined and content is sequence and content is not string -%}
{%- set parts = content -%}
{%- endif -%}
{%- for part in parts -%}
{%- if part.type != "text" -%}
{{- raise_exception("this model reads text only, not a content part of type " ~ part.type) -}}
{%- elif part.text is not string -%}
{{- raise_exception("the content of a message is no text") -}}
{%- endif -%}
{{- part.text -}}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{- "User: " + text(message.content) + "\\n\\n" -}}
{%- elif message.role == "assistant" -%}
{{- "Assistant:" -}}
{%- generation -%}
{{- " " + text(message.content) + eos_token -}}
{%- endgeneration -%}
{%- elif message.role == "system" -%}
{{- text(message.content) + "\\n\\n" -}}
{%- else -%}
{{- raise_exception("role " + message.role + " is unknown; use user, assistant or system") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "Assistant:" -}}
{%- endif -%}"""


# Conversations on which another template is compared with this one. It might strip the blanks, or
# have a system prompt of its own.
TALK = [
    {"role": "system", "content": "a "},
    {"role": "user", "content": " b "},
    {"role": "assistant", "content": " c "},
    {"role": "user", "content": "d\n"},
]
TALKS = (TALK, TALK[1:], TALK[1:3], TALK[:2])
TOOL = {"type": "function", "function": {"name": "e", "description": "f", "parameters": {}}}


@lru_cache(maxsize=8)
def writes_this_format(template: str, bos: str, eos: str) -> bool:
    """Whether `template` writes conversations as CHAT_TEMPLATE does, and can write nothing more.

    It may leave out, or refuse, a tool or its message, which CHAT_TEMPLATE has no words for.
    """
    names = {"bos_token": bos, "eos_token": eos}
    for talk, asks in product(TALKS, (False, True)):
        names["add_generation_prompt"] = asks
        text = _rendered(CHAT_TEMPLATE, talk, names)
        with_result = _rendered(template, [*talk, {"role": "tool", "content": "g"}], names)
        with_tool = _rendered(template, talk, names | {"tools": [TOOL]})
        if _rendered(template, talk, names) != text or {with_result, with_tool} - {text, None}:
            return False
    return True


def _rendered(template: str, talk: list[dict[str, str]], options: dict[str, Any]) -> str | None:
    """The text of a conversation; None if the template fails, in whatever way."""
    try:
        (text,), _ = render_jinja_template(conversations=[talk], chat_template=template, **options)
    except Exception:
        return None
    return text
