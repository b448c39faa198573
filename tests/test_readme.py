"""What the README and docs/ say is true: snippets run, commands exist, figures were measured."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example_fixtures import run as run_example
from finetune_options import OLD_NAMES

from deepseek_moe import export, prune

ROOT = Path(__file__).resolve().parents[1]
MODELS_README = ROOT / "models" / "README.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
EVERYTHING = "\n".join(PAGE.values())


def run(*command: object) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


def blocks(text: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fences if name == language]


def commands(text: str) -> list[list[str]]:
    """The commands in the bash blocks, split into words."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def test_the_readme_is_three_screens():
    assert len(PAGE["README"].splitlines()) < 160
    assert len(PAGE["README"].split()) <= 1600


@pytest.mark.parametrize(
    "snippet", [block for text in PAGE.values() for block in blocks(text, "python")]
)
def test_python_snippets_run_with_the_bundled_model(snippet, capsys):
    bundled = repr(str(ROOT / "models/tiny-base"))
    local = re.sub(r'"deepseek-ai/deepseek-moe-16b-\w+"', lambda _: bundled, snippet)
    assert local != snippet
    exec(compile(local.replace("max_new_tokens=100", "max_new_tokens=5"), "page", "exec"), {})
    assert capsys.readouterr().out.strip()


def arguments_of(program: str) -> list[list[str]]:
    """What follows the program in each command that runs it."""
    used = []
    for words in commands(EVERYTHING):
        used += [words[at + 1 :] for at, word in enumerate(words[:4]) if word.endswith(program)]
    assert used
    return used


@pytest.mark.parametrize(
    ("program", "page"),
    [
        ("examples/completion.py", "inference"),
        ("examples/chat.py", "inference"),
        ("examples/web_chat.py", "inference"),
        ("examples/experts.py", "experts"),
        ("examples/evaluate.py", "evaluation"),
        ("finetune.py", None),
    ],
)
def test_commands_use_options_that_exist(program, page):
    file = program if "/" in program else f"finetune/{program}"
    shown = run(file, "--help").stdout
    for option in {word for words in arguments_of(program) for word in words if word[:2] == "--"}:
        assert re.search(rf"{option}[ ,\n]", shown) or option in OLD_NAMES, option
    if page:
        options = set(re.findall(r"--\w+", shown)) - {"--help"}
        assert len(options) > 8
        assert not {option for option in options if f"`{option}`" not in PAGE[page]}


@pytest.mark.parametrize("module", [export, prune])
def test_commands_of_modules_are_understood(module, monkeypatch):
    for words in arguments_of(module.__name__):
        monkeypatch.setattr(sys, "argv", ["program", *words])
        module.parse_arguments()


def test_programs_and_files_that_are_named_exist():
    named = {word for words in commands(EVERYTHING) for word in words if word.endswith(".py")}
    named |= set(re.findall(r"`(?:python )?((?:tests|benchmarks|examples)/[\w/]+\.py)", EVERYTHING))
    for file in named:
        assert (ROOT / file).is_file() or (ROOT / "finetune" / file).is_file(), file


@pytest.mark.slow
def test_the_laptop_block_does_what_it_says(tmp_path):
    """From the first command after the installation, but for TensorBoard, which does not end."""
    block = next(b for b in blocks(PAGE["README"], "bash") if "git clone" in b)
    lines = block.replace("\\\n", " ").splitlines()
    assert lines[0].startswith("git clone") and lines[-1].startswith("tensorboard --logdir")
    assert [line.split()[0] for line in lines[2:4]] == ["pip", "pip"]
    said = ""
    for line in lines[4:-1]:
        words = shlex.split(line.replace("output/sample", str(tmp_path)))
        assert words[0] == "python"
        done = run(*words[1:])
        assert done.returncode == 0, done.stderr
        said += done.stdout
        losses = [float(loss) for loss in re.findall(r"  loss ([\d.]+)", done.stderr)]
        assert not losses or sum(losses[-5:]) < sum(losses[:5]) / 2
    assert "I am tiny-chat" in said and "grinds grain into flour" in said
    assert list((tmp_path / "runs").rglob("events.*"))


@pytest.mark.slow
def test_the_commands_of_evaluation_that_need_no_hub_run(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not here: pip install lm_eval")
    (tmp_path / "tasks").mkdir()
    for language, name in (("yaml", "capitals.yaml"), ("json", "capitals.jsonl")):
        [content] = blocks(PAGE["evaluation"], language)
        (tmp_path / "tasks" / name).write_text(content)
    shutil.copy(ROOT / "LICENSE-MODEL", tmp_path)
    local = [words for words in commands(PAGE["evaluation"]) if "--model" not in words]
    assert len(local) == 3
    for _, script, *options in local:
        words = [sys.executable, ROOT / script, *options]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^capitals +0 +2 +acc,none|^perplexity \d", done.stdout, re.MULTILINE)


def test_the_first_output_is_the_real_one():
    shown = re.search(r"^> (.*?)…", PAGE["README"], flags=re.DOTALL | re.MULTILINE)[1]
    command = next(words for words in commands(PAGE["README"]) if words[0] == "python")
    done = run_example(command[1].removeprefix("examples/"), *command[2:], "--device", "cpu")
    assert " ".join(done.out.split()).startswith(" ".join(shown.replace("\n> ", " ").split()))


def test_the_requirements_files_exist_and_are_pinned():
    files = set(re.findall(r"-r (requirements[\w.-]+)", EVERYTHING))
    assert files == {f"requirements{kind}.txt" for kind in ("", "-dev", "-interop")}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            assert re.match(r"(#|$|-e \.|triton|[^#]*==)", line.strip()), line
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text()
    assert "pip install torch==2.13.0" in PAGE["README"]


def test_the_tree_lists_every_file():
    """docs/code.md names each file of the package, the scripts and the benchmarks, and no other."""
    tree = next(block for block in blocks(PAGE["code"], "") if "deepseek_moe/\n" in block)
    listed, folders = set(), []
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.rstrip("/")]
        listed.add("/".join(folders))
    assert all((ROOT / path).exists() for path in listed)
    rooms = ["deepseek_moe", "examples", "finetune", "benchmarks", "images"]
    tracked = subprocess.run(["git", "ls-files", *rooms], capture_output=True, text=True, cwd=ROOT)
    for file in tracked.stdout.splitlines():
        if file.endswith((".py", ".json")) and not file.endswith("__init__.py"):
            assert file in listed, f"{file} is not in docs/code.md"


def test_the_tree_of_the_readme_is_there():
    tree = next(block for block in blocks(PAGE["README"], "") if "deepseek_moe/\n" in block)
    for line in tree.splitlines():
        name = line.split()[0]
        folder = ROOT / "deepseek_moe" if line.startswith("  ") else ROOT
        assert (folder / name).exists(), name


@pytest.mark.parametrize("page", [*PAGES, MODELS_README], ids=lambda page: page.stem)
def test_links_and_pictures_are_there(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in (t for t in targets if not t.startswith("http")):
        file, _, section = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_each_promise_of_security_names_a_test_that_is_there():
    rows = [row for row in SECURITY.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 5
    for row in rows:
        file = ""
        named = re.findall(r"`([\w/.]*)::(\w+)`", row)
        assert named, row
        for path, test in named:
            file = path or file
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_a_figure_stands_once_and_is_the_measured_one():
    """The README's rates of fine-tuning are those of the measurement that the picture draws."""
    lines = json.loads((ROOT / "images/train.json").read_text())["lines"]
    rates = {f"{line['tokens_s']:,.0f}" for line in lines if line["tokens_s"]}
    rows = [row for row in PAGE["README"].splitlines() if re.match(r"\| (all weights|QLoRA)", row)]
    assert len(rows) == 4
    assert {row.rstrip("| ").rpartition("| ")[2] for row in rows} <= rates


def test_the_figures_of_the_bundled_model_are_the_measured_ones():
    text = MODELS_README.read_text(encoding="utf-8")
    report = json.loads((ROOT / "models/tiny-base/training.json").read_text())
    test = report["test"]
    row = next(line for line in text.splitlines() if "bundled**" in line)
    assert f"**{test['loss']:.3f}**" in row
    assert f"**{test['bits_per_byte']:.3f}**" in row
    assert f"{report['parameters']:,}" in text
    loads = [share for layer in test["expert_load"] for share in layer]
    assert f"between {min(loads)} and {max(loads)} times" in text
    for name in ("tiny-base", "tiny-chat"):
        assert (ROOT / f"models/{name}/model.safetensors").stat().st_size <= 16 * 2**20


def test_the_training_script_runs_on_other_text(tmp_path, monkeypatch, capsys):
    rows = [{"split": s, "text": "The cat sat.\n\nThe dog ran.\n\n" * 20} for s in ("val", "test")]
    rows += [{"text": f"Story {n}.\n\nThe cat saw {n} dogs.\n\n" * 20} for n in range(5)]
    text, script = tmp_path / "text.jsonl", str(ROOT / "models/train_tiny.py")
    text.write_text("\n".join(json.dumps(row) for row in rows))
    options = "--tokens 512 --batch_size 2 --length 64 --evaluations 1 --no-compile"
    words = [script, *options.split(), "--text", str(text), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(script, run_name="__main__")
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["test"]["bits_per_byte"] > 0
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="2"):  # it would write over the first one's model
        runpy.run_path(script, run_name="__main__")
    assert "has a config.json already" in capsys.readouterr().err
