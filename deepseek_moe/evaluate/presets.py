"""Tasks of lm-evaluation-harness that are nearest to published settings, beside their figures."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A published figure, and how the harness comes nearest to it."""

    benchmark: str
    published: float  # per cent, or bits a byte
    shots: int = 0
    task: str = ""  # empty: it is not measured
    metric: str = "acc,none"
    differs: str = ""  # in what the setting is known to differ


UNSTATED = "the paper does not say how it weighs the lengths of answers"
NO_TASK = "the harness has no such task"
RUNS_CODE = "not measured: it runs code that the model writes"
PAPER = (
    Row("Pile", 0.74, 0, "pile_10k", "bits_per_byte,none", "10,000 documents of its training set"),
    Row("HellaSwag", 77.1, 0, "hellaswag", "acc_norm,none", UNSTATED),
    Row("PIQA", 80.2, 0, "piqa", "acc_norm,none", UNSTATED),
    Row("ARC-easy", 68.1, 0, "arc_easy", "acc_norm,none", UNSTATED),
    Row("ARC-challenge", 49.8, 0, "arc_challenge", "acc_norm,none", UNSTATED),
    Row("RACE-middle", 61.9, 5, differs=NO_TASK),
    Row("RACE-high", 46.4, 5, "race", differs="the examples are from the test set"),
    Row("DROP", 32.9, 1, "drop", "em,none", "an answer ends at its first full stop"),
    Row("GSM8K", 18.8, 8, "gsm8k", "exact_match,strict-match"),
    Row("MATH", 4.3, 4, "minerva_math", "exact_match,none"),
    Row("HumanEval", 26.8, 0, differs=RUNS_CODE),
    Row("MBPP", 39.2, 3, differs=RUNS_CODE),
    Row("TriviaQA", 64.8, 5, "triviaqa", "exact_match,remove_whitespace"),
    Row("NaturalQuestions", 25.5, 5, "nq_open", "exact_match,remove_whitespace"),
    Row("MMLU", 45.0, 5, "mmlu"),
    Row("WinoGrande", 70.2, 0, "winogrande"),
    Row("CLUEWSC", 72.1, 5, differs=NO_TASK),
    Row("CEval", 40.6, 5, "ceval-valid", differs="its validation questions"),
    Row("CMMLU", 42.5, 5, "cmmlu"),
    Row("CHID", 89.4, 0, differs=NO_TASK),
)
"""The base model in arXiv 2401.06066, table 3."""

BY_TEXT = "scored by text only"
PER_TOKEN = "scored by text only, not by answer length"
PMI = "scored by text only; divided by length, not by the answer's own probability"
OLMES = (
    Row("ARC-C", 53.4, 5, "arc_challenge", "acc_norm,none", PMI),
    Row("ARC-E", 82.7, 5, "arc_easy", "acc_norm,none", BY_TEXT),
    Row("BoolQ", 81.9, 5, "boolq", differs=BY_TEXT),
    Row("CSQA", 72.7, 5, "commonsense_qa", differs="scored by letter only"),
    Row("HellaSwag", 80.4, 5, "hellaswag", "acc_norm,none", BY_TEXT),
    Row("MMLU", 45.5, 5, "mmlu", differs="scored by letter only; mean over questions"),
    Row("OBQA", 58.4, 5, "openbookqa", "acc_norm,none", PMI),
    Row("PIQA", 80.1, 5, "piqa", "acc_norm,none", BY_TEXT),
    Row("SIQA", 59.9, 5, "social_iqa", differs=PER_TOKEN),
    Row("WinoGrande", 73.2, 5, "winogrande", differs=BY_TEXT),
)
"""The base model in arXiv 2406.08446, table 13."""

PRESETS = {"paper": PAPER, "olmes": OLMES}
NOTES = {
    "paper": "Published: DeepSeekMoE 16B Base, arXiv 2401.06066, by its authors' own prompts, "
    "which are not public. All prompts and examples here are the harness's.",
    "olmes": "Published: DeepSeekMoE 16B Base, arXiv 2406.08446: the better of scoring by letter "
    "and by text, with chosen examples and at most 1,000 questions of a large set. Here the "
    "harness's prompts, random examples and all questions are used.",
}


def beside_published(
    preset: str, results: Mapping[str, Mapping[str, Any]], other: str = ""
) -> list[dict[str, Any]]:
    """A line for each figure of a preset, with what was measured in the same unit.

    Args:
        results: the harness's, by task.
        other: in what this run differs besides, such as a limit.
    """
    lines = []
    for row in PRESETS[preset]:
        line = row._asdict() | {"measured": None}
        if row.task:
            value = results[row.task][row.metric]
            line["measured"] = value if "bits_per_byte" in row.metric else 100 * value
            line["differs"] = "; ".join(filter(None, [row.differs, other]))
        lines.append(line)
    if preset == "olmes":
        mean = statistics.mean(line["measured"] for line in lines)
        lines.append(Row("average", 68.8, 5)._asdict() | {"measured": mean, "differs": other})
    return lines
