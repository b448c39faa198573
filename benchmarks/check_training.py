"""Fine-tuning's fast ways against its plain ones on a GPU, outputs and every gradient: a part of
check_gpu.py.

Letters: T tokens, K experts a token, E experts, D hidden, O out, I in, R rank.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from check_kernels import Check, Group, distance
from torch.nn import functional as F

from deepseek_moe import DeepseekForCausalLM
from deepseek_moe.checkpoint import own_tokenizer
from deepseek_moe.files import BUNDLED_MODEL
from deepseek_moe.model.modeling_deepseek import DeepseekExperts
from deepseek_moe.training.arguments import ALL_LINEARS, split_commas
from deepseek_moe.training.compute.fused_experts import drop_again, drop_out
from deepseek_moe.training.compute.grouped_experts import (
    GROUPED,
    RECOMPUTED,
    LowRank,
    _fused_forward,
    grouped_experts_forward,
)
from deepseek_moe.training.compute.liger import use_fused_forwards
from deepseek_moe.training.quantized_base import Quantization, dequantize
from deepseek_moe.training.trainable import add_lora

GRADIENTS = 2e-2  # relative distance of gradients in bf16, and
WORSE = 1.5  # times the plain way's
ROUTINGS = ("uniform", "half of the picks on 8 experts", "8 experts without tokens")
KINDS = ("all weights", "adapters over bf16", "adapters over nf4")
TEXT = "One night, as he lay in bed and could not sleep for his troubles, he sighed and said: "


def training_checks(device: torch.device) -> Iterator[Group]:
    """On a CPU small ones, interpreted, and no whole steps: Liger's kernels need a GPU."""
    experts = {f"fused experts in training, {kind}": kind for kind in KINDS}
    checks = [(name, partial(check_fused_experts, kind, device)) for name, kind in experts.items()]
    checks.append(("dropout in the backward pass", partial(check_dropout, device)))
    yield Group(checks, gigabytes=20)
    if device.type == "cuda":
        steps: list[Check] = []
        for kind in KINDS:
            for again in (False, True):
                name = f"a step of training, {kind}" + (", layers again" if again else "")
                steps.append((name, partial(check_step, kind, again, device)))
        yield Group(steps)


def check_dropout(device: torch.device) -> str:
    """What the backward pass drops is what the forward pass dropped, to the rounding of bf16."""
    x_TD = torch.randn(1000, 2048, device=device).bfloat16()
    dropped_TD, kept_TD = drop_out(x_TD, 0.1)
    again_TD = drop_again(x_TD, kept_TD, 0.1)
    if not torch.equal(again_TD == 0, dropped_TD == 0):
        raise RuntimeError("other numbers dropped out than in the forward pass")
    apart = distance(again_TD.float(), dropped_TD.float())
    if not apart < 2**-8:
        raise RuntimeError(f"{apart:.2g} from the forward pass")
    return f"within {apart:.2g} of the forward pass"


def check_step(kind: str, again: bool, device: torch.device) -> str:
    """Loss and all gradients of the bundled model as fine-tuning computes them, in bf16, beside the
    plain way in fp32 and in bf16; all gradients together, since rounding swaps some picks."""
    exact = step(kind, False, device, torch.float32, fast=False)
    theirs, ours = (step(kind, again, device, torch.bfloat16, fast) for fast in (False, True))
    mine, plain_way = distance(ours, exact), distance(theirs, exact)
    if not mine <= WORSE * plain_way:
        raise RuntimeError(f"{mine:.2g} from fp32, the plain way {plain_way:.2g}")
    return f"{mine:.2g} from fp32, the plain way {plain_way:.2g}"


def step(
    kind: str, again: bool, device: torch.device, dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    """The loss and all gradients, one after the other."""
    config = None
    if kind.endswith("nf4"):
        config = Quantization(4, dtype=str(dtype).removeprefix("torch.")).config([])
    model = DeepseekForCausalLM.from_pretrained(
        BUNDLED_MODEL,
        dtype=dtype,
        device_map={"": str(device)},
        experts_implementation=GROUPED,
        quantization_config=config,
    )
    if kind.startswith("adapters"):
        model = add_lora(model, split_commas(ALL_LINEARS), 8, 16.0, 0.0)
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=random).to(device) * 0.02
    if again:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if fast:
        use_fused_forwards(model)
    for module in [] if fast else model.modules():
        if isinstance(module, DeepseekExperts):  # with a function it does not take the fused way
            del module.act_fn
            module.act_fn = F.silu
    ids = own_tokenizer(BUNDLED_MODEL)(TEXT * 12).input_ids[:256]
    ids_BL = torch.tensor(ids, device=device).view(2, -1)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model.train()(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().view(1), *grads]).float()


def check_fused_experts(kind: str, device: torch.device) -> str:
    """The output and every gradient, in bf16, beside the plain way in fp32 and in bf16. (On a CPU
    in fp32: Triton's interpreter cannot add in bf16.)"""
    from deepseek_moe.kernels.training import triton_ops as fused

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    training, worst, where = Training(kind, device), -1.0, ""
    for routing in ROUTINGS:
        index_TK = training.picks(routing)
        exact = training.run(grouped_experts_forward, torch.float32, index_TK)
        theirs = training.run(grouped_experts_forward, dtype, index_TK)
        for recompute in (False, True):
            forward = partial(_fused_forward, dtype=dtype, ops=fused)
            ours, again = (training.run(forward, dtype, index_TK, recompute) for _ in range(2))
            for name, wanted in exact.items():
                at = f"{name}, {routing}, recompute {recompute}"
                mine, plain_way = distance(ours[name], wanted), distance(theirs[name], wanted)
                if not mine <= min(GRADIENTS, WORSE * plain_way + 1e-5):
                    raise RuntimeError(f"{at}: {mine:.2g} from fp32, the plain way {plain_way:.2g}")
                if not torch.equal(ours[name], again[name]):
                    raise RuntimeError(f"{at}: another run gives other numbers")
                worst, where = max((worst, where), (mine, at))
    return f"within {worst:.2g} ({where}), twice bit for bit"


class Training:
    """Experts, adapters and inputs whose numbers are the same in bf16 and fp32."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.random, self.kind = torch.Generator(device).manual_seed(0), kind
        self.tokens, (self.E, self.D, width) = 512, (64, 2048, 1408)
        if device.type != "cuda":
            self.tokens, (self.E, self.D, width) = 40, (16, 64, 64)
        self.K, self.rank = (6, 64) if device.type == "cuda" else (3, 8)
        shapes = {"gate_up_proj": (2 * width, self.D), "down_proj": (self.D, width)}
        self.stacks = {n: self.normal(self.E, *s, std=s[1] ** -0.5) for n, s in shapes.items()}
        if kind.endswith("nf4"):
            self.stacks = {n: Quantization(4).quantize(x) for n, x in self.stacks.items()}
        self.factors = {}
        for n, (O, I) in shapes.items() if kind.startswith("adapters") else ():  # noqa: E741
            a_ERI, b_ERO = self.normal(self.E, self.rank, I), self.normal(self.E, self.rank, O)
            self.factors[n] = (a_ERI * I**-0.5, b_ERO * self.rank**-0.5)
        self.hidden_TD, self.probe_TD = (self.normal(self.tokens, self.D) for _ in range(2))
        scores_TK = torch.rand(self.tokens, self.K, generator=self.random, device=device)
        self.weights_TK = scores_TK.bfloat16().float()

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        options = {"generator": self.random, "device": self.random.device}
        return (torch.randn(*shape, **options) * std).bfloat16()

    def picks(self, routing: str) -> torch.Tensor:
        """[T, K], each token's all different."""
        options = {"generator": self.random, "device": self.random.device}
        scores_TE = torch.rand(self.tokens, self.E, **options)
        if routing.startswith("half"):
            half = self.K // 2
            few_TK = scores_TE[:, :8].topk(half).indices
            many_TK = scores_TE[:, 8:].topk(self.K - half).indices + 8
            return torch.cat([few_TK, many_TK], dim=1)
        if routing.endswith("without tokens"):  # the first, the last, and some between
            scores_TE[:, [0, 1, self.E // 2, -6, -4, -3, -2, -1]] = -1.0
        return scores_TE.topk(self.K).indices

    def run(
        self, forward: Any, dtype: torch.dtype, index_TK: torch.Tensor, recompute: bool = False
    ) -> dict[str, torch.Tensor]:
        """The output, and the gradients of all that can have one."""
        # `act_fn` is a function: for the module, grouped_experts_forward would take the fused way.
        config = SimpleNamespace(_experts_implementation=RECOMPUTED if recompute else GROUPED)
        experts = SimpleNamespace(num_experts=self.E, act_fn=F.silu, config=config)
        leaves = {"hidden": self.leaf(self.hidden_TD, dtype), "weights": self.leaf(self.weights_TK)}
        for name, stack in self.stacks.items():
            if self.kind == "all weights":
                leaves[name] = stack = self.leaf(stack, dtype)
            elif dtype == torch.float32:  # what it is in bf16
                stack = dequantize(stack, torch.bfloat16).float()
            setattr(experts, name, stack)
        adapters = {}
        for name, factors in self.factors.items():
            leaves[f"{name} A"], leaves[f"{name} B"] = a, b = [self.leaf(x) for x in factors]
            adapters[name] = [LowRank(a, b, 0.0)]
        out_TD = forward(experts, leaves["hidden"], index_TK, leaves["weights"], adapters)
        grads = torch.autograd.grad(out_TD, list(leaves.values()), self.probe_TD.to(out_TD.dtype))
        return {"output": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}

    @staticmethod
    def leaf(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return x.detach().to(dtype).clone().requires_grad_()
