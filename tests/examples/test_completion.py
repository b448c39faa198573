"""examples/completion.py, and what both examples do with options, errors, pipes and signals."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from example_fixtures import ENVIRONMENT, EXAMPLES, LONG, Runner, assert_error
from safetensors.torch import load_file, save_file
from text_fixtures import BUNDLED, ROOT, bundled_model, tokenizer_of

from deepseek_moe import Generator
from deepseek_moe.decode.completion_file import CompletionFile
from deepseek_moe.decode.prompts import noted_interrupts, read_prompts
from deepseek_moe.decode.sampling import Sampling, make_sampler
from deepseek_moe.errors import UserError

both_scripts = pytest.mark.parametrize("script", ["completion.py", "chat.py"])


def completed(prompt: str, new: int) -> str:
    """The prompt and what the library makes of it, without the examples."""
    tokenizer = tokenizer_of(BUNDLED)
    (ids,) = Generator(bundled_model()).generate(
        [tokenizer(prompt).input_ids], new, stop_ids={tokenizer.eos_token_id}
    )
    return prompt + tokenizer.decode(ids, skip_special_tokens=True)


def test_streams_one_prompt(run: Runner) -> None:
    done = run("completion.py", "--prompt", "The old man", "--max_new_tokens", 12)
    assert done.code == 0
    assert done.out == completed("The old man", 12) + "\n"
    assert re.search(r"12 tokens in [\d.]+ s: [\d.]+ tokens/s", done.err)


def test_several_prompts_are_separated_by_an_empty_line(run: Runner, tmp_path: Path) -> None:
    prompts, output = ["The old man", "Once", "It was late, and the rain"], tmp_path / "out.jsonl"
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    given += ["--max_new_tokens", 8, "--batch_size", 2]
    texts = [completed(prompt, 8) for prompt in prompts]
    done = run("completion.py", *given)
    assert done.out == "\n\n".join(texts) + "\n"
    assert "tokens/s" in done.err
    assert run("completion.py", *given, "--output_file", output).out == ""
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] + row["completion"] for row in rows] == texts


def test_prompts_of_the_command_line_and_a_file(tmp_path: Path) -> None:
    """A line may have several forms. Empty lines are skipped."""
    file = tmp_path / "prompts.txt"
    prompts = {
        "plain text, {not} JSON": "plain text, {not} JSON",
        '"a JSON \\"string\\""': 'a JSON "string"',
        '{"prompt": "an object\\nof two lines", "id": 7}': "an object\nof two lines",
        '"Who are you?" he said': '"Who are you?" he said',
        "Crème brûlée 🎉": "Crème brûlée 🎉",
        '{"prompt": "separated\u2028lines"}': "separated\u2028lines",
    }
    file.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    assert read_prompts(["first"], file) == ["first", *prompts.values()]
    assert read_prompts([], None) == ["Once upon a time"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'good\n{"prompt": "cut', r'line 2 is no JSON .*; write {"prompt": "..."}'),
        (b'good\n{"prompt": 3}', 'line 2 has no text under "prompt"'),
        (b'good\n""', "the prompt is empty"),
        (b"\n\n", "is empty; write one prompt a line"),
        (b"\xff\xfe\x00", "give a UTF-8 text file"),
    ],
)
def test_a_prompts_file_that_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_prompts([], file)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts([], tmp_path)


# --- A batch that is interrupted

PROMPTS = ["The old man", "Once", "It was late", "A bird", "The king"]
SAMPLED = ["--temperature", "1", "--seed", "7"]


def batch(output: Path, *options: object) -> list[object]:
    """A command of five prompts, two at a time."""
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    plain = ["--batch_size", 2, "--max_new_tokens", 4, "--output_file", output]
    return ["completion.py", *given, *plain, *options]


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGINT, []), (signal.SIGTERM, SAMPLED)],
    ids=["Ctrl-C, greedy", "SIGTERM, sampled"],
)
def test_a_stopped_batch_is_gone_on_with(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], number: int
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(*batch(whole, *options)).code == 0
    add = CompletionFile.add

    def add_and_stop(self: CompletionFile, completions: list[str]) -> None:
        add(self, completions)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(CompletionFile, "add", add_and_stop)
        stopped = run(*batch(output, *options))
    assert stopped.code == 128 + number
    last = stopped.err.splitlines()[-1]
    assert last == f"stopped: 2 of 5 completions are in {output}; repeat the command to go on"
    assert output.read_bytes().splitlines() == whole.read_bytes().splitlines()[:2]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done = run(*batch(output, *options))
    assert done.code == 0
    assert re.search(r" 5/5 ", done.err) and not re.search(r" [01]/5 ", done.err)  # the bar
    assert output.read_bytes() == whole.read_bytes()


def test_a_finished_batch_says_so_and_loads_nothing(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    run(*batch(output))
    monkeypatch.setattr("deepseek_moe.decode.load.load", None)
    done = run(*batch(output))
    assert (done.code, done.out) == (0, "")
    assert done.err == f"5 of 5 completions are in {output} already\n"
    assert_error(run(*batch(output, "--seed", 1)), "seed: None there, 1 now", str(output))


def test_a_batch_of_another_size_goes_on_where_nothing_is_drawn(
    run: Runner, tmp_path: Path
) -> None:
    """A smaller one is the remedy after memory ran out."""
    for options, code in (([], 0), (SAMPLED, 2)):
        output = tmp_path / f"out-{code}.jsonl"
        run(*batch(output, *options))
        whole = output.read_bytes()
        output.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
        assert run(*batch(output, *options, "--batch_size", 1)).code == code
        assert (output.read_bytes() == whole) == (code == 0)


def test_a_prompt_that_is_too_long_is_found_before_the_work(run: Runner, tmp_path: Path) -> None:
    assert_error(run(*batch(tmp_path / "out.jsonl", "--prompt", LONG)), "context is 1024")
    assert list(tmp_path.iterdir()) == []


def test_the_prompts_are_not_overwritten(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Once\n")
    done = run(*batch(file, "--prompts_file", file, "--overwrite"))
    assert_error(done, "the output file is the prompts file")
    assert file.read_text() == "Once\n"


@pytest.mark.slow
def test_what_a_killed_batch_has_made_is_kept(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"

    def command(file: Path) -> list[str]:
        script, *words = batch(file, *SAMPLED, "--max_new_tokens", 40, "--batch_size", 1)
        return [sys.executable, f"examples/{script}", *map(str, words)]

    subprocess.run(command(whole), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    with subprocess.Popen(
        command(output), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    ) as process:
        while not (output.exists() and output.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    made = output.read_bytes()
    assert made and len(made) < whole.stat().st_size and whole.read_bytes().startswith(made)
    subprocess.run(command(output), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert output.read_bytes() == whole.read_bytes()


# --- Options and errors


def test_every_sampling_option_arrives() -> None:
    shared = runpy.run_path(str(EXAMPLES / "shared_options.py"))
    parser = ArgumentParser()
    shared["add_sampling_options"](parser, max_new_tokens=7)
    options = "--temperature .5 --top_k 3 --top_p .25 --min_p .125 --repetition_penalty 2 --seed 9"
    sample = make_sampler(**shared["sampling_arguments"](parser.parse_args(options.split())))
    assert isinstance(sample, Sampling)
    chosen = [getattr(sample, name) for name in shared["SAMPLING"]]
    assert chosen == [0.5, 3, 0.25, 0.125, 2.0, 9]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", " \n"], "prompt is empty"),
        (["--prompt", LONG], "context is 1024"),
        (["--prompt", "broken \udcff byte"], "prompt"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--max_new_tokens", "0"], "--max_new_tokens: it is 0; it must be 1 or more"),
        (["--device", "toaster"], "device toaster is unknown"),
        (["--model", "/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
@both_scripts
def test_bad_options(run: Runner, script: str, options: list[str], said: str) -> None:
    done = run(script, *options, stdin=b"Hello\n")
    assert_error(done, said)
    assert done.out == ""


@both_scripts
def test_memory_that_runs_out(run: Runner, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    def fails(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words.")

    monkeypatch.setattr(Generator, "stream", fails)
    assert_error(run(script, "--prompt", "Hello"), "out of memory", "smaller batch")


@both_scripts
def test_weights_that_are_nan(run: Runner, tmp_path: Path, script: str) -> None:
    model = shutil.copytree(BUNDLED, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.shared_experts.up_proj.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done = run(script, "--model", model, "--prompt", "Hello")
    assert_error(done, "NaN or infinite", "weights are broken", "--dtype bfloat16", code=1)
    assert done.out == ("Hello" if script == "completion.py" else "")


# --- Real processes

HELP = """
import runpy, sys
script = sys.argv[1]
for option, code in (("--help", 0), ("--max_new_tokens=0", 2), ("--toast", 2)):
    sys.argv = [script, option]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        assert left.code == code, left.code
    assert not {"torch", "transformers", "deepseek_moe"} & sys.modules.keys()
"""


@both_scripts
def test_help_and_wrong_options_need_no_slow_import(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, EXAMPLES / script],
        env=ENVIRONMENT | {"PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
    options = "model max_new_tokens dtype device quantization temperature top_k top_p min_p "
    options += "repetition_penalty seed prompt"
    if script == "completion.py":
        options += " prompts_file output_file batch_size overwrite"
    assert not [option for option in options.split() if f"--{option} " not in done.stdout]


@both_scripts
def test_ctrl_c_during_the_imports_ends_without_a_traceback(script: str, tmp_path: Path) -> None:
    (tmp_path / "deepseek_moe.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    pass\n"  # as some library might
    )
    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("command", "printed"),
    [("| head -c 10", "Once upon "), ("--max_new_tokens 2 --prompt a --prompt b | true", "")],
)
def test_a_reader_that_leaves_is_no_error(command: str, printed: str) -> None:
    line = f'"$0" examples/completion.py {command}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stdout) == (0, printed)
    assert not re.search("Traceback|Error|Exception", done.stderr), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to a process")
def test_ctrl_c_is_noted_once_and_then_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), noted_interrupts() as pressed:
        assert not pressed
        os.kill(os.getpid(), signal.SIGINT)
        assert len(pressed) == 1
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
