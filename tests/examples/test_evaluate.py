"""examples/evaluate.py: every figure that it writes, what it refuses, and how it goes on."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from example_fixtures import ENVIRONMENT, ROOT, Run, assert_error, run
from text_fixtures import BUNDLED, bundled_model, tokenizer_of

from deepseek_moe.errors import UserError
from deepseek_moe.evaluate.presets import NOTES, PRESETS, beside_published
from deepseek_moe.perplexity import measure_loss, read_held_out

pytest.importorskip("lm_eval", reason="lm_eval is not here: pip install lm_eval")
slow = pytest.mark.slow  # The harness takes seconds to import.
BOS = 4094
TEXT = "The old king had three sons and a bird of gold. " * 40
STORIES = ["The king was old. ", "A bird sang in the wood, and nobody heard it. ", "Once. "]
ROWS = [
    {
        "question": f"{STORIES[n % 3]}Was it {n}?",
        "choices": ["yes", "no, not at all", "a king"],
        "answer": n % 3,
        "story": STORIES[n % 3] * (n + 1),
    }
    for n in range(6)
]
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tell": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}} He said",
        "doc_to_target": "that",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "all_of_them": {"group": "all_of_them", "task": ["choose", "tell"]},
}


def write_tasks(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """JSON is YAML."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"dataset_path": "json", "test_split": "test"}
    files["dataset_kwargs"] = {"data_files": {"test": str(folder / "rows.jsonl")}}
    for name, task in tasks.items():
        config = task if "group" in task else {"task": name} | files | task
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, which are the only ones: to find the harness's own takes long."""
    from deepseek_moe.evaluate import tasks

    own = partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", own)
    return write_tasks(tmp_path / "tasks", TASKS)


@pytest.fixture
def evaluate(folder: Path, tmp_path: Path) -> Callable[..., tuple[Run, dict[str, Any]]]:
    """Runs the example on the tasks in `folder`, and returns its report too."""

    def evaluate(*options: object) -> tuple[Run, dict[str, Any]]:
        output = tmp_path / "scores.json"
        command = ["evaluate.py", "--include_path", folder, "--output_file", output, "--overwrite"]
        done = run(*command, *options)
        assert done.code == 0, done.err
        assert {file.name for file in tmp_path.iterdir()} >= {"scores.json", "tasks"}
        assert not list(tmp_path.glob("*.answers*"))
        return done, json.loads(output.read_text())

    return evaluate


def harness_says(folder: Path, tasks: list[str], **options: Any) -> dict[str, dict[str, Any]]:
    """The figures of the harness's own program and backend."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    bos = {"add_bos_token": False} if "read" in tasks else {}  # it would add a second one
    lm = HFLM(bundled_model(), tokenizer=tokenizer_of(BUNDLED), logits_cache=False, **bos)
    manager = TaskManager(include_path=folder, include_defaults=False)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, **options)["results"]


@slow
@pytest.mark.parametrize(
    ("tasks", "options", "theirs", "shots"),
    [
        ("all_of_them", [], {}, 0),
        ("choose,te*", ["--num_fewshot", 2, "--limit", 4], {"num_fewshot": 2, "limit": 4}, 2),
        ("choose", ["--apply_chat_template"], {"apply_chat_template": True}, 0),
        ("read", [], {}, 0),
    ],
)
def test_figures_are_those_of_the_harness(evaluate, folder, tasks, options, theirs, shots):
    done, report = evaluate("--tasks", tasks, *options)
    wanted = harness_says(folder, tasks.replace("te*", "tell").split(","), **theirs)
    assert report["tasks"].keys() == wanted.keys()
    counted = 0
    for task, figures in wanted.items():
        assert report["tasks"][task]["num_fewshot"] == shots
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                assert report["tasks"][task][name] == pytest.approx(value, rel=1e-5), name
                counted += 1
            if isinstance(value, float) and "stderr" not in name:
                line = rf"^{task} +{shots} +\d+ +{name} +{value:.4f}"
                assert re.search(line, done.out, flags=re.MULTILINE), done.out
    assert counted >= 3
    limit = theirs.get("limit")
    settings = {"limit": limit, "apply_chat_template": "apply_chat_template" in theirs}
    settings |= {"model": "models/tiny-base", "dtype": "float32", "perplexity": None, "preset": []}
    assert {name: report[name] for name in settings} == settings


@pytest.mark.parametrize(("options", "window"), [([], 1024), (["--window", 9], 9)])
def test_perplexity(tmp_path, monkeypatch, options, window):
    """The usual 2,048 are more than the bundled model's context. test_perplexity.py sums up."""
    text, output = tmp_path / "text.txt", tmp_path / "scores.json"
    text.write_text(TEXT, encoding="utf-8")
    command = ["evaluate.py", "--perplexity", text, "--output_file", output, *options]
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # it is not needed
    done = run(*command)
    assert done.code == 0, done.err
    held_out = read_held_out(text, tokenizer_of(BUNDLED))
    loss, report = (
        measure_loss(bundled_model(), held_out, window, BOS),
        json.loads(output.read_text()),
    )
    assert (report["tokens"], report["bytes"], report["window"]) == (loss.tokens, len(TEXT), window)
    assert report["perplexity"] == pytest.approx(loss.perplexity, rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(loss.bits_per_byte, rel=1e-5)
    assert f"perplexity {report['perplexity']:.4f}, bits a byte {report['bits_per_byte']:.4f}" in (
        done.out
    )
    assert f"windows of {window:,} tokens: each begins with BOS, and none overlap" in done.out
    assert_error(run(*command), "scores.json is there already", "--overwrite")


# --- Presets


@slow
def test_a_preset_prints_the_published_figures_beside(tmp_path, folder, evaluate):
    shutil.rmtree(folder)
    rows = PRESETS["olmes"]
    write_tasks(folder, {row.task: TASKS["choose"] for row in rows})
    done, report = evaluate("--preset", "olmes", "--limit", 3)
    assert [line["benchmark"] for line in report["preset"]] == [
        *(r.benchmark for r in rows),
        "average",
    ]
    for row, line in zip(rows, report["preset"], strict=False):
        figures = report["tasks"][row.task]
        assert figures["num_fewshot"] == row.shots == line["shots"] == 5
        assert line["measured"] == 100 * figures[row.metric]
        assert line["published"] == row.published
        assert line["differs"] == f"{row.differs}; the first 3 questions of each task"
        shown = rf"^{row.benchmark} +5 +{row.published} +{line['measured']:.1f} \* {row.task} "
        assert re.search(shown, done.out, flags=re.MULTILINE), done.out
    measured = [line["measured"] for line in report["preset"]]
    assert measured[-1] == pytest.approx(sum(measured[:-1]) / 10)
    assert NOTES["olmes"] in done.out


def test_a_row_of_a_preset_that_is_not_measured():
    rows = PRESETS["paper"]
    results = {row.task: {row.metric: 0.25} for row in rows if row.task}
    lines = {line["benchmark"]: line for line in beside_published("paper", results)}
    assert (lines["Pile"]["measured"], lines["MMLU"]["measured"]) == (0.25, 25.0)
    assert lines["CHID"]["measured"] is None and lines["CHID"]["differs"]
    assert lines["MMLU"]["differs"] == ""


def test_published_figures_are_those_of_the_page():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page.split("**DeepSeekMoE 16B Base**")[1].split("**DeepSeekMoE 16B Chat**")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 5 and re.fullmatch(r"[\d.]+", cells[4]):
            found[cells[0].split(" (")[0]] = (int((cells[1] or "0").split("-")[0]), cells[4])
    assert found == {row.benchmark: (row.shots, f"{row.published}") for row in PRESETS["paper"]} | {
        "Pile": (0, "0.74")
    }
    for row in PRESETS["olmes"]:
        assert re.search(rf"^\| {row.benchmark} \| {row.published} \|", page, flags=re.MULTILINE)


@slow
def test_the_harness_has_the_tasks_and_metrics_of_the_presets():
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index = TaskManager().task_index
    for row in {row for rows in PRESETS.values() for row in rows if row.task}:
        config = load_yaml(index[row.task].yaml_path, resolve_func=False, recursive=True)
        metric, answer = row.metric.split(",")
        metrics = config.get("metric_list") or config["aggregate_metric_list"]
        assert metric in [one["metric"] for one in metrics], row
        if "group" not in config:
            names = [one["name"] for one in config.get("filter_list") or [{"name": "none"}]]
            assert answer in names, row
            assert not config.get("unsafe_code")


# --- What goes wrong


@slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "there is nothing to measure"),
        ("--preset paper --tasks choose", "--preset chooses tasks and shots itself"),
        ("--preset paper --num_fewshot 2", "--preset chooses tasks and shots itself"),
        ("--perplexity {text} --limit 3", "--limit has no effect"),
        ("--tasks choose --window 9", "--window has no effect"),
        ("--perplexity {text} --window 1", "--window is 1"),
        ("--tasks choose --num_fewshot -1", "it must be"),
        ("--tasks choose --limit 0", "must be 1 or more"),
        ("--tasks chose --include_path {folder}", "there is no task chose; did you mean choose?"),
        ("--tasks choose --include_path {text}", "text.txt is no folder"),
        ("--tasks broken --include_path {folder}", "task broken cannot be loaded"),
        ("--tasks code --include_path {folder}", "code runs code that the model writes"),
        ("--perplexity {folder}/none.txt", "cannot be read"),
        ("--perplexity {text} --model /no/such", "/no/such does not exist"),
        ("--perplexity {text} --output_file {folder}", "cannot be written"),
        ("--perplexity {text} --output_file {text}", "is there already"),
    ],
)
def test_wrong_use_is_refused_before_weights_are_loaded(options, said, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    missing = {"dataset_kwargs": {"data_files": {"test": "absent.jsonl"}}}
    (folder / "broken.yaml").write_text(
        json.dumps({"task": "broken", "dataset_path": "json"} | TASKS["choose"] | missing)
    )
    code = json.loads((folder / "tell.yaml").read_text()) | {"task": "code", "unsafe_code": True}
    (folder / "code.yaml").write_text(json.dumps(code))
    words = options.format(text=text, folder=folder).split()
    with patch("deepseek_moe.decode.load.load", None):
        assert_error(run("evaluate.py", *words), said)


@slow
def test_tasks_find_the_library_that_has_the_name_of_the_example():
    def found(*_: object) -> None:
        raise UserError(f"found {PathFinder.find_spec('evaluate', sys.path).origin}; good")

    with patch("deepseek_moe.evaluate.tasks.load_tasks", found):
        assert_error(run("evaluate.py", "--tasks", "xquad"), "evaluate/__init__.py")


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "deepseek_moe.evaluate.tasks", raising=False)
    assert_error(run("evaluate.py", "--tasks", "piqa"), 'pip install "lm_eval[math]"')


KILLED = """
import os, runpy, signal, sys
from functools import partial
from importlib.machinery import PathFinder
from deepseek_moe.evaluate import scoring, tasks

def killed(*args, made=[]):
    made.append(1)
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(*args)

score, scoring._score_batch, scoring.MOST_ON_CPU = scoring._score_batch, killed, 60
tasks.TaskManager = partial(tasks.TaskManager, include_defaults=False)
sys.path.insert(0, "examples")
runpy.run_path("examples/evaluate.py", run_name="__main__")
"""


@slow
def test_a_killed_run_is_gone_on_with(evaluate, folder, tmp_path, monkeypatch):
    from deepseek_moe.evaluate import scoring

    monkeypatch.setattr(scoring, "MOST_ON_CPU", 60)
    options = ["--tasks", "choose", "--limit", 4]
    _, whole = evaluate(*options)
    output = tmp_path / "scores.json"
    output.unlink()
    words = ["--include_path", folder, "--output_file", output, *options]
    command = [sys.executable, "-c", KILLED, *map(str, words)]
    killed = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    [answers] = tmp_path.glob("scores.json.*.answers")
    other = run("evaluate.py", *words, "--dtype", "bfloat16")
    assert other.code == 0 and "goes on with" not in other.err
    output.unlink()
    scored: list[int] = []
    score = scoring._score_batch
    monkeypatch.setattr(
        scoring, "_score_batch", lambda g, pairs: scored.append(len(pairs)) or score(g, pairs)
    )
    done, report = evaluate(*options)
    assert f"goes on with the answers in {answers}" in done.err
    assert report == whole
    assert 0 < sum(scored) < 12  # 4 questions of 3 answers
