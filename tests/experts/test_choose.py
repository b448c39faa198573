"""Which experts are chosen, compared with every subset; and what is refused."""

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from finetune_fixtures import write_base

from deepseek_moe.checkpoint import fingerprint
from deepseek_moe.errors import UserError
from deepseek_moe.experts.choose import Choice, choice_as_text, choose_experts, read_choice
from deepseek_moe.experts.profile import LayerProfile, Profile

SIZES = [1, 0.9, 0.6, 0.5, 0.3, 0.2, 0.1, 0.01]


def profile_of(*picks: list[int], model: str = "tensors:m") -> Profile:
    """Layers from 1 on, whose gate weights are a hundredth of the picks in the reverse order."""
    layers = {
        number: LayerProfile(one, [n / 100 for n in reversed(one)], [1.0] * len(one))
        for number, one in enumerate(picks, 1)
    }
    return Profile(layers, 50, model, "d")


def smallest_set(scores: list[Fraction], threshold: Fraction) -> list[int]:
    """The smallest set that reaches the threshold; of these the one with the most score, and of
    these the one with the lowest numbers."""
    for count in range(1, len(scores) + 1):
        sets = list(itertools.combinations(range(len(scores)), count))
        best = max(sum(scores[i] for i in one) for one in sets)
        if best >= threshold * sum(scores):
            return list(next(one for one in sets if sum(scores[i] for i in one) == best))
    raise AssertionError


@pytest.mark.parametrize("threshold", SIZES)
@pytest.mark.parametrize("score", ["token", "gate"])
def test_the_smallest_set_is_chosen_that_reaches_the_threshold(score, threshold):
    draw = random.Random(0)
    layers = [[draw.choice([0, 0, 1, 2, 5, 30, 70]) for _ in range(7)] + [1] for _ in range(30)]
    found = choose_experts(profile_of(*layers), score, threshold)
    for number, picks in enumerate(layers, 1):
        scores = [Fraction(n) for n in (picks if score == "token" else reversed(picks))]
        assert found[number] == smallest_set(scores, Fraction(str(threshold))), picks


def test_a_threshold_is_not_missed_by_rounding():
    assert choose_experts(profile_of([1] * 5), "token", 0.2) == {1: [0]}
    assert choose_experts(profile_of([7] * 10), "gate", 0.3) == {1: [0, 1, 2]}
    rare = profile_of([10**15, 0, 1, 3])
    assert choose_experts(rare, "token", 1) == {1: [0, 2, 3]}  # all that were picked, no other
    assert choose_experts(rare, "token") == choose_experts(rare, "token", 0.2) == {1: [0]}


def test_a_share_is_rounded_to_the_nearest_number_of_experts():
    picks = [3, 9, 9, 0, 5, 1, 7, 8]
    counts = {0.07: 1, 0.0625: 1, 0.1: 1, 0.25: 2, 0.3: 2, 0.3125: 3, 0.5: 4, 1: 8}
    ranked = [1, 2, 7, 6, 4, 0, 5, 3]
    for share, count in counts.items():
        found = choose_experts(profile_of(picks), "token", share=share)
        assert found == {1: sorted(ranked[:count])}, share


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0}, "--expert_threshold is 0; it must be above 0"),
        ({"threshold": 1.01}, "--expert_threshold is 1.01; it must be above 0 and at most 1"),
        ({"threshold": float("nan")}, "--expert_threshold is nan"),
        ({"share": -0.5}, "--expert_share is -0.5"),
        ({"share": 1.5}, "--expert_share is 1.5"),
        ({"share": 0.06}, "--expert_share 0.06 of 8 experts keeps none; give a larger share"),
        ({"share": 0.5, "threshold": 0.5}, "are both given"),
    ],
)
def test_amounts_that_choose_nothing_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        choose_experts(profile_of([1] * 8), **options)


def test_a_layer_without_a_score_is_refused():
    silent = LayerProfile([1, 2], [0.0, 0.0], [0.0, 0.0])
    profile = Profile({3: silent}, 1, "m", "d")
    assert choose_experts(profile, "token") == {3: [1]}
    with pytest.raises(UserError, match="layer 3 of the profile has no score at all"):
        choose_experts(profile, "gate")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 2 have 8 routed experts each, layer 0 has none."""
    return write_base(tmp_path_factory.mktemp("choose") / "base", num_hidden_layers=3)


def cfg(**fields: Any) -> dict[str, Any]:
    """As ESFT writes it, experts in the order of their scores."""
    plain = {"experts": {"1": [7, 3], "2": [5]}}
    return plain | {"shared_experts": False, "non_expert_modules": False} | fields


def test_a_profile_and_a_file_of_esft_are_read(base, tmp_path):
    picks = [1, 2, 3, 4, 5, 6, 7, 8], [9, 1, 1, 1, 1, 1, 1, 1]
    profile = profile_of(*picks, model=fingerprint(base))
    profile.save(tmp_path / "profile.json")
    for options in ({"score": "token"}, {"threshold": 0.7}, {"share": 0.5, "score": "gate"}, {}):
        found = read_choice(tmp_path / "profile.json", base, **options)
        assert found == Choice(choose_experts(profile, **options))

    file = tmp_path / "expert_cfg.json"
    file.write_text(json.dumps(cfg()))
    assert read_choice(file, base) == Choice({1: [3, 7], 2: [5]})
    file.write_text(json.dumps(cfg(experts={"2": [0], "1": []}, shared_experts=True)))
    assert read_choice(file, base) == Choice({2: [0]}, shared_experts=True)
    file.write_text(choice_as_text({1: [0, 7]}))
    assert read_choice(file, base) == Choice({1: [0, 7]})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([1], "no JSON object; give a profile.json"),
        ({"weights": 1}, "chooses no experts; give a profile.json"),
        (cfg(experts={}), "chooses no expert; name some"),
        (cfg(experts={"1": [], "2": []}), "chooses no expert; name some"),
        (cfg(experts=[1]), "chooses no expert; name some"),
        (cfg(experts={"0": [1]}), "names layer 0; the layers with routed experts are 1 to 2"),
        (cfg(experts={"3": [1], "4": [1]}), "names layer 3; 4; the layers"),
        (cfg(experts={"1": [8]}), "8 in layer 1 is no expert; they are 0 to 7"),
        (cfg(experts={"1": [-1]}), "-1 in layer 1 is no expert"),
        (cfg(experts={"1": [True]}), "True in layer 1 is no expert"),
        (cfg(experts={"1": ["3"]}), "'3' in layer 1 is no expert"),
        (cfg(experts={"1": 3}), "3 in layer 1 is no expert"),
        (cfg(experts={"1": [3, 2, 3]}), "names an expert of layer 1 twice"),
        (cfg(non_expert_modules=True), "add --trainable"),
    ],
)
def test_a_file_that_does_not_name_experts_is_refused(fields, said, base, tmp_path):
    file = tmp_path / "expert_cfg.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=said) as refused:
        read_choice(file, base)
    assert str(file) in str(refused.value) and "; " in str(refused.value)


def test_a_file_of_something_else_is_refused(base, tmp_path):
    file = tmp_path / "file.json"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_choice(file, base)
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_choice(file, base)
    profile_of([1] * 8, [1] * 8, model="tensors:other").save(file, overwrite=True)
    with pytest.raises(UserError, match="was measured on another model"):
        read_choice(file, base)


def test_what_would_have_no_effect_is_refused(base, tmp_path):
    file = tmp_path / "expert_cfg.json"
    file.write_text(json.dumps(cfg()))
    for name in ("score", "threshold", "share"):
        with pytest.raises(UserError, match=f"--expert_{name} has no effect on"):
            read_choice(file, base, **{name: {"score": "gate"}.get(name, 0.5)})
    dense = write_base(tmp_path / "dense", n_routed_experts=None)
    with pytest.raises(UserError, match="has no routed experts to choose from"):
        read_choice(file, dense)
