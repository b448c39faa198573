"""mlx-lm runs an exported folder: `pip install "mlx[cpu]" mlx-lm`, on Linux too."""

from pathlib import Path

import pytest
import torch
from text_fixtures import BUNDLED, bundled_model, tokenizer_of

from deepseek_moe import export

pytestmark = pytest.mark.slow
NO_MLX = 'mlx is not here: pip install "mlx[cpu]" mlx-lm'
core = pytest.importorskip("mlx.core", reason=NO_MLX, exc_type=ImportError)
mlx_lm = pytest.importorskip("mlx_lm.generate", reason=NO_MLX, exc_type=ImportError)


@pytest.mark.parametrize("prompt", ["Once upon a time", "The king had three daughters,"])
def test_mlx_lm_gives_the_same_greedy_tokens(prompt, tmp_path: Path, run_module):
    run_module(export, "--model", BUNDLED, "--output", tmp_path / "new", "--dtype", "float32")
    model, tokenizer = mlx_lm.load(str(tmp_path / "new"))
    ids = tokenizer_of(BUNDLED)(prompt).input_ids
    assert tokenizer.encode(prompt) == ids
    steps = mlx_lm.generate_step(core.array(ids), model, max_tokens=60)
    made = [int(token) for token, _ in steps]
    wanted = bundled_model().generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)
    assert made == wanted[0, len(ids) :].tolist()
