"""What several benchmarks print and write: cells of tables, and a report in JSON."""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from deepseek_moe.errors import UserError
from deepseek_moe.files import check_writable, write_text

Figure = float | str | None
"""What was measured, a word instead (such as NO_MEMORY), or None: not measured."""
Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]
"""Titles, and what each column shows of a row."""


class Report:
    """Prints rows as soon as they are measured, and keeps all of them in a file, if one is named.

    Raises:
        UserError: the file cannot be written, or is there and must not be replaced.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.file: Path | None = args.output_file
        if self.file:
            check_writable(self.file, args.overwrite)
        self.contents: dict[str, Any] = {
            "machine": machine(device),
            "command": f"python {shlex.join(sys.argv)}",
        }
        print(", ".join(f"{name} {value}" for name, value in self.contents["machine"].items()))
        print(self.contents["command"], flush=True)

    def add(self, part: str, row: Row, columns: Columns, name: str = "") -> None:
        """Appends a row to a part of the report, and shows its columns after `name`."""
        print(name, aligned(show(row) for show in columns.values()), flush=True)
        self.contents.setdefault(part, []).append(row)
        if self.file:  # now, in case a later row fails
            write_text(self.file, json.dumps(self.contents, indent=1) + "\n", overwrite=True)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_file", type=Path, help="a JSON file for the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace an output file")


def require_gpu() -> torch.device:
    """The GPU. Raises UserError if there is none."""
    if not torch.cuda.is_available():
        raise UserError("no GPU was found, and this measures one; run it where there is one")
    return torch.device("cuda")


def refuse_unknown(only: str, chosen: Iterable[Any], names: Iterable[str]) -> None:
    """Raises UserError if --only has chosen nothing."""
    if not list(chosen):
        raise UserError(f"--only {only} names no setting; there are: {'; '.join(names)}")


def machine(device: torch.device) -> dict[str, str]:
    """The hardware and the versions that figures are measured with."""
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    found = {"hardware": hardware, "Python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def aligned(cells: Iterable[str]) -> str:
    return " ".join(f"{cell:>10}" for cell in cells)


def number(value: Figure) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.1f}"


def rate(tokens: int, seconds: Figure) -> Figure:
    """Tokens/s, or the word that stands for the seconds."""
    return tokens / seconds if isinstance(seconds, float) else seconds


def ratio(value: Figure, by: Figure, form: str = "{:.2f}") -> str:
    """`value / by`, or "-" unless both are numbers."""
    both = isinstance(value, int | float) and isinstance(by, int | float)
    return form.format(value / by) if both else "-"


def percent(value: Figure, by: Figure = 1) -> str:
    return ratio(value, by / 100 if isinstance(by, int | float) else by, "{:.0f} %")
