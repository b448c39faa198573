"""transformers knows the model: by its Auto classes, by name, and in the processes of others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from text_fixtures import BUNDLED, ROOT
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

LINES = 'import transformers; print(transformers.DeepseekForCausalLM.__module__, "{}")'
KNOWS = 'import json, sys; print(*(name in sys.modules for name in ("torch", "transformers")))'


def python(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=120,
    )


def test_every_copy_of_transformers_has_the_class(tmp_path: Path) -> None:
    """transformers imports itself anew when processing_utils is loaded."""
    program = (
        "import transformers as before\nimport transformers\n"
        "import sys, deepseek_moe\n"
        "for one in (transformers, sys.modules['transformers']):\n"
        "    assert one.DeepseekForCausalLM is deepseek_moe.DeepseekForCausalLM\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_a_program_and_its_children_know_the_model(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['RAN'] = 'yes'")
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LINES!r}])"
    file = tmp_path / "program.py"
    file.write_text(f"import os, sys\nprint(os.environ['RAN'], *sys.argv[1:], flush=True)\n{child}")
    done = python("-m", "deepseek_moe", file, "--one", "two", PYTHONPATH=f"{ROOT}:{tmp_path}")
    known = "deepseek_moe.model.modeling_deepseek {}"
    assert done.stdout.splitlines() == ["yes --one two", known], done.stderr


def test_a_process_that_needs_no_transformers_imports_none(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(KNOWS)
    assert python("-m", "deepseek_moe", file).stdout == "False False\n"


def test_a_module_runs_by_its_name() -> None:
    done = python("-m", "deepseek_moe", "json.tool", "--help")
    assert done.stdout.startswith("usage: "), done.stderr


def test_a_command_is_looked_for_beside_this_python_first(tmp_path: Path) -> None:
    """So that it finds what is installed with the model. A path names one file."""
    for name in (Path(sys.executable).name, "only-there"):
        (tmp_path / name).write_text("#!/bin/sh\necho found\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    own = python("-m", "deepseek_moe", Path(sys.executable).name, "-c", LINES, PATH=path)
    assert own.stdout == "deepseek_moe.model.modeling_deepseek {}\n", own.stderr
    for command in ("only-there", tmp_path / "only-there"):
        assert python("-m", "deepseek_moe", command, PATH=path).stdout == "found\n"


@pytest.mark.parametrize(("words", "code"), [((), 2), (("--help",), 0), (("no-such",), 2)])
def test_without_a_program_it_says_what_there_is(words: tuple[str, ...], code: int) -> None:
    done = python("-m", "deepseek_moe", *words)
    assert done.returncode == code
    if words == ("no-such",):
        assert done.stderr.startswith("error: no-such is no command, Python module or file here")
    else:
        said = done.stdout if words else done.stderr
        assert "usage: python -m deepseek_moe PROGRAM ARGUMENTS..." in said
        assert "accelerate" in said


@pytest.mark.parametrize(
    "auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_classifiers_start_from_a_causal_model_and_load_again(
    auto_class: type, tmp_path: Path
) -> None:
    model = auto_class.from_pretrained(BUNDLED, num_labels=3, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(BUNDLED)(
        ["Once", "A king who"], return_tensors="pt", padding=True
    )
    labels = torch.ones_like(words.input_ids)
    if auto_class is AutoModelForSequenceClassification:
        labels = labels[:, 0]
    model.train()(**words, labels=labels).loss.backward()
    assert model.score.weight.grad.any()
    assert model.model.layers[1].mlp.experts.down_proj.grad.any()
    model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert again.num_labels == 3
    assert torch.equal(again(**words).logits, model.eval()(**words).logits)
