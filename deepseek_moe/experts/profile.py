"""A profile: how much each routed expert of a model is used on some text, in one JSON file.

    {
      "tokens": 5120,                      tokens that were counted, padding not among them
      "model": "tensors:…",                the fingerprint of the checkpoint
      "data": "…",                         a hash of the ids
      "settings": {…},                     how it was measured
      "layers": {
        "1": {                             the layer's number; dense layers are absent
          "picks": [321, …],               tokens that chose each expert
          "gate": [0.0121, …],             its mean gate weight over all tokens, 0 if not chosen
          "gate_times_norm": [0.084, …],   mean of gate weight times the norm of the expert's
                                           output, over the tokens that chose it; 0 without any
          "entropy": 3.02,                 of the picks, in nats; ln E if all are used alike
          "load_over_mean": 2.1,           the largest number of picks over their mean
          "starved": 3                     experts with less than a tenth of the mean
        }, …
      }
    }

`gate` is ESFT's score (arXiv 2407.01906), `gate_times_norm` that of REAP (arXiv 2510.13999).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, as_user_error
from ..files import write_text
from ..json_file import read_object

STARVED = 0.1
"""An expert with less than this part of the mean number of picks is starved."""
SCORES = ("picks", "gate", "gate_times_norm")
SUMMARIES = ("entropy", "load_over_mean", "starved")


@dataclass(frozen=True)
class LayerProfile:
    """The lists over the experts of one layer, and what follows from `picks`.

    `gate_times_norm` is empty where only the router was asked.
    """

    picks: list[int]
    gate: list[float]
    gate_times_norm: list[float]

    @property
    def shares(self) -> list[float]:
        """The part of all picks that each expert has; 0 for all without any pick."""
        total = max(1, sum(self.picks))
        return [n / total for n in self.picks]

    @property
    def entropy(self) -> float:
        """Of the distribution of picks over experts, in nats."""
        return -sum(share * math.log(share) for share in self.shares if share) + 0.0

    @property
    def load_over_mean(self) -> float:
        """The picks of the busiest expert over those of the mean expert; 0 without any pick."""
        return max(self.picks) * len(self.picks) / max(1, sum(self.picks))

    @property
    def starved(self) -> int:
        """How many experts have less than a tenth of the mean number of picks."""
        return sum(n * len(self.picks) < STARVED * sum(self.picks) for n in self.picks)


@dataclass(frozen=True)
class Profile:
    """What is in the file. `layers` has the layers with routed experts, by their numbers."""

    layers: dict[int, LayerProfile]
    tokens: int
    model: str
    data: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return len(next(iter(self.layers.values())).picks)

    def save(self, file: Path, overwrite: bool = False) -> None:
        """Raises a UserError if the file is there already or cannot be written."""
        layers = {
            str(number): {name: getattr(layer, name) for name in (*SCORES, *SUMMARIES)}
            for number, layer in self.layers.items()
        }
        fields = {name: getattr(self, name) for name in ("tokens", "model", "data", "settings")}
        write_text(file, json.dumps(fields | {"layers": layers}, indent=1) + "\n", overwrite)


class Picks(NamedTuple):
    """What the router of one layer picked for a sequence, for each token the largest weight first.

    Attributes:
        experts: the numbers of the experts, [L][K].
        weights: their gate weights, [L][K].
    """

    experts: list[list[int]]
    weights: list[list[float]]

    @property
    def top(self) -> list[int]:
        """For each token the expert with the largest gate weight."""
        return [experts_K[0] for experts_K in self.experts]


def read_profile(file: str | Path) -> Profile:
    """Reads a profile, whose lists all have the same length.

    Raises:
        UserError: it is no profile, or has numbers that no measurement gives.
    """
    wrong = f"{file} is no profile of experts"
    remedy = "make one with examples/experts.py"
    fields = read_object(file, remedy)
    with as_user_error(wrong, remedy):
        layers = {
            int(number): LayerProfile(*(_numbers(layer[name]) for name in SCORES))
            for number, layer in fields["layers"].items()
        }
        profile = Profile(
            dict(sorted(layers.items())),
            int(fields["tokens"]),
            str(fields["model"]),
            str(fields["data"]),
            dict(fields["settings"]),
        )
    sizes = {len(getattr(layer, name)) for layer in layers.values() for name in SCORES}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"{wrong}: its lists have {sorted(sizes)} numbers; {remedy}")
    for number, layer in layers.items():
        if not sum(layer.picks):
            raise UserError(f"{file}: layer {number} has no score at all; {remedy}")
    return profile


def refuse_other_model(
    profile: Profile, file: str | Path, model: str, moe_layers: Sequence[int], num_experts: int
) -> None:
    """Refuses a profile of another model.

    Args:
        file: where the profile came from, for the message.
        model: the fingerprint of the checkpoint at hand.
        moe_layers: the numbers of its layers with routed experts, of which each has `num_experts`.

    Raises:
        UserError: it was measured on another checkpoint, or has other layers or experts.
    """
    if sorted(profile.layers) != sorted(moe_layers) or profile.num_experts != num_experts:
        raise UserError(
            f"{file} has {len(profile.layers)} layers of {profile.num_experts} experts, the model "
            f"{len(moe_layers)} of {num_experts}; measure this model with examples/experts.py"
        )
    if profile.model != model:
        raise UserError(
            f"{file} was measured on another model; measure this one with examples/experts.py"
        )


def _numbers(values: Any) -> list[Any]:
    """The list `values`, of finite numbers of at least 0."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{value!r} is no number")
        if not 0 <= value < math.inf:
            raise ValueError(f"{value} is no score")
    return list(values)
