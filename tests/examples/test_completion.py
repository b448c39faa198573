"""examples/completion.py, and what both examples do with options, errors, pipes and signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import torch
from example_fixtures import ENVIRONMENT, EXAMPLES, LONG, assert_error, both_scripts, run
from text_fixtures import BUNDLED, ROOT, bundled_model, tokenizer_of

from deepseek_moe import Generator
from deepseek_moe.decode.completion_file import CompletionFile
from deepseek_moe.decode.prompts import TimedGenerator, noted_interrupts, read_prompts
from deepseek_moe.decode.sampling import Sampling
from deepseek_moe.errors import RunError, UserError

PROMPTS = ["The old man", "Once", "It was late", "A bird", "The king"]
SAMPLED = ["--temperature", "1", "--seed", "7"]


def batch(*options: object) -> list[object]:
    """A command of five prompts, two at a time."""
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["completion.py", *given, "--batch_size", 2, "--max_new_tokens", 4, *options]


def completed(prompt: str, new: int) -> str:
    """The prompt and what the library makes of it, without the examples."""
    tokenizer = tokenizer_of(BUNDLED)
    (ids,) = Generator(bundled_model()).generate(
        [tokenizer(prompt).input_ids], new, stop_ids={tokenizer.eos_token_id}
    )
    return prompt + tokenizer.decode(ids, skip_special_tokens=True)


def test_one_prompt_streams_and_several_are_separated_by_an_empty_line(tmp_path):
    one = run("completion.py", "--prompt", "The old man", "--max_new_tokens", 12)
    assert (one.code, one.out) == (0, completed("The old man", 12) + "\n")
    assert re.search(
        r"12 tokens in [\d.]+ s, the first after [\d.]+ s; then [\d.]+ tokens/s", one.err
    )
    texts, output = [completed(prompt, 4) for prompt in PROMPTS], tmp_path / "out.jsonl"
    several = run(*batch())
    assert several.out == "\n\n".join(texts) + "\n"
    assert "tokens/s" in several.err
    assert run(*batch("--output_file", output)).out == ""
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] + row["completion"] for row in rows] == texts


def test_the_rate_counts_no_prompt_and_nothing_of_the_start():
    """The first token, and the rate after three of each batch, by a clock that each token moves."""
    seconds = iter([0, 5, 6, 9, 9.25, 9.5, 100, 107, 108, 109, 109.25])
    with patch("time.perf_counter", lambda: next(seconds)):
        generator = TimedGenerator(bundled_model())
        assert str(generator) == "0 tokens in 0.00 s"
        assert len(list(generator.stream([[7]], 5))) == 5
        assert str(generator) == "5 tokens in 9.50 s, the first after 5.00 s; then 4.0 tokens/s"
        list(generator.stream([[7], [9, 4]], 4))
    assert str(generator) == "13 tokens in 18.75 s, the first after 5.00 s; then 5.3 tokens/s"


def test_prompts_of_the_command_line_and_a_file(tmp_path):
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
        (b"\xff\xfe\x00", "cannot be read: .*; give a UTF-8 text file"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_a_prompts_file_that_is_refused(tmp_path, content, said):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_prompts([], file)


# --- A batch that is interrupted


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGINT, []), (signal.SIGTERM, SAMPLED)],
    ids=["Ctrl-C, greedy", "SIGTERM, sampled"],
)
def test_a_stopped_batch_is_gone_on_with(tmp_path, options, number):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = batch("--output_file", output, *options)
    assert run(*batch("--output_file", whole, *options)).code == 0
    add = CompletionFile.add

    def add_and_stop(self: CompletionFile, completions: list[str]) -> None:
        add(self, completions)
        os.kill(os.getpid(), number)

    with patch.object(CompletionFile, "add", add_and_stop):
        stopped = run(*command)
    assert stopped.code == 128 + number
    last = stopped.err.splitlines()[-1]
    assert last == f"stopped: 2 of 5 completions are in {output}; repeat the command to go on"
    assert output.read_bytes().splitlines() == whole.read_bytes().splitlines()[:2]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    smaller = ["--batch_size", 1]  # the remedy after memory ran out, where nothing is drawn
    if options:
        assert_error(run(*command, *smaller), "batch_size: 2 there, 1 now")
    done = run(*command, *([] if options else smaller))
    assert done.code == 0
    assert re.search(r" 5/5 ", done.err) and not re.search(r" [01]/5 ", done.err)  # the bar
    assert output.read_bytes() == whole.read_bytes()
    with patch("deepseek_moe.decode.load.load", None):  # a finished batch loads nothing
        again = run(*command)
    assert (again.code, again.out) == (0, "")
    assert again.err == f"5 of 5 completions are in {output} already\n"
    assert_error(run(*command, "--repetition_penalty", 2), "there, 2.0 now", str(output))


def test_what_is_refused_before_the_work_leaves_all_files_as_they_are(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Once\n")
    same = batch("--output_file", file, "--prompts_file", file, "--overwrite")
    assert_error(run(*same), "the output file is the prompts file")
    too_long = batch("--output_file", tmp_path / "out.jsonl", "--prompt", LONG)
    assert_error(run(*too_long), "context is 1024")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [(file.name, "Once\n")]


@pytest.mark.slow
def test_what_a_killed_batch_has_made_is_kept(tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = [*SAMPLED, "--max_new_tokens", 40, "--batch_size", 1, "--output_file"]
    run(*batch(*options, whole))
    script, *words = batch(*options, output)
    command = [sys.executable, f"examples/{script}", *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        while not (output.exists() and output.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    made = output.read_bytes()
    assert made and len(made) < whole.stat().st_size and whole.read_bytes().startswith(made)
    run(*batch(*options, output))
    assert output.read_bytes() == whole.read_bytes()


# --- Options and errors


@both_scripts
def test_every_option_arrives(script):
    """Of the sampler and of `load`."""
    chosen = "temperature=.5 top_k=3 top_p=.25 min_p=.125 repetition_penalty=2 seed=9 prompt=Hello "
    chosen += "max_new_tokens=7 quantization=int4 dtype=bfloat16 device=cpu"
    with patch.object(Generator, "stream", autospec=True, side_effect=UserError("no")) as stream:
        run(script, *[f"--{option}" for option in chosen.split()])
    generator, _, new, sample, _ = stream.call_args.args
    assert vars(sample) == vars(Sampling(0.5, 3, 0.25, 0.125, 2.0, 9))
    assert new == 7
    assert (generator.model.dtype, generator.model.device.type) == (torch.bfloat16, "cpu")
    assert generator.model.model.layers[1].mlp.experts.bits == 4


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
def test_bad_options(script, options, said):
    done = run(script, *options, stdin=b"Hello\n")
    assert_error(done, said)
    assert done.out == ""


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. More words."), "memory; use a smaller", 2),
        (RunError("the logits are NaN; get the checkpoint anew"), "are NaN; get", 1),
    ],
)
@both_scripts
def test_errors_of_the_model(script, error, said, code):
    with patch.object(Generator, "stream", side_effect=error):
        assert_error(run(script, "--prompt", "Hello"), said, code=code)


# --- Real processes

SLOW_IMPORT = """
import os, signal
print("imported", flush=True)
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:  # as some library might
    pass
"""


@both_scripts
def test_options_are_checked_before_slow_imports_which_ctrl_c_ends(script, tmp_path):
    for module in ("torch", "transformers", "deepseek_moe"):
        (tmp_path / f"{module}.py").write_text(SLOW_IMPORT)

    def start(*options: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, EXAMPLES / script, *options],
            env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    code, shown, _ = start("--help")
    assert code == 0 and "imported" not in shown and str(ROOT) not in shown
    for wrong in ("--max_new_tokens=0", "--toast"):
        assert start(wrong)[:2] == (2, "")
    assert start() == (130, "imported\n", "")  # without a traceback


def test_a_reader_that_leaves_is_no_error():
    """The prompt comes by a pipe, and its reader leaves after half of it."""
    line = 'echo "Long ago" | "$0" examples/completion.py | head -c 5; exit ${PIPESTATUS[1]}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stdout) == (0, "Long ")
    assert not re.search("Traceback|Error|Exception", done.stderr), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to a process")
def test_ctrl_c_is_noted_once_and_then_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), noted_interrupts(signal.SIGINT) as pressed:
        assert not pressed
        os.kill(os.getpid(), signal.SIGINT)
        assert len(pressed) == 1
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
