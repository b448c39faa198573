"""Without Triton, as with a CPU build of PyTorch, everything works but the kernels."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
sys.argv = ["completion.py", "--device", "cpu", "--max_new_tokens", "3"]
sys.path.insert(0, "examples")
import runpy
runpy.run_path("examples/completion.py", run_name="__main__")
"""


def test_the_examples_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
