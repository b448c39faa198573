"""The errors that are the user's to mend, and how an error of a library becomes one."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(ValueError):
    """Something the user can mend. The message is one line: what was found, and the remedy."""

    exit_code = 2


class RunError(UserError):
    """A run that was asked for rightly and could not go on: a full disk, a loss that is NaN."""

    exit_code = 1


class CollectiveRunError(RunError):
    """An error that every process of a run raises at the same place. Only the first prints it."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Prints a `UserError`, or memory that ran out, as one line and leaves with its exit code (2:
    wrong use)."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        exit_with(str(error), error.exit_code)
    except (torch.OutOfMemoryError, MemoryError) as error:
        found = str(error).split(". ")[0] or "out of memory"
        exit_with(f"{found}; use a smaller batch, fewer tokens, --dtype bfloat16 or another GPU")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def exit_with(message: str, exit_code: int = 2) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


@contextmanager
def rank_zero_reports() -> Iterator[None]:
    """What every process finds by itself, as wrong use: the first one says it."""
    try:
        yield
    except UserError as error:
        of_one = isinstance(error, RunError) and not isinstance(error, CollectiveRunError)
        if of_one or int(os.environ.get("RANK", 0)) == 0:
            raise
        time.sleep(3)  # when one process leaves, the launcher ends the others
        raise SystemExit(error.exit_code) from error


@contextmanager
def as_user_error(what: str, remedy: str) -> Iterator[None]:
    """Turns what libraries make of broken files or networks, of any class, into a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ImportError):
            remedy = "install that package, or choose what needs none"
        raise UserError(f"{what}: {first_words(error)}; {remedy}") from error


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
