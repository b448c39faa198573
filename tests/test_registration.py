"""transformers knows the model: by its Auto classes, by name, and in the processes of others."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from text_fixtures import BUNDLED, ROOT
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from deepseek_moe import __main__ as runner
from deepseek_moe.__main__ import find_program

LINES = 'import transformers; print(transformers.DeepseekForCausalLM.__module__, "{}")'
KNOWS = 'import json, sys; print(*(name in sys.modules for name in ("torch", "transformers")))'


classifiers = pytest.mark.parametrize(
    "auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)


def python(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=120,
    )


def test_every_copy_of_transformers_has_the_class(tmp_path):
    """transformers imports itself anew when processing_utils is loaded."""
    program = (
        "import transformers as before\nimport transformers\n"
        "import sys, deepseek_moe\n"
        "for one in (transformers, sys.modules['transformers']):\n"
        "    assert one.DeepseekForCausalLM is deepseek_moe.DeepseekForCausalLM\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_a_program_and_its_children_know_the_model(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['RAN'] = 'yes'")
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LINES!r}])"
    file = tmp_path / "program.py"
    file.write_text(f"import os, sys\nprint(os.environ['RAN'], *sys.argv[1:], flush=True)\n{child}")
    done = python("-m", "deepseek_moe", file, "--one", "two", PYTHONPATH=f"{ROOT}:{tmp_path}")
    known = "deepseek_moe.model.modeling_deepseek {}"
    assert done.stdout.splitlines() == ["yes --one two", known], done.stderr


def test_a_process_that_needs_no_transformers_imports_none(tmp_path):
    """Here it is a module, which runs by its name."""
    (tmp_path / "program.py").write_text(KNOWS)
    done = python("-m", "deepseek_moe", "program", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("program", ["python3", "python", "pip"])
def test_programs_of_its_own_environment_come_first(program, tmp_path, monkeypatch):
    """Others of the same name may be on the PATH, as where the environment is not activated."""
    own, other = tmp_path / "environment" / program, tmp_path / "system" / program
    for file in (own, other):
        file.parent.mkdir()
        file.write_text("#!/bin/sh")
        file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    monkeypatch.setenv("PATH", str(other.parent))
    assert find_program(program) == [str(own)]
    assert find_program(str(other)) == [str(other)]
    own.unlink()
    assert find_program(program) == [str(other)]
    monkeypatch.delenv("PATH")
    assert find_program("no-such/command") is None


@pytest.mark.parametrize(("words", "code"), [((), 2), (("--help",), 0), (("no-such",), 2)])
def test_without_a_program_it_says_what_there_is(words, code, run_module, capsys):
    with pytest.raises(SystemExit, match=str(code)):
        run_module(runner, *words)
    out, err = capsys.readouterr()
    if words == ("no-such",):
        assert err.startswith("error: no-such is no command, Python module or file here")
    else:
        said = out if words else err
        assert "usage: python -m deepseek_moe PROGRAM ARGUMENTS..." in said
        assert "accelerate" in said


@classifiers
def test_classifiers_start_from_a_causal_model_and_load_again(auto_class, tmp_path):
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


@classifiers
def test_classifiers_take_the_experts_as_a_causal_model_does(auto_class):
    """By default, by name, and with a config that a causal model has used."""
    causal = AutoModelForCausalLM.from_pretrained(BUNDLED)
    wanted = causal.config._experts_implementation
    assert wanted == "grouped_mm"
    for model in (
        auto_class.from_pretrained(BUNDLED),
        auto_class.from_pretrained(BUNDLED, experts_implementation=wanted),
        auto_class.from_config(causal.config),
    ):
        assert model.config._experts_implementation == wanted
        assert model.model.config._experts_implementation == wanted
    slow = auto_class.from_pretrained(BUNDLED, experts_implementation="eager", num_labels=3)
    assert slow.config._experts_implementation == "eager"
    ids = torch.tensor([[5, 6, 7]])
    before = slow.eval()(ids).logits
    slow.set_experts_implementation(wanted)
    torch.testing.assert_close(slow(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_transformers_serve_listens_on_this_machine():
    from transformers.cli.serve import Serve

    assert inspect.signature(Serve.__init__).parameters["host"].default == "localhost"
