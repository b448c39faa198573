"""The tokenizer, with the BOS token that the published files lose on transformers 5.

The model has never seen text without BOS, and writes worse after none or two. The published files
ask for one by `add_bos_token` in tokenizer_config.json, which transformers 5 does not read.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import BatchEncoding, TokenizersBackend
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from .chat_format import CHAT_TEMPLATE, writes_this_format

logger = logging.get_logger(__name__)

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


class DeepseekTokenizer(TokenizersBackend):
    """transformers' tokenizer with BOS in front exactly once, left padding, and the chat template.

    BOS and EOS are those of tokenizer_config.json, else this family's own, if tokenizer.json has
    them, else those with the ids in config.json. PAD is EOS unless the files name another.

    The chat template is that of the files, unless it writes what CHAT_TEMPLATE does.

    BOS is added to plain text, stays single if the text already begins with it (as a rendered chat
    does), and is left out with `add_special_tokens=False`. Saved files carry it in tokenizer.json,
    so that every reader of that file adds it too. Character offsets point into the given text.
    """

    padding_side = "left"  # a batch is continued at its right end
    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def convert_to_native_format(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What `from_pretrained` hands to the constructor, with the defaults added.

        Raises:
            ValueError: there is no BOS or EOS, or the files name one that tokenizer.json lacks.
        """
        file = kwargs.get("tokenizer_file")
        kwargs = super().convert_to_native_format(*args, **kwargs)
        kwargs.setdefault("add_bos_token", True)
        if file is not None:
            # Before 5.23 transformers has read the file by now.
            vocabulary = kwargs.get("tokenizer_object") or Tokenizer.from_file(str(file))
            kwargs |= _find_special_tokens(Path(file), vocabulary, kwargs)
        template = kwargs.get("chat_template") or CHAT_TEMPLATE
        names = [str(kwargs.get(name) or "") for name in ("bos_token", "eos_token")]
        if isinstance(template, str) and writes_this_format(template, *names):
            template = CHAT_TEMPLATE  # its marks tell other trainers what an answer is
        kwargs["chat_template"] = template
        return kwargs

    def _encode_plus(
        self, text: Any, *args: Any, add_special_tokens: bool = True, **kwargs: Any
    ) -> BatchEncoding:
        # `__call__`, `encode` and `tokenize` have only this private method in common, of
        # transformers' tokenization_utils_tokenizers.py.
        if not (add_special_tokens and self.add_bos_token):
            kwargs["add_special_tokens"] = add_special_tokens
            return super()._encode_plus(text, *args, **kwargs)
        texts = [text] if isinstance(text, str) else text
        written = [isinstance(one, str) and one.startswith(self.bos_token) for one in texts]
        if written and all(written) and not self.add_eos_token and not kwargs.get("text_pair"):
            return super()._encode_plus(text, *args, add_special_tokens=False, **kwargs)
        encoded = super()._encode_plus(_without_bos(text, self.bos_token), *args, **kwargs)
        if "offset_mapping" in encoded and not kwargs.get("is_split_into_words"):
            _count_bos(encoded, texts, self.bos_token)
        return encoded

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own. Templates of transformers 4 find their additional tokens, too."""
        kwargs.setdefault("additional_special_tokens", self.extra_special_tokens)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As transformers' own, with a class name and fields that other readers know too.

        An `auto_map` of the files that it was loaded from is left out, because their code is too.
        """
        self.backend_tokenizer.no_truncation()  # or the limits of the last call would be saved
        self.backend_tokenizer.no_padding()
        files = super().save_pretrained(save_directory, *args, **kwargs)
        prefix = kwargs.get("filename_prefix")
        path = Path(save_directory) / f"{prefix + '-' if prefix else ''}tokenizer_config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        for key in ("auto_map", "is_local", "local_files_only"):  # these tell how it was loaded
            fields.pop(key, None)
        fields |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "padding_side": self.padding_side,
        }
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")
        return files


def warn_of_other_tokenizer(checkpoint: str) -> None:
    """Warns if tokenizer_config.json has an `auto_map`: AutoTokenizer then takes the class that it
    names, which adds no BOS, not the registered one.

    In that case transformers calls no code of this package but the config's. Of a hub id only files
    that were downloaded before are read.
    """
    try:
        fields = get_tokenizer_config(checkpoint, local_files_only=True)
        code, named = fields.get("auto_map"), fields.get("tokenizer_class")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # AutoTokenizer says what is wrong with it
    if code and named and not named.startswith("DeepseekTokenizer"):
        logger.warning_once(
            f"{checkpoint}: tokenizer_config.json has an auto_map, so AutoTokenizer takes the "
            f"{named} that it names, which adds no BOS: the model then writes worse. Use "
            "deepseek_moe.DeepseekTokenizer.from_pretrained, as this package's programs do, or "
            "take auto_map out of the file"
        )


def _find_special_tokens(
    file: Path, vocabulary: Tokenizer, named: dict[str, Any]
) -> dict[str, Any]:
    """BOS, EOS and PAD, all of them in the `vocabulary` of tokenizer.json (`file`).

    `named` has those that tokenizer_config.json names. transformers would give one that is not in
    the vocabulary a new id, which the model has never seen.
    """
    found: dict[str, Any] = {}
    for name, own in (("bos_token", BOS), ("eos_token", EOS)):
        token = named.get(name)
        if token is None and vocabulary.token_to_id(own) is not None:
            token = own
        if token is None:
            token = _token_of_config(file.with_name("config.json"), f"{name}_id", vocabulary)
        if token is None:
            raise ValueError(
                f"{file} has no {own}, and neither tokenizer_config.json nor config.json beside it "
                f"says which of its tokens is {name}; name {name} in tokenizer_config.json"
            )
        if vocabulary.token_to_id(str(token)) is None:
            raise ValueError(
                f"{file} lacks {token}, which tokenizer_config.json names as {name}; get both "
                "files of one checkpoint"
            )
        found[name] = token
    if named.get("pad_token") is None:
        found["pad_token"] = found["eos_token"]
    return found


def _token_of_config(config: Path, field: str, vocabulary: Tokenizer) -> str | None:
    """The token whose id the config gives in `field`, or the first of several; None if none."""
    try:
        ids = json.loads(config.read_text(encoding="utf-8")).get(field)
    except (OSError, ValueError, AttributeError):  # no config, or none that can be used
        return None
    first = ids[0] if isinstance(ids, list) and ids else ids
    return vocabulary.id_to_token(first) if type(first) is int and first >= 0 else None


def _count_bos(encoded: BatchEncoding, texts: list[Any], bos: str) -> None:
    """Adds the length of `bos` to the offsets in those of `texts` that began with it."""
    rows = encoded["offset_mapping"]
    rows = [rows] if isinstance(rows[0], tuple) else rows  # those of one text are not in a list
    # A long text may have several rows.
    numbers = encoded.get("overflow_to_sample_mapping", range(len(rows)))
    for row, (offsets, number) in enumerate(zip(rows, numbers, strict=True)):
        text = texts[number]
        if not (text if isinstance(text, str) else text[0]).startswith(bos):
            continue
        for place, part in enumerate(encoded.sequence_ids(row)):
            if part != 0:  # BOS, padding, or the second text of a pair
                continue
            if isinstance(offsets[place], tuple):
                offsets[place] = tuple(end + len(bos) for end in offsets[place])
            else:  # an array
                offsets[place] += len(bos)


def _without_bos(text: Any, bos: str) -> Any:
    if isinstance(text, str):
        return text.removeprefix(bos)
    if isinstance(text, (list, tuple)):
        return [_without_bos(one, bos) for one in text]
    return text
