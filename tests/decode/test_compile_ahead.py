"""The kernels that are compiled ahead are those that a text then launches."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from time import sleep

import pytest
import torch

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.decode.compile_ahead import _compile, compile_ahead, kind_of, launches_of
from deepseek_moe.decode.decoder import Decoder, StaticCache
from deepseek_moe.decode.int_quantizer import IntConfig

WIDE = {"hidden_size": 128, "num_attention_heads": 2, "moe_intermediate_size": 64}
WIDE |= {"num_hidden_layers": 4, "max_position_embeddings": 2048}


@pytest.mark.parametrize("length", [1, 5, 16, 17, 100])
@pytest.mark.parametrize("bits", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 4))])
@torch.inference_mode()
def test_a_text_launches_what_is_compiled(bits, length, tiny_model, tmp_path):
    """A whole model that was loaded notes the kernels of a prompt of any length, and of a step."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from deepseek_moe.kernels.decode import triton_ops
    from deepseek_moe.kernels.plan import planned

    original = tiny_model(**WIDE)
    original.save_pretrained(tmp_path)
    options = {"quantization_config": IntConfig(bits)} if bits else {}
    model = DeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    model.to("meta")  # Not every product is there on a CPU.
    decoder, cache = Decoder(model, triton_ops), StaticCache(model, 1, 2048)
    token = planned.set([])
    try:
        place = torch.zeros(2, length, dtype=torch.int32, device="meta")
        decoder.logits(decoder.prefill(place[0], *place, cache, [length], [length - 1]))
        decoder.step(place[0, :1].long(), *place[:, :1], cache)
        launched = {kind_of(launch) for launch in planned.get()}
    finally:
        planned.reset(token)
    ahead = launches_of(original.config, torch.bfloat16, bits)
    assert len(launched) > 15
    # Of these numbers Triton is told not to ask anything.
    free = ("_count", "_place", "_pick_experts")
    assert not [kind for kind in launched - ahead.keys() if kind[0].__name__ not in free]


class Compiled:
    """Stands for a kernel, and notes how many are compiled and loaded at the same time."""

    compiling, loading, most_compiling, most_loading = 0, 0, 0, 0

    def warmup(self, grid: tuple[int, ...]) -> "Compiled":
        Compiled.compiling += 1
        sleep(0.05)
        Compiled.most_compiling = max(Compiled.most_compiling, Compiled.compiling)
        Compiled.compiling -= 1
        return self

    @property
    def run(self) -> None:
        Compiled.loading += 1
        sleep(0.01)
        Compiled.most_loading = max(Compiled.most_loading, Compiled.loading)
        Compiled.loading -= 1


def test_kernels_are_compiled_together_and_loaded_one_by_one(monkeypatch):
    """Two that Triton loads at once may be mistaken for each other."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    launches = [(Compiled(), (1,), (), {}) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        for launch in launches:
            threads.submit(_compile, launch, torch.device("cuda"))
    assert Compiled.most_compiling > 1 and Compiled.most_loading == 1


def test_nothing_is_compiled_for_a_cpu(tiny_model):
    config = tiny_model(**WIDE).config
    assert compile_ahead(config, torch.bfloat16, None, torch.device("cpu")) is None
