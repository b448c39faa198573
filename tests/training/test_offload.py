"""Experts in host memory compute the same bits as without, and each comes ahead of its use."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accident_fixtures import die_in_step
from finetune_fixtures import assert_same, logged, run, succeed

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.errors import UserError
from deepseek_moe.model.modeling_deepseek import DeepseekExperts
from deepseek_moe.training import offload
from deepseek_moe.training.arguments import FineTuningArguments, ModelArguments
from deepseek_moe.training.build import build_model
from deepseek_moe.training.offload import BUFFERS, ExpertStream, HostStack
from deepseek_moe.training.quantized_base import ExpertsToo4bitQuantizer, Quantization

LAYERS = 5
IDS = torch.tensor([[0, 17, 5, 44, 80, 2, 91], [0, 3, 62, 9, 9, 31, 7]])
QLORA = {"use_lora": True, "bits": 4, "lora_rank": 3, "lora_dropout": 0.2}


@pytest.fixture
def base(tiny_model: Callable[..., DeepseekForCausalLM], tmp_path: Path) -> Path:
    """A model whose first layer is dense, and all others route."""
    model = tiny_model(num_hidden_layers=1 + LAYERS).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(base: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    output = str(base.parent / "out")
    training = FineTuningArguments(output_dir=output, bf16=True, use_cpu=True, report_to="none")
    return build_model(base, ModelArguments(str(base), **(QLORA | options)), training)


def losses_and_gradients(model: Any, checkpointing: bool) -> list[torch.Tensor]:
    """Of two steps, with an evaluation between them."""
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for mode in (True, False, True):
        torch.manual_seed(0)  # of the dropout
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(mode):
            found.append(model.train(mode)(IDS, labels=IDS, use_cache=False).loss)
        if mode:
            found[-1].backward()
    return found + [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("checkpointing", "options"),
    [
        (False, {}),
        pytest.param(False, {"recompute_experts": True}, marks=pytest.mark.slow),
        pytest.param(True, {}, marks=pytest.mark.slow),
        (True, {"chosen_experts": {2: [1, 3], 4: [0]}}),
    ],
)
def test_losses_and_gradients_are_the_same_bits(checkpointing, options, base):
    models = [build(base, offload_experts=offload, **options) for offload in (False, True)]
    stacks = [sum(isinstance(p, HostStack) for p in model.parameters()) for model in models]
    assert stacks == [0, 2 * LAYERS]
    found, wanted = (losses_and_gradients(model, checkpointing) for model in models)
    assert all(itertools.starmap(torch.equal, zip(found, wanted, strict=True)))


def test_stacks_stay_in_host_memory_and_none_is_counted_on_the_gpu(base):
    model = build(base, offload_experts=True)
    for experts in [one for one in model.modules() if isinstance(one, DeepseekExperts)]:
        stack = experts.down_proj
        experts.to(torch.device("meta"))
        assert experts.down_proj is stack
        assert (stack.device.type, stack.quant_state.absmax.device.type) == ("cpu", "meta")
    quantizer = ExpertsToo4bitQuantizer(Quantization(4).config([], offload=True))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert quantizer.param_element_size(model, name, torch.empty(1)) == 0


def test_a_host_with_little_memory_is_refused_before_a_weight_is_read(base, monkeypatch):
    (base / "model.safetensors").unlink()
    memory = SimpleNamespace(available=10_000)  # the stacks take 5 x 8 x 3 x 32 x 8 / 2 bytes
    monkeypatch.setattr(offload.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"True keeps 0\.0 GB in host memory, of which 0\.0 GB are"):
        build(base, offload_experts=True)


# ---- the order of copies ----


class Seen(ExpertStream):
    """Notes the layers that are copied; None stands for the moment when one is lent."""

    def __init__(self, count: int) -> None:
        numbers = torch.arange(2 * count * 64, dtype=torch.float32).view(count, 2, 64)
        quantize = Quantization(4, dtype="float32").quantize
        layers = [[HostStack.of(quantize(stack.sin())) for stack in one] for one in numbers]
        self.copied: list[int | None] = []
        super().__init__(layers, torch.device("cpu"))

    def _fill(self, buffer: Any, layer: int) -> None:
        super()._fill(buffer, layer)
        self.copied.append(layer)

    def read(self, layer: int) -> None:
        """Both stacks of a layer, as one that computes with it asks for them."""
        for place, stack in enumerate(self.layers[layer]):
            with stack.on_device() as packed:
                assert torch.equal(packed, stack.host)
                others = [s.host for one in self.layers for s in one if s is not stack]
                assert not any(torch.equal(packed, other) for other in others)
            if not place:
                self.copied.append(None)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_pass_copies_every_layer_ahead_but_those_that_are_there(count):
    stream, there = Seen(count), range(count)
    for layer in [*there, *reversed(there)] * 3:
        lent = stream.copied.count(None)
        stream.read(layer)
        if lent:  # Since the one before was lent, at most the one that comes next was copied.
            at = [i for i, one in enumerate(stream.copied) if one is None]
            assert layer not in stream.copied[at[lent - 1] + 1 : at[lent]]
    copies = [layer for layer in stream.copied if layer is not None]
    assert len(copies) == min(count, BUFFERS) + 6 * max(0, count - BUFFERS)


def test_any_order_gives_the_right_numbers():
    stream, random = Seen(5), torch.Generator().manual_seed(0)
    for layer in torch.randint(5, (200,), generator=random).tolist():
        stream.read(layer)


# ---- end to end ----


@pytest.mark.slow
def test_a_run_goes_on_with_or_without_it(place, argv, tmp_path):
    """The same losses and the same adapter as those of a run that never had it."""
    for name, *parts in (("whole", False), ("half", True, False), ("other half", False, True)):
        for part, offloaded in enumerate(parts):
            words = argv(tmp_path / name, **QLORA, offload_experts=offloaded)
            if part + 1 < len(parts):
                assert run(words, tmp_path / "log", partial(die_in_step, 8)).code == -9
            else:
                succeed(words, tmp_path / "log")
        assert_same(tmp_path / "whole", tmp_path / name)
        assert logged(tmp_path / "whole", "loss") == logged(tmp_path / name, "loss")
