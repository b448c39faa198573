"""What the benchmarks share: options, tables on the terminal, and reports in JSON."""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from deepseek_moe.errors import UserError
from deepseek_moe.files import check_writable, write_text

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Figure = float | str | None
"""What was measured, a word instead (such as "no memory"), or None: not measured."""
Row = dict[str, Any]
"""Figures by the title of their column."""


class Report:
    """Prints rows as soon as they are measured, and keeps all of them in --output_file.

    Raises:
        UserError: the file cannot be written, or is there and must not be replaced.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.file = args.output_file
        if self.file:
            check_writable(self.file, args.overwrite)
        command = f"python {shlex.join(sys.argv)}"
        self.contents: dict[str, Any] = {"machine": machine(), "command": command}
        print(", ".join(f"{name} {value}" for name, value in self.contents["machine"].items()))
        print(command, flush=True)

    def add(self, part: str, row: Row) -> None:
        """Appends a row to a part of the report. The first row has the titles above it."""
        if part not in self.contents:
            self.contents[part] = []
            print(f"\n{part}\n{aligned(row, row)}")
        self.contents[part].append(row)
        print(aligned(row, map(shown, row.values())), flush=True)
        if self.file:  # now, in case a later row fails
            write_text(self.file, json.dumps(self.contents, indent=1) + "\n", overwrite=True)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options that every report has; it describes itself by the first line."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--output_file", help="a JSON file for the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace an output file")
    return parser


def require_gpus(count: int = 1) -> None:
    """Raises UserError if there are fewer."""
    there = torch.cuda.device_count()
    if there < count:
        raise UserError(
            f"{there} GPUs were found, and this measures {count}; run it where they are"
        )


def machine() -> dict[str, str]:
    """The hardware and the versions that figures are measured with."""
    on_gpu = DEVICE.type == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else platform.machine()
    found = {"hardware": hardware, "Python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def aligned(titles: Iterable[str], cells: Iterable[str]) -> str:
    """`cells` in columns below `titles`. The names of settings are left in a wide column."""
    columns = [
        f"{cell:46}" if title == "name" else f"{cell:>{max(10, len(title))}}"
        for title, cell in zip(titles, cells, strict=True)
    ]
    return " ".join(columns)


def shown(value: Figure) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.4g}"


def ratio(value: Figure, by: Figure) -> float | None:
    """`value / by`, or None unless both are numbers."""
    both = isinstance(value, int | float) and isinstance(by, int | float)
    return value / by if both else None
