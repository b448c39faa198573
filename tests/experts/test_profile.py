"""The file that holds a profile: what it derives, and what it refuses."""

import json
import math

import pytest

from deepseek_moe.errors import UserError
from deepseek_moe.experts.profile import LayerProfile, Profile, read_profile, refuse_other_model

LAYER = LayerProfile([80, 19, 1, 0], [0.4, 0.1, 0.02, 0.0], [1.5, 2.0, 0.5, 0.0])
PROFILE = Profile({1: LAYER, 2: LAYER}, 50, "tensors:m", "d", {"max_length": 8})


def test_a_profile_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "profile.json"
    PROFILE.save(file)
    assert read_profile(file) == PROFILE
    written = json.loads(file.read_text())["layers"]["1"]
    assert written["load_over_mean"] == 80 / 25
    assert written["starved"] == 2  # 1 pick and 0 picks, where a tenth of the mean is 2.5
    even = LayerProfile([5, 5], [0.1, 0.1], [1.0, 1.0])
    assert even.entropy == pytest.approx(math.log(2)) and even.starved == 0
    with pytest.raises(UserError, match="is there already"):
        PROFILE.save(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "no profile .*layers"),
        ('{"layers": {}}', "no profile"),
        (lambda p: p["layers"]["1"].update(picks=[1, 2]), "lists have"),
        (lambda p: p["layers"]["1"].update(picks=[0, 0, 0, 0]), "layer 1 has no score"),
        (lambda p: p["layers"]["1"].update(gate=[math.nan] * 4), "nan is no score"),
        (lambda p: p["layers"]["1"].update(gate=["1"] * 4), "'1' is no number"),
        (lambda p: p["layers"].clear(), "lists have"),
    ],
)
def test_what_is_no_profile_is_refused(text, said, tmp_path):
    file = tmp_path / "profile.json"
    PROFILE.save(file)
    if callable(text):
        fields = json.loads(file.read_text())
        text(fields)
        text = json.dumps(fields)
    file.write_text(str(text))
    with pytest.raises(UserError, match=said):
        read_profile(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_profile(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("model", "layers", "experts", "said"),
    [
        ("tensors:m", [1, 2, 3], 4, "the model 3 of 4"),
        ("tensors:m", [1, 2], 8, "the model 2 of 8"),
        ("tensors:other", [1, 2], 4, "another model"),
    ],
)
def test_a_profile_of_another_model_is_refused(model, layers, experts, said):
    refuse_other_model(PROFILE, "p.json", "tensors:m", [1, 2], 4)
    with pytest.raises(UserError, match=said):
        refuse_other_model(PROFILE, "p.json", model, layers, experts)
