"""What only a GPU can show of a start and of a cache that grows."""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from gpu_fixtures import TwoWays, with_engine

from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.decode import engine

COMPILED = f"""
import os
from pathlib import Path
from deepseek_moe import Generator, load

def kernels():
    return set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))

model, _ = load({str(BUNDLED_MODEL)!r}, device="cuda", quantization=QUANTIZATION)
ahead = kernels()
for length in (1, 5, 16, 40, 100, 128):
    Generator(model).generate([list(range(2, 2 + length))], 4)
print(len(ahead), *sorted(file.stem for file in kernels() - ahead))
"""


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_cache_that_grows_changes_no_bit(quantization, batch, device, dtype):
    """Steps are captured anew: three times on a GPU, where 64 tokens become 512."""
    pair = TwoWays(str(BUNDLED_MODEL), device, dtype, quantization)
    prompts, new = pair.prompts(batch), 400 if device.type == "cuda" else 6
    with patch.object(engine, "FIRST_CACHE", 1024 * batch):
        whole = pair.fast.generate(prompts, new)
    growing, capacities = with_engine(pair.model), set()
    with patch.object(engine, "FIRST_CACHE", 1), patch.object(engine, "CACHE_BLOCK", 16):
        for number, ids in enumerate(growing.stream(prompts, new)):
            assert ids == [one[number] for one in whole]
            capacities.add(growing.engine.cache.capacity)
    assert len(capacities) > (2 if device.type == "cuda" else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_text_compiles_nothing_after_the_model_was_loaded(quantization, tmp_path):
    """Here the addresses are known, and what Triton asks of numbers."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU was found")
    code = COMPILED.replace("QUANTIZATION", repr(quantization))
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    ahead, *later = done.stdout.split()
    assert int(ahead) > 20 and not later, later
