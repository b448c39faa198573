"""`import deepseek_moe` registers the model, is cheap, and gives `load` and `Generator`."""

import subprocess
import sys

# The modules of transformers are timed first, since any program with such a model imports them.
IMPORT = """
import sys, time

def seconds(run):
    begin = time.process_time()
    run()
    return time.process_time() - begin

def transformers_alone():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    import transformers.models.llama.modeling_llama, transformers.tokenization_utils_tokenizers

def package():
    import deepseek_moe

theirs, ours = seconds(transformers_alone), seconds(package)
assert ours < theirs / 2, (theirs, ours)
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("deepseek_moe.")}
assert rooms == {"model"}, rooms
from deepseek_moe import Generator, load
assert "deepseek_moe.decode.engine" in sys.modules
assert not any(name.startswith("deepseek_moe.training") for name in sys.modules)
"""


def test_the_package_is_cheap_to_import_and_decoding_comes_on_demand() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
