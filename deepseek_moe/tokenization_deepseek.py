"""The tokenizer, with the BOS token that the published files lose on transformers 5.

The model has never seen text without BOS and writes worse after none, or after two. The published
files ask for it by `add_bos_token` in tokenizer_config.json, which transformers 5 does not read.
"""

import json
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, TokenizersBackend

from .writing import write_aside

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

# The format of the chat models; chat.py tells it once more in Python.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{- "User: " + message.content + "\n\n" -}}
{%- elif message.role == "assistant" -%}
{{- "Assistant: " + message.content + eos_token -}}
{%- elif message.role == "system" -%}
{{- message.content + "\n\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "Assistant:" -}}
{%- endif -%}"""


class DeepseekTokenizer(TokenizersBackend):
    """transformers' tokenizer with BOS in front exactly once, left padding, and the chat template.

    BOS is added to plain text, kept single where the text already begins with it (a rendered chat),
    and left out with `add_special_tokens=False`. Saved files carry it in tokenizer.json, so that
    every reader of that file adds it too.
    """

    padding_side = "left"  # a batch is continued at its right end
    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def convert_to_native_format(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What `from_pretrained` hands to the constructor; here the defaults come in."""
        kwargs = super().convert_to_native_format(*args, **kwargs)
        kwargs.setdefault("add_bos_token", True)
        if not kwargs.get("chat_template"):
            kwargs["chat_template"] = CHAT_TEMPLATE
        return kwargs

    def _encode_plus(
        self, text: Any, *args: Any, add_special_tokens: bool = True, **kwargs: Any
    ) -> BatchEncoding:
        if add_special_tokens and self.add_bos_token:
            text = _without_bos(text, self.bos_token)
        return super()._encode_plus(text, *args, add_special_tokens=add_special_tokens, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As transformers' own, with a class name and fields that other readers know too, and
        without the `auto_map` of the files that it was loaded from, whose code stays behind."""
        self.backend_tokenizer.no_truncation()  # the last call's limits would be saved with it
        self.backend_tokenizer.no_padding()
        files = super().save_pretrained(save_directory, *args, **kwargs)
        prefix = kwargs.get("filename_prefix")
        path = Path(save_directory) / f"{prefix + '-' if prefix else ''}tokenizer_config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        for key in ("auto_map", "is_local", "local_files_only"):  # of how it was loaded
            fields.pop(key, None)
        fields |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "padding_side": self.padding_side,
        }
        write_aside(path, json.dumps(fields, indent=2, ensure_ascii=False))
        return files


def _without_bos(text: Any, bos: str) -> Any:
    if isinstance(text, str):
        return text.removeprefix(bos)
    if isinstance(text, (list, tuple)):
        return [_without_bos(one, bos) for one in text]
    return text
