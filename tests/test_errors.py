"""How a process ends: with one line, or without shutting the interpreter down."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_fixtures import ROOT

from deepseek_moe.errors import UserError, as_user_error, exit_on_user_error

ENDING = """
import atexit, sys
from types import ModuleType

package = sys.modules["deepseek_moe"] = ModuleType("deepseek_moe")
package.__path__ = ["."]  # the files by themselves, which need the standard library only
from deepseek_moe.processes import end_without_teardown

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
        cwd=ROOT / "deepseek_moe",
        env=os.environ | {"WORLD_SIZE": str(processes)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (7, f"done\nat exit\n{then}"), done.stderr


@pytest.mark.parametrize("path", ["x" * 5000, f"{__file__}/inside"])
def test_a_path_that_the_system_does_not_take_is_named(path, capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        Path(path).read_text()
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path[:80]}") and said.endswith("; give another path\n")
    assert len(said) < 500


class PanicException(BaseException):
    """What libraries in Rust raise is of a class with this name."""


def test_a_panic_of_a_library_is_an_error_and_ctrl_c_is_none():
    said = "it: index out of range; mend it"
    with pytest.raises(UserError, match=said), as_user_error("it", "mend it"):
        raise PanicException("index out of range")
    with pytest.raises(KeyboardInterrupt), as_user_error("it", "mend it"):
        raise KeyboardInterrupt
