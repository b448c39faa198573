"""From the logits of the next position to its ids: greedy, or drawn from what the options leave.

The samplers here can be captured in a CUDA graph: they never wait for a value, make no tensor on
another device, and their shapes do not depend on the logits.

Letters that suffix locals: B batch, V vocabulary, K ids that can still be drawn (V or top_k).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import UserError

Prompts = Sequence[Sequence[int]]
"""The ids of each prompt."""
Sampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes the logits of the next position, fp32 [B, V], and which ids each row has in its prompt or
answer so far, bool [B, V]. Returns ids, int64 [B].

The engine calls a sampler of your own one step ahead. Its rows move together as sequences end, and
some at the end hold none. The next step overwrites the logits: clone them to keep them."""

BROKEN = -1
"""Stands for the id of a row if the model's logits for it are not all finite."""


def sum_rows(logits_BV: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of each row, fp32 [B], which is finite if all its logits are (below 1e33, at least).

    It is the cheapest test: in two steps, like `largest`, it takes 5 of a step's 2,000 microseconds
    on an H100, and a tenth of argmax's time on a CPU.
    """
    V = logits_BV.shape[-1]
    parts_BN = logits_BV.unflatten(-1, (V // 256, 256)).sum(dim=-1) if V % 256 == 0 else logits_BV
    return torch.sum(parts_BN, dim=-1, out=out)


def mark_broken(ids_B: torch.Tensor, sums_B: torch.Tensor) -> list[int]:
    """The ids of a step, `BROKEN` where the sum of a row's logits is NaN or infinite."""
    return torch.where(sums_B.isfinite(), ids_B, BROKEN).tolist()


def seen_in(prompts: Prompts, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Which ids each prompt holds, bool [B, V]."""
    seen_BV = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
    for row, prompt in zip(seen_BV, prompts, strict=True):
        row[list(prompt)] = True
    return seen_BV.to(device)


def largest(x_BV: torch.Tensor) -> torch.Tensor:
    """`argmax(dim=-1)`, in two steps: a GPU would give a long row to one of its processors."""
    V = x_BV.shape[-1]
    if V % 256:
        return x_BV.argmax(dim=-1)
    best_BN, place_BN = x_BV.unflatten(-1, (V // 256, 256)).max(dim=-1)
    part_B1 = best_BN.argmax(dim=-1, keepdim=True)
    return (part_B1 * 256 + place_BN.gather(-1, part_B1)).squeeze(-1)


@dataclass(frozen=True, eq=False)  # two of the same options and seed may be at different draws
class Sampling:
    """Draws ids by chance, or takes the likeliest at temperature 0.

    The options apply in this order, which is that of transformers' `generate`, with the same
    results but one: of ids with equal logits, no more than `top_k` stay.

    Args:
        repetition_penalty: divides the positive logits of ids that the row has seen and multiplies
            the negative ones; above 1 it makes them less likely, below 1 likelier.
        temperature: divides the logits; below 1 favours the likely, above 1 the unlikely.
        top_k: keep only the `top_k` likeliest ids; 0 keeps all.
        top_p: keep the likeliest ids whose probabilities first reach `top_p` together.
        min_p: keep the ids that are at least `min_p` times as likely as the likeliest.
        seed: makes the draws repeatable: the same ids in every run of the same calls, with the same
            model, prompts in the same batches, device and versions of PyTorch. The numbers are
            drawn for a whole batch, so a prompt gets other ids beside other prompts. A `Sampling`
            goes on drawing from call to call; a new one starts at the seed again.

    Raises:
        UserError: a value that no distribution has.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    _generators: dict[torch.device, torch.Generator] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        inf = float("inf")
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < inf, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < inf, "finite and above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {wanted}")

    def __call__(self, logits_BV: torch.Tensor, seen_BV: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return largest(self._penalised(logits_BV, seen_BV))
        weights_BK, ids_BK = self.distribution(logits_BV, seen_BV)
        picks_B = draw(weights_BK, self.generator(logits_BV.device))
        if ids_BK is None:
            return picks_B
        return ids_BK.gather(-1, picks_B[:, None]).squeeze(-1)

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The source of the draws on `device` (a tensor's, with its index), which goes on from call
        to call. A CUDA graph must register it before the capture.

        None without a seed: the draws then come from the default generator of the device.
        """
        if self.seed is not None and device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators.get(device)

    def distribution(
        self, logits_BV: torch.Tensor, seen_BV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is drawn from at a temperature above 0: weights [B, K] in proportion to the
        probabilities, and the ids [B, K] that they belong to (None: the ids 0 to V - 1)."""
        logits_BV = self._penalised(logits_BV, seen_BV)
        # The largest logit becomes 0 first, so that a small temperature cannot overflow.
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / _fp32(self.temperature)
        logits_BK, ids_BK = logits_BV, None
        if 0 < self.top_k < logits_BV.shape[-1]:
            logits_BK, ids_BK = logits_BV.topk(self.top_k, dim=-1)
        elif self.top_p < 1:  # only then, since an order costs more than everything else here
            logits_BK, ids_BK = logits_BV.sort(dim=-1, descending=True)
        weights_BK = logits_BK.softmax(dim=-1)
        if self.top_p < 1:
            # 0 for the likeliest, which always stays.
            before_BK = weights_BK.cumsum(dim=-1) - weights_BK
            weights_BK = weights_BK.masked_fill(before_BK >= self.top_p, 0.0)
        if self.min_p:
            least_B1 = weights_BK.amax(dim=-1, keepdim=True) * self.min_p
            weights_BK = weights_BK.masked_fill(weights_BK < least_B1, 0.0)
        return weights_BK, ids_BK

    def _penalised(self, logits_BV: torch.Tensor, seen_BV: torch.Tensor) -> torch.Tensor:
        if self.repetition_penalty == 1:
            return logits_BV
        penalty = _fp32(self.repetition_penalty)
        less_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        return torch.where(seen_BV, less_BV, logits_BV)


greedy = Sampling()
"""Takes the likeliest id of each row."""


def draw(weights_BK: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One place of each row, int64 [B], by chance in proportion to its weight.

    Clocks ring after exponential times with the rates w. Clock i is the first with probability
    w_i / sum(w). Such times are Exponential(1) noise / w, so the largest w / noise is the draw
    (Gumbel-max, without its logarithms). `torch.multinomial` draws the same ids from the same seed,
    but its checks of the weights take more kernels than the draw.
    """
    noise_BK = torch.empty_like(weights_BK).exponential_(generator=generator)
    # Noise may round to 0, and 0 / 0 is NaN, which argmax takes for the largest. So an id of weight
    # 0 would be drawn. 1 / tiny is still finite.
    noise_BK.clamp_(min=torch.finfo(noise_BK.dtype).tiny)
    return largest(weights_BK / noise_BK)


def _fp32(value: float) -> float:
    """`value`, or the nearest that fp32 can divide and multiply by without inf and NaN."""
    return min(max(value, 1e-30), 1e30)
