"""Profiles of one model beside each other: all data together, and how two sets of data differ."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .profile import LayerProfile, Profile


@dataclass(frozen=True)
class LayerDifference:
    """How far the picks of a layer on one set of data are from those on another.

    `shares` has for each expert its share of the layer's picks on the one, less that on the other.
    """

    shares: list[float]

    @property
    def total_variation(self) -> float:
        """The part of the picks that would have to go to other experts: 0 alike, 1 disjoint."""
        return sum(map(abs, self.shares)) / 2


def differences(profile: Profile, to: Profile) -> dict[int, LayerDifference]:
    """How each layer of `profile` differs from that of another profile of the same model."""
    return {
        number: LayerDifference(
            [a - b for a, b in zip(layer.shares, to.layers[number].shares, strict=True)]
        )
        for number, layer in profile.layers.items()
    }


def together(profiles: Mapping[str, Profile]) -> Profile:
    """The profile of all data of several profiles of the same model.

    What their settings have in common stays, and the settings of each are under its name.
    """
    some = list(profiles.values())
    tokens = sum(one.tokens for one in some)
    layers = {
        number: _add([(one.layers[number], one.tokens) for one in some], tokens)
        for number in some[0].layers
    }
    data = hashlib.blake2b("".join(one.data for one in some).encode(), digest_size=8).hexdigest()
    first, *others = (one.settings for one in some)
    common = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    sets = {name: dict(one.settings) for name, one in profiles.items()}
    return Profile(layers, tokens, some[0].model, data, common | {"sets": sets})


def _add(parts: Sequence[tuple[LayerProfile, int]], tokens: int) -> LayerProfile:
    """A layer over all data, of its profiles and their tokens."""
    layers = [layer for layer, _ in parts]
    picks = [sum(some) for some in zip(*(layer.picks for layer in layers), strict=True)]
    gate = [
        sum(gate * n for gate, (_, n) in zip(gates, parts, strict=True)) / tokens
        for gates in zip(*(layer.gate for layer in layers), strict=True)
    ]
    norms = [
        sum(layer.gate_times_norm[e] * layer.picks[e] for layer in layers) / max(1, total)
        for e, total in enumerate(picks)
    ]
    return LayerProfile(picks, gate, norms)
