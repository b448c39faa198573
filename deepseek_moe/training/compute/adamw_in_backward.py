"""Full fine-tuning on one GPU: AdamW that takes 4 bytes a weight instead of 16 in fp32.

- Weights are bf16 and rounded stochastically. At a rate of 2e-5 most updates are smaller than half
  a step of bf16, and rounding to the nearest would lose them.
- Adam's two averages take 8 bits each, with a scale for each block of 256 (as in Dettmers et al.
  2021, arXiv 2110.02861).
- A weight takes its step as soon as the backward pass has its gradient, which is then freed. So all
  gradients are never in memory together. They cannot be clipped by their norm, which is known only
  at the end.

The step itself is kernels/optimizer/adamw.py. torchao's took four times as long on an H200.
"""

from collections.abc import Iterable
from functools import partial
from random import Random
from typing import Any

import torch
from torch.optim import Optimizer

from ...kernels.optimizer import ops_for
from ...kernels.optimizer.torch_ops import ADAMW_BLOCK


class StepInBackward(Optimizer):
    """AdamW that takes its steps inside `backward()`.

    Once a parameter has its gradient, it takes a step at the current rate of its group, and its
    gradient becomes None. So each backward pass is one step, and gradients cannot be accumulated
    over several. `seed` decides how numbers are rounded.

    Raises:
        ValueError: a parameter is not bf16.
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
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        self._squares: list[torch.Tensor] = []  # of the gradients since the last step, summed
        random = torch.Generator().manual_seed(seed)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.bfloat16:
                    raise ValueError(f"a parameter is {parameter.dtype}; these are steps of bf16")
                # Allocated now: in the first backward pass they would lie among activations.
                blocks = -(-parameter.numel() // ADAMW_BLOCK)
                state = {n: torch.zeros_like(parameter, dtype=torch.uint8) for n in ("m", "v")}
                for name in ("m_scale", "v_scale"):
                    state[name] = torch.zeros(blocks, device=parameter.device)
                self.state[parameter] = {"step": torch.tensor(0), **state}
                first = int(torch.randint(2**31, (), generator=random))
                parameter.register_post_accumulate_grad_hook(partial(self._step, group, first))

    def step(self, closure: Any = None) -> None:
        """Ends a step: `grad_norm` starts anew. The backward pass has done everything else."""
        self._squares = []

    def grad_norm(self) -> torch.Tensor:
        """The norm of all gradients since the last `step`, as one fp32 number on their device. It
        is NaN or inf too if a weight or state has become so."""
        return torch.stack(self._squares).sum().sqrt()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies into the states that are there, for which a GPU may not have room twice.
        `Optimizer.load_state_dict` would also turn all of them into bf16."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            for name, value in state_dict["state"][index].items():
                self.state[parameter][name].copy_(value)

    def _step(self, group: dict[str, Any], first: int, parameter: torch.Tensor) -> None:
        state, grad = self.state[parameter], parameter.grad.contiguous()
        state["step"] += 1
        seed = Random(first + int(state["step"])).getrandbits(31)  # no bits of its neighbours
        squares = ops_for(grad.device).adamw(parameter.detach(), grad, state, group, seed)
        # autograd cannot see what a kernel writes. Told so, it refuses to use the old value.
        torch.autograd.graph.increment_version(parameter)
        self._squares.append(squares)
        parameter.grad = None
