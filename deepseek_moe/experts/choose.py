"""Which experts are worth training: chosen by a profile, or named by a file of ESFT's.

Expert-Specialized Fine-Tuning (ESFT, arXiv 2407.01906) trains, in each layer, the smallest set of
experts that gets a given part of the data: of the picks (`token`) or of the gate weights (`gate`).
"""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import fingerprint
from ..errors import UserError
from ..json_file import read_object
from ..model.configuration_deepseek import DeepseekConfig
from ..model.layout import first_few
from .profile import Profile, read_profile, refuse_other_model

SCORES = {"gate": "gate", "token": "picks"}
"""ESFT's names of its two scores, and the lists of a profile that hold them."""
THRESHOLD = 0.2
"""The part of the score that is chosen if no amount is given."""
CHOICE_FILE = "expert_cfg.json"
"""ESFT's name of the file that names the chosen experts."""


class Choice(NamedTuple):
    """The chosen experts of each layer that has some, and whether the shared experts train too."""

    experts: dict[int, list[int]]
    shared_experts: bool = False


def refuse_wrong_amount(threshold: float | None, share: float | None) -> None:
    """Raises a UserError if both are given, or one is outside of (0, 1]."""
    if threshold is not None and share is not None:
        raise UserError("--expert_threshold and --expert_share are both given; leave out one")
    for name, value in (("threshold", threshold), ("share", share)):
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--expert_{name} is {value:g}; it must be above 0 and at most 1")


def choose_experts(
    profile: Profile,
    score: str = "gate",
    threshold: float | None = None,
    share: float | None = None,
) -> dict[int, list[int]]:
    """The sorted numbers of each layer's experts with the highest scores. Of equal scores, the
    lower number is first.

    Args:
        score: `gate`, the mean gate weight, or `token`, how often an expert was picked.
        threshold: the smallest set is chosen that has this part of the layer's score; 1 chooses
            all experts that have any. 0.2 if neither `threshold` nor `share` is given.
        share: so many of a layer's experts are chosen, rounded to the nearest whole number.

    Raises:
        UserError: an amount is outside of (0, 1], the share keeps no expert, or a layer has no
            score.
    """
    refuse_wrong_amount(threshold, share)
    count = 0 if share is None else int(_exact(share) * profile.num_experts + Fraction(1, 2))
    if share is not None and not count:
        raise UserError(
            f"--expert_share {share:g} of {profile.num_experts} experts keeps none; give a larger "
            "share"
        )
    chosen = {}
    for number, layer in profile.layers.items():
        scores = [_exact(value) for value in getattr(layer, SCORES[score])]
        if not any(scores):
            raise UserError(f"layer {number} of the profile has no score at all; measure it anew")
        ranked = sorted(range(len(scores)), key=lambda expert: -scores[expert])  # stable
        wanted = _exact(threshold or THRESHOLD) * sum(scores)
        kept = ranked[: count or _reaching([scores[expert] for expert in ranked], wanted)]
        chosen[number] = sorted(kept)
    return chosen


def read_choice(
    file: str | Path,
    checkpoint: Path,
    score: str | None = None,
    threshold: float | None = None,
    share: float | None = None,
) -> Choice:
    """The choice by a profile of the model in the folder `checkpoint`, or as an expert_cfg.json of
    ESFT names it. No weight is loaded.

    Raises:
        UserError: it is neither, is of another model, or chooses nothing.
    """
    config = DeepseekConfig.from_pretrained(checkpoint)
    layers = config.moe_layers
    if not layers:
        raise UserError(f"{checkpoint} has no routed experts to choose from; leave out {file}")
    fields = _read_choice(Path(file))
    if "experts" not in fields:
        profile = read_profile(file)
        refuse_other_model(profile, file, fingerprint(checkpoint), layers, config.n_routed_experts)
        return Choice(choose_experts(profile, score or "gate", threshold, share))
    amounts = {"score": score, "threshold": threshold, "share": share}
    if given := [name for name, value in amounts.items() if value is not None]:
        raise UserError(
            f"--expert_{given[0]} has no effect on {file}, which names its experts; leave it out"
        )
    return _named_choice(file, fields, layers, config.n_routed_experts)


def choice_as_text(experts: dict[int, list[int]]) -> str:
    """The content of an expert_cfg.json."""
    named = {str(layer): numbers for layer, numbers in experts.items()}
    fields = {"experts": named, "shared_experts": False, "non_expert_modules": False}
    return json.dumps(fields) + "\n"


def _exact(value: float) -> Fraction:
    """The decimal as it is written, so that 0.2 of 5 equal scores is reached by one of them."""
    return Fraction(str(value))


def _reaching(ranked: list[Fraction], wanted: Fraction) -> int:
    """How many of the `ranked` scores sum up to `wanted`."""
    count, reached = 0, Fraction(0)
    while reached < wanted:
        reached += ranked[count]
        count += 1
    return count


def _read_choice(file: Path) -> dict[str, Any]:
    remedy = f"give a profile.json of examples/experts.py, or an {CHOICE_FILE} of ESFT"
    fields = read_object(file, remedy)
    if not {"experts", "layers"} & fields.keys():
        raise UserError(f"{file} chooses no experts; {remedy}")
    return fields


def _named_choice(
    file: str | Path, fields: dict[str, Any], layers: Sequence[int], num_experts: int
) -> Choice:
    """Checks what an expert_cfg.json says."""
    named, remedy = fields["experts"], "mend it, or give the one of this model"
    if not isinstance(named, dict) or not any(named.values()):
        raise UserError(f"{file} chooses no expert; name some, by layer")
    if unknown := sorted(named.keys() - {str(layer) for layer in layers}):
        raise UserError(
            f"{file} names layer {first_few(unknown)}; the layers with routed experts are "
            f"{layers[0]} to {layers[-1]}: {remedy}"
        )
    for layer, experts in named.items():
        wrong = not isinstance(experts, list) or [
            one for one in experts if type(one) is not int or not 0 <= one < num_experts
        ]
        if wrong:
            found = experts if wrong is True else wrong[0]
            raise UserError(
                f"{file}: {found!r} in layer {layer} is no expert; they are 0 to "
                f"{num_experts - 1}: {remedy}"
            )
        if len(set(experts)) < len(experts):
            raise UserError(f"{file} names an expert of layer {layer} twice; {remedy}")
    if fields.get("non_expert_modules"):
        raise UserError(
            f"{file} has non_expert_modules, which --trainable names one by one here; set it to "
            "false, and add --trainable"
        )
    experts = {int(layer): sorted(numbers) for layer, numbers in named.items() if numbers}
    return Choice(dict(sorted(experts.items())), bool(fields.get("shared_experts")))
