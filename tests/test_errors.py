"""How a process ends: with one line, or without shutting the interpreter down."""

import os
import subprocess
import sys

import pytest
from text_fixtures import ROOT

ENDING = """
import atexit, sys
from errors import end_without_teardown

class Last:
    def __del__(self, say=sys.stdout.write):
        say("shut down")

sys.last = Last()
atexit.register(print, "at exit")
with end_without_teardown():
    print("done")
    sys.exit(7)
"""


@pytest.mark.parametrize(("processes", "then"), [(2, ""), (1, "shut down")])
def test_one_of_several_processes_ends_without_teardown(processes, then):
    """Threads of a process group abort a process that shuts the interpreter down under them."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING],
        cwd=ROOT / "deepseek_moe",  # the file by itself, which needs the standard library only
        env=os.environ | {"WORLD_SIZE": str(processes)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (7, f"done\nat exit\n{then}"), done.stderr
