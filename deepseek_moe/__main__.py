"""Runs another program with the model registered, in the processes that it starts, too.

    python -m deepseek_moe lm_eval --model hf --model_args pretrained=FOLDER --tasks ...
    python -m deepseek_moe trl sft --model_name_or_path FOLDER ...

PROGRAM is a command, a Python module or a Python file.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

KNOWN = ("lm_eval", "trl", "transformers", "accelerate", "torchrun", "deepspeed")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage(), file=sys.stdout if len(sys.argv) > 1 else sys.stderr)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    program, *arguments = sys.argv[1:]
    command = find_program(program)
    if command is None:
        print(
            f"error: {program} is no command, Python module or file here; install it, or see "
            "python -m deepseek_moe --help",
            file=sys.stderr,
        )
        sys.exit(2)
    package = Path(__file__).resolve().parent
    places = [package / "startup", package.parent, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(place) for place in places if str(place))
    sys.stdout.flush()
    os.execv(command[0], [*command, *arguments])


def find_program(program: str) -> list[str] | None:
    """The command that starts `program`; None if there is none."""
    if program.endswith(".py") and Path(program).is_file():
        return [sys.executable, program]
    # This Python's own environment comes first. It need not be activated.
    places = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
    if found := shutil.which(program, path=os.pathsep.join(places)):
        return [found]
    try:
        is_module = find_spec(program) is not None
    except (ImportError, ValueError):
        is_module = False
    return [sys.executable, "-m", program] if is_module else None


def usage() -> str:
    found = [program for program in KNOWN if find_program(program)]
    return (
        "usage: python -m deepseek_moe PROGRAM ARGUMENTS...\n\n"
        "Runs a command, a Python module or a Python file in which transformers knows DeepSeek-MoE."
        f"\nHere you can run {', '.join(found)} and others.\n"
        "This package's own programs need no such help: python -m deepseek_moe.export, and the "
        "scripts\nin examples/ and finetune/."
    )


if __name__ == "__main__":
    main()
