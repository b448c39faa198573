"""Errors that the user can mend, and how an error of a library becomes one of them.

Nothing beyond the standard library is imported before it is needed.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

WRONG_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.ENOTDIR, errno.EISDIR)
LONGEST = 4000  # characters of a message; a damaged file may put any text into it


class UserError(ValueError):
    """Something that the user can mend. The message is one line: what was found; the remedy."""

    exit_code = 2


class RunError(UserError):
    """The command was right, but the run could not go on: a full disk, a loss that is NaN."""

    exit_code = 1


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process after an error that is the user's to mend, without a traceback.

    A `UserError` is printed as one line and gives its exit code. Memory that ran out counts as
    wrong use (2), as does a path that the system does not take. Ctrl-C gives 130. A reader that has
    closed the output (`| head`) is no error.
    """
    try:
        yield
        sys.stdout.flush()
        return
    except UserError as error:
        message, exit_code = str(error), error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        found, exit_code = str(error).split(". ")[0] or "out of memory", 2
        message = f"{found}; use a smaller batch, fewer tokens, --dtype bfloat16 or another GPU"
    except BrokenPipeError:
        _drop_output()
        sys.exit(0)
    except OSError as error:
        if error.filename is not None and error.errno in WRONG_PATHS:
            name = str(error.filename)
            name = name if len(name) < 200 else f"{name[:80]}... ({len(name)} characters)"
            message, exit_code = f"{name} cannot be used: {error.strerror}; give another path", 2
        elif error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            _drop_output()
            message, exit_code = f"the output cannot be written: {error.strerror}; make room", 1
        else:
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {' '.join(message.split())[:LONGEST]}", file=sys.stderr)
    sys.exit(exit_code)


def _drop_output() -> None:
    """Throws away what is still buffered, on which Python would fail once more at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_memory_error(error: Exception) -> bool:
    """Whether Python, or PyTorch on a GPU, ran out of memory."""
    torch = sys.modules.get("torch")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError) if torch else MemoryError)


@contextmanager
def as_user_error(what: str, remedy: str) -> Iterator[None]:
    """Turns any error of a library, but for memory that ran out, into a UserError."""
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise  # Ctrl-C and the like; a panic is what libraries in Rust raise
        if isinstance(error, UserError) or is_memory_error(error):
            raise
        if isinstance(error, ImportError):
            remedy = "install that package, or choose what needs none"
        raise UserError(f"{what}: {first_words(error)}; {remedy}") from error


def first_words(error: BaseException) -> str:
    """What `error` says in one line of at most 400 characters; its class if it says nothing."""
    return " ".join(str(error).split())[:400].rstrip(".;:") or type(error).__name__
