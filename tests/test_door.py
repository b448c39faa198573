"""`import deepseek_moe` registers the model, is cheap, and gives `load` and `Generator`."""

import subprocess
import sys

IMPORT = """
import sys
import deepseek_moe

rooms = {name.split(".")[1] for name in sys.modules if name.startswith("deepseek_moe.")}
assert rooms == {"model"}, rooms
slow = {"bitsandbytes", "datasets", "deepspeed", "peft"} & sys.modules.keys()
assert not slow, slow
from deepseek_moe import Generator, load
assert "deepseek_moe.decode.engine" in sys.modules
assert not any(name.startswith("deepseek_moe.training") for name in sys.modules)
"""


def test_the_package_is_cheap_to_import_and_decoding_comes_on_demand() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
