"""Without Triton, as with a CPU build of PyTorch, everything works but the kernels."""

import subprocess
import sys

from text_fixtures import ROOT

SCRIPT = """
import runpy, sys
sys.modules["triton"] = None  # importing it raises ImportError
sys.argv = ["completion.py", "--device", "cpu", "--max_new_tokens", "3"]
sys.path.insert(0, "examples")
runpy.run_path("examples/completion.py", run_name="__main__")
"""


def test_the_examples_run():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
