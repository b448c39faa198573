"""Profiles beside each other."""

import pytest

from deepseek_moe.experts.compare import differences, together
from deepseek_moe.experts.measure import measure
from deepseek_moe.experts.profile import SCORES, LayerProfile, Profile


def profile(picks: list[int]) -> Profile:
    return Profile({3: LayerProfile(picks, [0.1] * 4, [1.0] * 4)}, 10, "tensors:m", "d")


def test_differences_of_shares():
    layer = differences(profile([30, 10, 0, 0]), profile([1, 1, 2, 0]))[3]
    assert layer.shares == [0.5, 0.0, -0.5, 0.0]
    assert layer.total_variation == 0.5
    assert differences(profile([2, 2, 0, 0]), profile([0, 0, 1, 3]))[3].total_variation == 1
    assert differences(profile([2, 2, 0, 0]), profile([1, 1, 0, 0]))[3].total_variation == 0


def test_together_is_the_profile_of_all_data(tiny_model):
    model, parts = tiny_model(), {"a": [[5, 6, 7, 8], [9]], "b": [[40, 41, 42]], "c": [[90]]}
    profiles = {
        name: measure(model, ids, fingerprint="tensors:m", settings={"model": "m", "text": name})
        for name, ids in parts.items()
    }
    found = together(profiles)
    wanted = measure(model, [ids for part in parts.values() for ids in part], fingerprint="m")
    assert (found.tokens, found.model) == (9, "tensors:m")
    for number, layer in wanted.layers.items():
        for name in SCORES:
            assert getattr(found.layers[number], name) == pytest.approx(getattr(layer, name))
    assert found.settings["model"] == "m" and "text" not in found.settings
    assert found.settings["sets"]["b"] == {"model": "m", "text": "b"}
    assert found.data != together(dict(reversed(profiles.items()))).data
