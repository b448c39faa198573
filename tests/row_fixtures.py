"""What the tests of rows and examples share: rows, a file of them, and their conversations."""

import json
from pathlib import Path
from typing import Any

from text_fixtures import assistant, user

from deepseek_moe.model.tokenization_deepseek import BOS, EOS

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello, you!"},
    {"instruction": "Count,\nplease", "input": '1, 2, "3"', "output": "4\n5"},
    {"instruction": "Führer?", "input": "  ", "output": "你好 🎉"},
    {"instruction": f"type {EOS}", "input": "", "output": f"{BOS}no{EOS}"},
]


def lines_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(file: Path, rows: list[Any]) -> None:
    file.write_text(lines_of(rows), encoding="utf-8")


def conversations(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """What `messages` of such rows must be."""
    questions = [
        row["instruction"] + ("\n" + row["input"] if row.get("input", "").strip() else "")
        for row in rows
    ]
    return [
        [user(question), assistant(row["output"])]
        for question, row in zip(questions, rows, strict=True)
    ]
