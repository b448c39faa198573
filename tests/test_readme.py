"""What the READMEs say is so: snippets run, commands exist, figures are the measured ones."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_options import OLD_NAMES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS_README = (ROOT / "models" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


@pytest.mark.parametrize("snippet", blocks("python"), ids=["completion", "chat", "generator"])
def test_python_snippets_run_with_the_bundled_model(snippet, capsys):
    local = re.sub(
        r'"deepseek-ai/deepseek-moe-16b-\w+"', repr(str(ROOT / "models/tiny-base")), snippet
    )
    assert local != snippet
    exec(compile(local.replace("max_new_tokens=100", "max_new_tokens=5"), "README", "exec"), {})
    assert capsys.readouterr().out.strip()


def commands() -> list[list[str]]:
    """The python and deepspeed commands of the bash blocks, split into words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.startswith(("python ", "deepspeed "))]


@pytest.mark.parametrize(
    "program, script",
    [
        ("examples/completion.py", "examples/completion.py"),
        ("examples/chat.py", "examples/chat.py"),
        ("finetune/finetune.py", "finetune/finetune.py"),
        ("finetune.py", "finetune/finetune.py"),  # by deepspeed, in its folder
        ("-m deepseek_moe.export", "-m deepseek_moe.export"),
    ],
)
def test_commands_use_options_that_exist(program, script):
    used = [words for words in commands() if " ".join(words[1:]).startswith(program + " ")]
    assert used
    shown = subprocess.run(
        [sys.executable, *script.split(), "--help"], capture_output=True, text=True, cwd=ROOT
    ).stdout
    for option in (word for words in used for word in words if word.startswith("--")):
        assert option in shown or option in OLD_NAMES, option


@pytest.mark.slow
def test_the_sample_is_learnt_and_chatted_with(tmp_path):
    tune, talk = (
        [word.replace("output/sample", str(tmp_path)) for word in words]
        for words in commands()
        if "output/sample" in words
    )
    done = [
        subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT)
        for words in (tune, talk)
    ]
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    losses = [float(loss) for loss in re.findall(r"  loss ([\d.]+)", done[0].stderr)]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert "two brothers were" in done[1].stdout


def test_the_requirements_files_exist_and_are_pinned():
    files = re.findall(r"-r (\S+)", "\n".join(blocks("bash")))
    assert set(files) == {"requirements.txt", "requirements-dev.txt"}
    for file in set(files):
        lines = [x.split("#")[0].strip() for x in (ROOT / file).read_text().splitlines()]
        assert all("==" in line or line == "-e ." for line in lines if line)


def test_the_tree_lists_every_module_and_example():
    tree = next(block for block in blocks("") if "deepseek_moe/\n" in block)
    folders = {"deepseek_moe": "*.py", "examples": "*.py", "finetune": "*.py", "benchmarks": "*.py"}
    for folder, pattern in folders.items():
        for file in (ROOT / folder).glob(pattern):
            assert f"  {file.name} " in tree, f"{file.name} is not in the README's tree"
    folder = None
    for line in tree.splitlines():
        name = line.split()[0]
        if line[0] != " ":
            folder = ROOT / name
            assert folder.exists(), name
        elif line.startswith("  ") and line[2] != " ":
            assert (folder / name).exists(), name


@pytest.mark.parametrize("text, at", [(README, ROOT), (MODELS_README, ROOT / "models")])
def test_links_and_pictures_are_there(text, at):
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in (t for t in targets if not t.startswith("http")):
        assert (at / target).exists(), target


def test_the_figures_of_the_bundled_model_are_the_measured_ones():
    report = json.loads((ROOT / "models/tiny-base/training.json").read_text())
    test = report["test"]
    row = next(line for line in MODELS_README.splitlines() if "bundled**" in line)
    assert f"**{test['loss']:.3f}**" in row
    assert f"**{test['bits_per_byte']:.3f}**" in row
    assert f"{report['parameters']:,}" in MODELS_README
    loads = [share for layer in test["expert_load"] for share in layer]
    assert f"between {min(loads)} and {max(loads)} times" in MODELS_README
    for name in ("tiny-base", "tiny-chat"):
        assert (ROOT / f"models/{name}/model.safetensors").stat().st_size <= 16 * 2**20


def test_the_training_script_runs_on_other_text(tmp_path):
    rows = [{"split": s, "text": "The cat sat.\n\nThe dog ran.\n\n" * 20} for s in ("val", "test")]
    rows += [{"text": f"Story {n}.\n\nThe cat saw {n} dogs.\n\n" * 20} for n in range(5)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps(row) for row in rows))
    options = "--tokens 512 --batch_size 2 --length 64 --evaluations 1 --no-compile --output"
    command = [sys.executable, ROOT / "models/train_tiny.py", "--text", text, *options.split()]
    for code in (0, 2):  # the second one would write over the first one's model
        done = subprocess.run([*command, tmp_path], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code, done.stderr
    assert "has a config.json already" in done.stderr
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["test"]["bits_per_byte"] > 0
    assert (tmp_path / "model.safetensors").exists()
