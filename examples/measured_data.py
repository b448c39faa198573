"""The sets of data that experts.py measures: their names on the command line, and their ids."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from deepseek_moe.decode.prompts import check_prompt
from deepseek_moe.errors import UserError, as_user_error
from deepseek_moe.experts.measure import Ids


class DataSet(NamedTuple):
    """What is measured together; `kind` is the option that gave it."""

    name: str
    kind: str
    sources: list[str]


def named_sets(args: argparse.Namespace) -> list[DataSet]:
    """The sets in the order data, text, prompts.

    Raises:
        UserError: two of them have the same name.
    """
    sets = [DataSet("prompt", "prompt", args.prompt)] if args.prompt else []
    groups = [("text", words) for words in args.text]
    groups = [("data_path", words) for words in args.data_path] + groups
    sets = [_named_set(kind, words) for kind, words in groups] + sets
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two sets of data have the name {name}; give them names: --data_path {name}-2=FILE"
            )
    return sets


def _named_set(kind: str, words: Sequence[str]) -> DataSet:
    """NAME=FILE FILE ..., or only files; then the first one's name without endings."""
    found = re.fullmatch(r"([\w.-]+)=(.+)", words[0])
    if found and not Path(words[0]).exists():
        return DataSet(found[1], kind, [found[2], *words[1:]])
    name = Path(words[0]).expanduser().absolute().name.split(".")[0]
    return DataSet(name or "data", kind, list(words))


def read_set(
    one: DataSet, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, context: int
) -> list[Ids]:
    """The ids of a set, each text as the model reads it, up to --limit tokens in all.

    Raises:
        UserError: a file cannot be read, or there is no token, or a prompt exceeds the context.
    """
    if one.kind == "data_path":
        sequences = _examples(one, args, tokenizer)
    elif one.kind == "text":
        texts = [_read_text(file) for file in one.sources]
        sequences = [
            window
            for file, text in zip(one.sources, texts, strict=True)
            for window in _windows(file, text, tokenizer, args.max_length)
        ]
    else:
        sequences = [prompt_ids(prompt, tokenizer, context) for prompt in one.sources]
    return list(_first_tokens(sequences, args.limit)) if args.limit else sequences


def settings_of(one: DataSet, args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what of a set is measured."""
    settings: dict[str, Any] = {one.kind: one.sources, "limit": args.limit}
    if one.kind != "prompt":
        settings["max_length"] = args.max_length
    if one.kind == "data_path" and args.columns:
        settings["columns"] = args.columns
    return settings


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, context: int) -> list[int]:
    """The ids of a prompt, which must fit into the context."""
    ids = tokenizer(check_prompt(prompt), verbose=False).input_ids
    if len(ids) > context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the context is {context}; "
            "shorten it, or give its file as --text"
        )
    return ids


def _examples(
    one: DataSet, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> list[Ids]:
    """The examples that finetune.py would train on."""
    with as_user_error("--data_path cannot be used", "give --text"):
        from deepseek_moe.training.examples import load_examples
        from deepseek_moe.training.rows import parse_columns
    examples, report = load_examples(
        one.sources,
        tokenizer,
        args.max_length,
        skip_bad_rows=args.skip_bad_rows == "True",
        cache_dir=args.cache_dir,
        columns=parse_columns(args.columns),
    )
    print(f"{one.name}: {report}", file=sys.stderr)
    ids = examples.with_format("arrow")[:]["input_ids"].combine_chunks()
    ends = np.cumsum(ids.value_lengths().to_numpy())
    return np.split(ids.flatten().to_numpy(), ends[:-1])


def _read_text(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}; give a UTF-8 text file") from error


def _windows(
    file: str, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """The ids of a text in pieces of `max_length`, each with BOS in front."""
    bos = tokenizer("").input_ids
    ids = tokenizer(text, verbose=False).input_ids[len(bos) :]
    if not ids:
        raise UserError(f"{file} has no token; give a file with text")
    step = max_length - len(bos)
    return [bos + ids[at : at + step] for at in range(0, len(ids), step)]


def _first_tokens(sequences: Sequence[Ids], limit: int) -> Iterator[Ids]:
    """The first `limit` ids; the last of the sequences may be cut."""
    for ids in sequences:
        if not limit:
            return
        yield ids[:limit]
        limit -= min(limit, len(ids))
