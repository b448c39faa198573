"""Full fine-tuning on one GPU: AdamW in 4 bytes a weight, where fp32 takes 16.

- weights in bf16, rounded stochastically: at a rate of 2e-5 most updates are smaller than half a
  step of bf16, and rounding to the nearest would lose them
- Adam's two averages in 8 bits with a scale for each 256 (as Dettmers et al., arXiv 2110.02861)
- each weight stepped as soon as the backward pass has its gradient, which is then let go: gradients
  are never there together (so they cannot be clipped by their norm, which is known at the end)

The step itself is kernels/adamw.py: torchao's took four times as long on an H200.
"""

from collections.abc import Iterable
from functools import partial
from random import Random
from typing import Any

import torch
from torch.optim import Optimizer

from ...kernels import has_triton
from ...kernels.training import torch_ops


class StepInBackward(Optimizer):
    """AdamW whose steps happen in `backward()`: once a parameter, in bf16, has its gradient, it is
    stepped at the rate that its group has then, and the gradient is None again.

    Every backward pass is a step: gradients cannot be accumulated over several. `seed` decides how
    numbers are rounded.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._squares: list[torch.Tensor] = []  # of the gradients since the last step, summed
        random = torch.Generator().manual_seed(seed)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.bfloat16:
                    raise ValueError(f"a parameter is {parameter.dtype}; these are steps of bf16")
                # Now, not in the first backward pass: there they would lie among the activations.
                self.state[parameter] = _new_state(parameter)
                first = int(torch.randint(2**31, (), generator=random))
                parameter.register_post_accumulate_grad_hook(partial(self._step, group, first))

    def step(self, closure: Any = None) -> None:
        """Ends a step, of which the backward pass has left nothing else to do."""
        self._squares = []

    def grad_norm(self) -> torch.Tensor:
        """The norm of all gradients of this step together, fp32, on their device."""
        return torch.stack(self._squares).sum().sqrt()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """In place: a GPU that the states fill has no room for them twice. (And `Optimizer` would
        make all of them bf16.)"""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            for name, value in state_dict["state"][index].items():
                self.state[parameter][name].copy_(value)

    def _step(self, group: dict[str, Any], first: int, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        seed = Random(first + step).getrandbits(31)  # unlike the last one in all its bits
        averages = [state[name] for name in ("m", "v", "m_scale", "v_scale")]
        squares = _adamw(parameter)(
            parameter.detach(), parameter.grad.contiguous(), *averages, group["lr"],
            group["weight_decay"], group["betas"], group["eps"], step, seed,
        )  # fmt: skip
        torch.autograd.graph.increment_version(parameter)  # kernels do not say what they write
        self._squares.append(squares)
        parameter.grad = None


def _new_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    blocks = -(-parameter.numel() // torch_ops.ADAMW_BLOCK)
    codes = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in ("m", "v")}
    scales = {name: torch.zeros(blocks, device=parameter.device) for name in ("m_scale", "v_scale")}
    return {"step": torch.tensor(0), **codes, **scales}


def _adamw(parameter: torch.Tensor) -> Any:
    if not (parameter.is_cuda and has_triton()):
        return torch_ops.adamw
    from ...kernels.training import triton_ops

    return triton_ops.adamw
