"""JSON files, which a stranger may have written."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from .errors import UserError, first_words

LARGEST = 2**28  # bytes of a file; the index of the 16B model's weights has half a million
DEEPEST = 64  # lists and objects inside of each other, which libraries walk through by recursion


def read_object(file: str | Path, remedy: str = "get it anew") -> dict[str, Any]:
    """The JSON object in a file of a stranger. All such files are read here.

    Raises:
        UserError: it cannot be read, is no JSON object, is too large or too deep, or has half a
            character (a lone surrogate) in a text.
    """
    try:
        file = Path(file)
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # raises on half a character
        if _depth(content) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({first_words(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, no JSON object; {remedy}")
    return content


def run_records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each run.json of fine-tuning that says of which run `folder` is, in it or above it, and what
    it holds."""
    whole = folder.resolve()  # "." and links have another parent by name
    for file in (whole / "run.json", whole.parent / "run.json"):
        if file.is_file():
            record = read_object(file, "get it anew, or remove it")
            if isinstance(record.get("settings"), dict):  # else another program's
                yield file, record


def _depth(content: Any) -> int:
    """How many lists and objects are inside of each other."""
    depth, level = 0, [content]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        parts = (one.values() if isinstance(one, dict) else one for one in level)
        depth, level = depth + 1, list(chain.from_iterable(parts))
    return depth
