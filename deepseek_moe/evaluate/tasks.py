"""Tasks of lm-evaluation-harness: found and read before any weights, then run."""

import difflib
import json
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM, CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from ..errors import UserError, as_user_error

SEED = 1234  # the harness's own, so that it draws the examples that `lm_eval` draws
Tasks = dict[str, dict[str, Any]]
"""What the harness loads: tasks and groups by name."""


def load_tasks(shots: Mapping[str, int | None], include_path: Path | None = None) -> Tasks:
    """Reads tasks, groups, tags or patterns such as `mmlu_*`, and their data.

    Args:
        shots: how many examples stand before each question, by task; None leaves the task's own
            number, or 0. A task that is made for 0 keeps it, as in the harness.
        include_path: a folder of further tasks in YAML, which come before the harness's own.

    Raises:
        UserError: there is no such task, its data cannot be read, or it runs a model's code.
    """
    if include_path and not include_path.is_dir():
        raise UserError(f"{include_path} is no folder; give a folder of tasks in YAML")
    random.seed(0)  # tasks may shuffle while they are read
    np.random.seed(SEED)
    manager = TaskManager(include_path=include_path)
    tasks: Tasks = {"tasks": {}, "groups": {}, "group_map": {}}
    for pattern, wanted in shots.items():
        names = manager.match_tasks([pattern])
        if not names:
            near = difflib.get_close_matches(pattern, manager.all_tasks, 1)
            hint = f"did you mean {near[0]}?" if near else "lm_eval ls tasks lists them"
            raise UserError(f"there is no task {pattern}; {hint}")
        remedy = "see that its data can be reached, or give other tasks"
        with as_user_error(f"task {pattern} cannot be loaded", remedy):
            loaded = manager.load(names)
        for name, task in loaded["tasks"].items():
            _prepare(name, task, wanted)
        for part, found in tasks.items():
            found.update(loaded[part])
    return tasks


def _prepare(name: str, task: Any, shots: int | None) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name} runs code that the model writes; run it with lm_eval itself")
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=SEED)


class Answers(dict[str, Any]):
    """Answers by the hashes of their requests, each of which is at once a line of JSON in a file.

    The harness's own database unpickles what it reads, which a file of a stranger could abuse.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.stream = file.open("a+", encoding="utf-8")
        self.stream.seek(0)
        for line in self.stream:
            with suppress(ValueError, TypeError):  # it was cut off when its process was killed
                key, answer = json.loads(line)
                super().__setitem__(key, tuple(answer) if isinstance(answer, list) else answer)
        self.stream.write("\n")  # ends such a line

    def __setitem__(self, key: str, answer: Any) -> None:
        if key not in self:
            self.stream.write(json.dumps([key, answer]) + "\n")
            self.stream.flush()
        super().__setitem__(key, answer)

    def commit(self) -> None:
        """Nothing is left to do."""


class RememberingLM(CachingLM):
    """Asks `lm` what is not among the answers in `file`, and adds it there."""

    def __init__(self, lm: LM, file: Path) -> None:
        self.lm, self.cache_db, self.dbdict = lm, str(file), Answers(file)
        lm.set_cache_hook(self.get_cache_hook())


def run_tasks(
    lm: LM, tasks: Tasks, limit: int | None, chat: bool, answers: Path | None
) -> dict[str, dict[str, Any]]:
    """The harness's figures of each task and group, with the shots and `sample_len` questions.

    Args:
        limit: the first so many questions of each task.
        chat: prompts are written as conversations, by the model's chat template.
        answers: a file of answers, with which a run that was interrupted goes on.
    """
    torch.manual_seed(SEED)
    found = evaluate(
        lm=RememberingLM(lm, answers) if answers else lm,
        task_dict=tasks,
        limit=limit,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return {
        name: {key: value for key, value in values.items() if isinstance(value, (int, float))}
        | {"num_fewshot": found["n-shot"].get(name)}
        for name, values in found["results"].items()
    }
