"""Fine-tuning's fused ways against its plain ones, in outputs and every gradient."""

from functools import partial

import pytest
import torch
from expert_fixtures import ROUTINGS, ExpertLayer
from gpu_fixtures import TEXT, distance

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.bundled import BUNDLED_MODEL
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.kernels.training import torch_ops
from deepseek_moe.model.layout import EXPERT_STACKS, weight_files
from deepseek_moe.training.arguments import ALL_LINEARS, ModelArguments, split_commas
from deepseek_moe.training.build import order_of_stacks
from deepseek_moe.training.chosen_experts import read_trained
from deepseek_moe.training.compute import grouped_experts
from deepseek_moe.training.compute.adamw_in_backward import StepInBackward
from deepseek_moe.training.compute.liger import use_fused_forwards
from deepseek_moe.training.finite import has_broken, names_of_trained
from deepseek_moe.training.quantized_base import Quantization
from deepseek_moe.training.trainable import adapt, add_lora

GRADIENTS = 2e-2
"""The relative distance from fp32 that a gradient in bf16 may have."""
WORSE = 1.5
"""So many times as far from fp32 as the plain way in bf16 may the fused way be."""
KINDS = {
    "all weights": {"trained": True},
    "eight experts": {"chosen": 8},
    "eight experts over nf4": {"chosen": 8, "bits": 4},
    "adapters over bf16": {"adapted": tuple(EXPERT_STACKS), "rank": 64},
    "adapters over nf4": {"adapted": tuple(EXPERT_STACKS), "rank": 64, "bits": 4},
}
CHOSEN, CHOSEN_IN = [1, 2, 5, 7, 8, 11, 12, 15], (1, 3)
"""Experts of the bundled model, and the layers in which they are chosen."""
OFFICIAL = (512, 32, 2048, 1408, 6)
"""Official sizes, but for half of the experts: several processes share the memory."""


@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_step(kind, recompute_layers, device, monkeypatch):
    """The loss and all gradients together, since rounding swaps some picks.

    On a CPU both ways are the plain one, because Liger's kernels need a GPU.
    """
    run = partial(step, kind, device=device)
    ours = run(recompute_layers, dtype=torch.bfloat16, fused=device.type == "cuda")
    monkeypatch.setattr(grouped_experts, "ops_for", lambda device: torch_ops)
    theirs = run(recompute_layers, dtype=torch.bfloat16, fused=False)
    exact = run(False, dtype=torch.float32, fused=False)
    assert distance(ours, exact) <= WORSE * distance(theirs, exact)


def step(
    kind: str, recompute_layers: bool, device: torch.device, dtype: torch.dtype, fused: bool
) -> torch.Tensor:
    """The loss of the bundled model and all gradients, one after the other."""
    quantization = Quantization(4, dtype=str(dtype).removeprefix("torch."))
    chosen = dict.fromkeys(CHOSEN_IN, CHOSEN) if kind.startswith("eight") else {}
    options = ModelArguments(chosen_experts=chosen, bits=4 if kind.endswith("nf4") else 16)
    order = order_of_stacks(BUNDLED_MODEL, options)
    model = DeepseekForCausalLM.from_pretrained(
        BUNDLED_MODEL,
        dtype=dtype,
        device_map={"": str(device)},
        experts_implementation=grouped_experts.GROUPED,
        quantization_config=quantization.config([], order) if options.bits == 4 else None,
    )
    if chosen:
        model = adapt(model, options)
        read_trained(model, weight_files(BUNDLED_MODEL))
    if kind.startswith("adapters"):
        model = add_lora(model, split_commas(ALL_LINEARS), 8, 16.0, 0.0)
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=random).to(device) * 0.02
    if recompute_layers:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if fused:
        use_fused_forwards(model)
    length = 256 if device.type == "cuda" else 32
    ids = own_tokenizer(BUNDLED_MODEL)(TEXT * 4).input_ids[:length]
    ids_BL = torch.tensor(ids, device=device).view(2, -1)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model.train()(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().view(1), *grads]).float()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts(kind, routing, device, monkeypatch):
    """The output and every gradient, twice bit for bit; on a CPU both ways are the plain one."""
    sizes = {"sizes": OFFICIAL} if device.type == "cuda" else {}
    layer = ExpertLayer(**KINDS[kind], **sizes, device=device)
    run = partial(layer.run, layer.picks(routing))
    ours = {recompute: run(torch.bfloat16, recompute) for recompute in (False, True)}
    for recompute, found in ours.items():
        for name, again in run(torch.bfloat16, recompute).items():
            assert torch.equal(found[name], again), f"{name} of another run is different"
    monkeypatch.setattr(grouped_experts, "ops_for", lambda device: torch_ops)
    exact, theirs = run(torch.float32, in_full=True), run(torch.bfloat16)
    for recompute, found in ours.items():
        for name, wanted in exact.items():
            mine, plain_way = distance(found[name], wanted), distance(theirs[name], wanted)
            message = f"{name}, recompute {recompute}: {mine:.2g}, the plain way {plain_way:.2g}"
            assert mine <= min(GRADIENTS, WORSE * plain_way + 1e-5), message


def test_chosen_experts_step_inside_of_the_frozen_stack(device):
    """Weights that are a part of the stack take their steps there, and the other experts stay."""
    options = {"dtype": torch.bfloat16, "device_map": {"": str(device)}}
    options["experts_implementation"] = grouped_experts.GROUPED
    model = DeepseekForCausalLM.from_pretrained(BUNDLED_MODEL, **options)
    model = adapt(model, ModelArguments(chosen_experts={3: CHOSEN})).train()
    experts = model.model.layers[3].mlp.experts
    before = {name: getattr(experts, name).clone() for name in EXPERT_STACKS}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = StepInBackward(trained, lr=1e-2)
    ids_BL = torch.tensor(own_tokenizer(BUNDLED_MODEL)(TEXT).input_ids[:32], device=device)[None]
    model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
    optimizer.step()
    for name, stack in before.items():
        after, chosen = getattr(experts, name), getattr(experts, f"chosen_{name}")
        assert torch.equal(after[: len(CHOSEN)], chosen) and chosen.grad is None
        assert torch.equal(after[len(CHOSEN) :], stack[len(CHOSEN) :])
        assert not torch.equal(chosen, stack[: len(CHOSEN)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found(value, device):
    """Both ways of finding them: after a step, and in the kernel that takes it."""
    weight = torch.nn.Parameter(torch.ones(3000, 5, dtype=torch.bfloat16, device=device))
    model = torch.nn.ParameterList([weight, torch.nn.Parameter(torch.ones(7, device=device))])
    optimizer = torch.optim.AdamW(model.parameters())
    sum(one.float().sum() for one in model).backward()
    optimizer.step()
    trained = names_of_trained(model)
    assert has_broken(trained, optimizer).item() == 0
    for numbers in (*model, *(state["exp_avg_sq"] for state in optimizer.state.values())):
        for at in (0, numbers.numel() - 1):
            before = numbers.detach().view(-1)[at].clone()
            numbers.detach().view(-1)[at] = value
            assert has_broken(trained, optimizer).item() == 1
            numbers.detach().view(-1)[at] = before
    weight.grad = None
    stepper = StepInBackward([weight], lr=1e-3)
    for block, breaks in ((0, False), (-1, True)):
        if breaks:
            stepper.state[weight]["v_scale"][block] = value
        weight.float().sum().backward()
        assert bool(stepper.grad_norm().isfinite()) != breaks
        stepper.step()
