"""How one of several processes of a run reports what went wrong, and how it ends.

Nothing beyond the standard library is imported.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import RunError, UserError


class CollectiveRunError(RunError):
    """An error that every process of a run raises at the same place. Only rank 0 prints it."""


@contextmanager
def rank_zero_reports() -> Iterator[None]:
    """Lets only rank 0 report a user error that every rank finds by itself.

    The other ranks leave with the same exit code, 3 seconds later: when one process leaves, the
    launcher ends all others. An error that only one rank has found is reported by that rank.
    """
    try:
        yield
    except UserError as error:
        of_one = isinstance(error, RunError) and not isinstance(error, CollectiveRunError)
        if of_one or int(os.environ.get("RANK", 0)) == 0:
            raise
        time.sleep(3)
        raise SystemExit(error.exit_code) from error


@contextmanager
def end_without_teardown() -> Iterator[None]:
    """Ends one of several processes after its work without shutting the interpreter down.

    DeepSpeed keeps the threads of a process group alive. Python ends such a thread if it waits for
    Python's lock during the shutdown, and C++ then aborts the process. So this does what an exit of
    Python does before the shutdown (Py_FinalizeEx in CPython's pylifecycle.c), and leaves.
    """
    several, code = int(os.environ.get("WORLD_SIZE", 1)) > 1, 0
    try:
        yield
    except SystemExit as leaving:
        if not several or not isinstance(leaving.code, int):
            raise
        code = leaving.code
    if several:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
