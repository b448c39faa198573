"""Without Triton, as with a CPU build of PyTorch, everything works but the kernels."""

import sys

from finetune_fixtures import command

SCRIPT = """
import runpy, sys
sys.modules["triton"] = None  # importing it raises ImportError
sys.argv = ["completion.py", "--device", "cpu", "--max_new_tokens", "3"]
sys.path.insert(0, "examples")
runpy.run_path("examples/completion.py", run_name="__main__")
"""


def test_the_examples_run() -> None:
    done = command([sys.executable, "-c", SCRIPT])
    assert done.code == 0, done.err
    assert done.out.startswith("Once upon a time")
