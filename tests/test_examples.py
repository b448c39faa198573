"""The example scripts as a person meets them: output, notes, errors of one line, a terminal."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_fixtures import BUNDLED, ROOT, bundled_model, tokenizer_of

from deepseek_moe.chat import NO_SYSTEM_PROMPT
from deepseek_moe.decode.completion_file import CompletionFile
from deepseek_moe.decode.generation import Generator
from deepseek_moe.decode.options import noted_interrupts

EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),  # so that the scripts find the package without an installation too
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "",  # as most people have it: output may be written as late as at the exit
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Run:
    code: int
    out: str
    err: str


Runner = Callable[..., Run]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Runs an example as `python examples/...` does, but in this process, which is faster."""

    def run(script: str, *args: object, stdin: bytes = b"") -> Run:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as leave:
            code = leave.code or 0
        printed = capsys.readouterr()
        return Run(code, printed.out, printed.err)

    return run


def assert_error(done: Run, *said: str, code: int = 2) -> None:
    """One line, at the end, that says all of `said`."""
    *before, last = done.err.splitlines()
    assert done.code == code, done.err
    assert last.startswith("error: ")
    assert not [words for words in said if words not in last], last
    assert not any(line.startswith("error:") for line in before)
    assert "Traceback" not in done.err


def completed(prompt: str, new: int) -> str:
    """The prompt and what the library makes of it, without the examples."""
    tokenizer = tokenizer_of(BUNDLED)
    (ids,) = Generator(bundled_model()).generate(
        [tokenizer(prompt).input_ids], new, stop_ids={tokenizer.eos_token_id}
    )
    return prompt + tokenizer.decode(ids, skip_special_tokens=True)


# What runs as real processes, two at a time, once the first test at the end asks for one.

PYTHON = [sys.executable]
COMMANDS: dict[str, tuple[list[str], str | None]] = {
    "completion": ([*PYTHON, "examples/completion.py"], None),
    "completion error": ([*PYTHON, "examples/completion.py", "--model", "no/such/folder"], None),
    "chat": ([*PYTHON, "examples/chat.py", "--max_new_tokens", "8"], "Hello\n/system\nAgain\n"),
    "chat error": ([*PYTHON, "examples/chat.py"], "/save no/such/folder/x\nHello\n"),
    "head": (
        ["bash", "-c", '"$0" examples/completion.py | head -c 10; exit ${PIPESTATUS[0]}', *PYTHON],
        None,
    ),
    "nobody reads": (
        [
            "bash",
            "-c",
            '"$0" examples/completion.py --max_new_tokens 2 --prompt a --prompt b | true; '
            "exit ${PIPESTATUS[0]}",
            *PYTHON,
        ],
        None,
    ),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, Future[Run]]]:
    def run(command: list[str], stdin: str | None) -> Run:
        done = subprocess.run(
            command,
            input=stdin or "",
            capture_output=True,
            encoding="utf-8",
            cwd=ROOT,
            env=ENVIRONMENT,
            timeout=120,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {name: pool.submit(run, *command) for name, command in COMMANDS.items()}
        pool.shutdown(cancel_futures=True)


def test_streams_one_prompt(run: Runner) -> None:
    done = run("completion.py", "--prompt", "The old man", "--max_new_tokens", 12)
    assert done.code == 0
    assert done.out == completed("The old man", 12) + "\n"
    assert re.search(r"12 tokens in [\d.]+ s: [\d.]+ tokens/s", done.err)


def test_several_prompts_are_separated_by_an_empty_line(run: Runner) -> None:
    prompts = ["The old man", "Once", "It was late, and the rain"]
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = run("completion.py", *given, "--max_new_tokens", 8, "--batch_size", 2)
    assert done.out == "\n\n".join(completed(prompt, 8) for prompt in prompts) + "\n"
    assert "tokens/s" in done.err


def test_prompts_of_a_file_and_the_command_line(run: Runner, tmp_path: Path) -> None:
    """All forms of a line; the output file holds them in order."""
    file, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    lines = [
        "plain text, {not} JSON",
        '"a JSON \\"string\\""',
        '{"prompt": "an object\\nof two lines", "id": 7}',
        "",
        '"Who are you?" he said',
        "Crème brûlée 🎉",
        '{"prompt": "separated\u2028lines"}',
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = ["--prompt", "first", "--prompts_file", file, "--output_file", output]
    done = run("completion.py", *given, "--max_new_tokens", 4)
    assert (done.code, done.out) == (0, "")
    rows = [json.loads(row) for row in output.read_text(encoding="utf-8").split("\n") if row]
    prompts = [
        "first",
        "plain text, {not} JSON",
        'a JSON "string"',
        "an object\nof two lines",
        '"Who are you?" he said',
        "Crème brûlée 🎉",
        "separated\u2028lines",
    ]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["prompt"] + row["completion"] for row in rows] == [
        completed(prompt, 4) for prompt in prompts
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompts.txt", "out.jsonl", "out.jsonl.run.json",
    }  # fmt: skip


def test_one_prompt_with_an_output_file(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run("completion.py", "--prompt", "Once", "--max_new_tokens", 4, "--output_file", output)
    (row,) = output.read_text(encoding="utf-8").splitlines()
    expected = completed("Once", 4).removeprefix("Once")
    assert json.loads(row) == {"prompt": "Once", "completion": expected}


# A batch that is interrupted

PROMPTS = ["The old man", "Once", "It was late", "A bird", "The king"]
SAMPLED = ["--temperature", "1", "--seed", "7"]


def batch(output: Path, *options: object) -> list[object]:
    """A command of five prompts, two at a time."""
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    plain = ["--batch_size", 2, "--max_new_tokens", 4, "--output_file", output]
    return ["completion.py", *given, *plain, *options]


def call_in_batch(
    monkeypatch: pytest.MonkeyPatch, number: int, function: Callable[[], None]
) -> None:
    """Calls `function` in the `number`-th batch, after its second token."""
    stream, batches = Generator.stream, 0

    def counted(self: Generator, prompts: list[list[int]], *args: object) -> Iterator[list[int]]:
        steps = stream(self, prompts, *args)

        def counting() -> Iterator[list[int]]:
            nonlocal batches
            batches += 1
            for place, step in enumerate(steps):
                if (batches, place) == (number, 2):
                    function()
                yield step

        return counting()

    monkeypatch.setattr(Generator, "stream", counted)


@pytest.mark.parametrize("options", [[], SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_batch_is_gone_on_with(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], number: int
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(*batch(whole, *options)).code == 0
    with monkeypatch.context() as patch:
        call_in_batch(patch, 2, lambda: os.kill(os.getpid(), number))
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


def test_to_go_on_overwrite_is_left_out(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_in_batch(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = run(*batch(tmp_path / "out.jsonl", "--overwrite"))
    assert stopped.err.endswith("; repeat the command without --overwrite to go on\n")


@pytest.mark.parametrize("options", [[], SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cut", [0, 1, 60, -1])
def test_half_a_line_of_a_killed_write_is_made_again(
    run: Runner, tmp_path: Path, options: list[str], cut: int
) -> None:
    """Of a file cut off at any byte; the third completion is of a batch that is not complete."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    for file in (whole, output):
        assert run(*batch(file, *options)).code == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    assert run(*batch(output, *options)).code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_a_finished_batch_says_so_and_loads_nothing(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    run(*batch(output))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("deepseek_moe.decode.load.load", None)
        done = run(*batch(output))
    assert (done.code, done.out) == (0, "")
    assert done.err == f"5 of 5 completions are in {output} already\n"
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    assert after == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "one more"], "other prompts"),
        (["--max_new_tokens", 5], "max_new_tokens: 4 there, 5 now"),
        (["--temperature", 0.5], "temperature: 0.0 there, 0.5 now"),
        (["--seed", 1], "seed: None there, 1 now"),
        (["--model", BUNDLED.with_name("tiny-chat")], "other model"),
        (["--quantization", "int8"], "quantization: None there, int8 now"),
    ],
)
def test_another_command_does_not_go_on_in_the_file(
    run: Runner, tmp_path: Path, options: list[object], said: str
) -> None:
    output = tmp_path / "out.jsonl"
    run(*batch(output))
    before = output.read_bytes()
    assert_error(run(*batch(output, *options)), said, "--overwrite", str(output))
    assert output.read_bytes() == before


def test_a_batch_of_another_size_goes_on_where_nothing_is_drawn(
    run: Runner, tmp_path: Path
) -> None:
    """As one wants to after memory ran out."""
    for options, code in (([], 0), (SAMPLED, 2)):
        output = tmp_path / f"out-{code}.jsonl"
        run(*batch(output, *options))
        whole = output.read_bytes()
        output.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
        done = run(*batch(output, *options, "--batch_size", 1))
        assert done.code == code
        assert (output.read_bytes() == whole) == (code == 0)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.run.json"])
def test_a_file_of_the_user_is_kept_unless_it_may_be_overwritten(
    run: Runner, tmp_path: Path, name: str
) -> None:
    output, mine = tmp_path / "out.jsonl", tmp_path / name
    mine.write_text("mine")
    assert_error(run(*batch(output)), f"{mine} is there already", "--overwrite")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]
    assert run(*batch(output, "--overwrite")).code == 0
    assert len(output.read_text().splitlines()) == 5
    assert run(*batch(output)).err.endswith("already\n")


def test_a_file_that_was_changed_is_kept(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(*batch(output))
    lines = output.read_text().splitlines(keepends=True)
    changed = ["{}\n", '{"prompt": "Once", "completion": 3}\n', "no JSON\n", lines[0]]
    for line in changed:
        text = "".join([lines[0], line, *lines[2:]])
        output.write_text(text)
        assert_error(run(*batch(output)), "line 2 is not what this command wrote", "--overwrite")
        assert output.read_text() == text
    output.write_text("".join([*lines, lines[0]]))
    assert_error(run(*batch(output)), "line 6 is not what this command wrote")


def test_one_process_at_a_time_writes_an_output_file(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, output], **pipes) as other:
        other.stdout.readline()
        for options in ([], ["--overwrite"]):
            done = run(*batch(output, *options))
            assert_error(done, f"another process is writing to {output}")
        other.communicate(b"\n")
    assert run(*batch(output)).code == 0


def test_a_batch_keeps_its_output_file_to_itself(tmp_path: Path) -> None:
    """Also after it has looked once more at what is there."""
    output = CompletionFile(tmp_path / "out.jsonl", ["a", "b"], {}, 1)
    output.start()
    output.add(["x"])
    second = "import sys; from pathlib import Path; "
    second += "from deepseek_moe.decode.completion_file import CompletionFile; "
    second += "CompletionFile(Path(sys.argv[1]), ['a', 'b'], {}, 1).start()"
    done = subprocess.run([sys.executable, "-c", second, output.file], capture_output=True)
    assert done.returncode == 1 and b"another process is writing to" in done.stderr
    assert output.file.read_text() == '{"prompt": "a", "completion": "x"}\n'


def test_what_was_made_with_another_tokenizer_is_not_gone_on_with(
    run: Runner, tmp_path: Path
) -> None:
    model, output = shutil.copytree(BUNDLED, tmp_path / "model"), tmp_path / "out.jsonl"
    run(*batch(output, "--model", model))
    config = model / "tokenizer_config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(fields | {"eos_token": "."}), encoding="utf-8")
    assert_error(run(*batch(output, "--model", model)), "other tokenizer")


def test_a_full_disk_keeps_what_is_there(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch is written half before the disk is full."""
    output, fsync, calls = tmp_path / "out.jsonl", os.fsync, []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = run(*batch(output))
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ") and "No space left" in last
    assert f"2 of 5 completions are in {output}: make room and repeat the command to go on" in last
    assert len(output.read_text().splitlines()) == 2
    assert run(*batch(output)).code == 0
    assert len(output.read_text().splitlines()) == 5


def test_a_prompt_that_is_too_long_is_found_before_the_work(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert_error(run(*batch(output, "--prompt", LONG)), "context is 1024")
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


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--top_k", "20"],
        ["--top_p", "0.9"],
        ["--min_p", "0.01"],
        ["--repetition_penalty", "1.2"],
    ],
)
def test_a_seed_repeats_a_sampled_completion(run: Runner, options: list[str]) -> None:
    def text(seed: int) -> str:
        sampling = ["--temperature", "1", "--seed", seed, *options]
        return run("completion.py", "--max_new_tokens", 12, *sampling).out

    assert text(1) == text(1) != text(2)


def test_a_repetition_penalty_needs_no_temperature(run: Runner) -> None:
    def text(penalty: float) -> str:
        return run("completion.py", "--max_new_tokens", 24, "--repetition_penalty", penalty).out

    words = text(2.0).split()
    assert text(1.0) == completed("Once upon a time", 24) + "\n"
    assert len(set(words)) > len(set(text(1.0).split()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_and_device(run: Runner, dtype: str) -> None:
    options = ["--dtype", dtype, "--device", "cpu", "--model", BUNDLED]
    done = run("completion.py", *options, "--max_new_tokens", 4)
    assert done.out.startswith("Once upon a time")
    assert len(done.out) > len("Once upon a time\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "cut', ["line 2", "no JSON", '{"prompt": "..."}']),
        ('{"text": "x"}', ["line 2", "prompt"]),
        ('{"prompt": 3}', ["line 2", "prompt"]),
        ('{"prompt": ""}', ["empty"]),
        ('""', ["empty"]),
        ("   ", ["empty"]),
    ],
)
def test_bad_lines_of_a_prompts_file(
    run: Runner, tmp_path: Path, line: str, said: list[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"good\n{line}\n", encoding="utf-8")
    assert_error(run("completion.py", "--prompts_file", file), *said)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe\x00"])
def test_prompts_file_without_prompts(run: Runner, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content)
    assert_error(run("completion.py", "--prompts_file", file))


def test_prompts_file_that_is_a_folder(run: Runner, tmp_path: Path) -> None:
    assert_error(run("completion.py", "--prompts_file", tmp_path), str(tmp_path))


LONG = "word " * 2000
BAD_OPTIONS = [
    (["--prompt", ""], "prompt is empty"),
    (["--prompt", " \n"], "prompt is empty"),
    (["--prompt", LONG], "context is 1024"),
    (["--prompt", "broken \udcff byte"], "prompt"),
    (["--temperature", "-1"], "temperature is -1"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--temperature", "inf"], "temperature is inf"),
    (["--top_p", "0"], "top_p is 0"),
    (["--top_p", "1.5"], "top_p is 1.5"),
    (["--top_k", "-1"], "top_k is -1"),
    (["--min_p", "-0.1"], "min_p is -0.1"),
    (["--min_p", "1.5"], "min_p is 1.5"),
    (["--repetition_penalty", "0"], "repetition_penalty is 0"),
    (["--repetition_penalty", "inf"], "repetition_penalty is inf"),
    (["--temperature", "1", "--seed", str(2**64)], "seed"),
    (["--max_new_tokens", "0"], "max_new_tokens is 0"),
    (["--max_new_tokens", "-1"], "max_new_tokens is -1"),
    (["--device", "cuda:99"], "GPU"),
    (["--device", "toaster"], "device toaster is unknown"),
    (["--model", "/no/such/folder"], "/no/such/folder does not exist"),
]
CASES = [pytest.param(options, said, id=f"{options[-2]} {said}") for options, said in BAD_OPTIONS]


@pytest.mark.parametrize(("options", "said"), CASES)
def test_bad_options_of_completion(run: Runner, options: list[str], said: str) -> None:
    done = run("completion.py", *options)
    assert_error(done, said)


@pytest.mark.parametrize(("options", "said"), CASES)
def test_bad_options_of_chat(run: Runner, options: list[str], said: str) -> None:
    done = run("chat.py", *options, stdin=b"Hello\n")
    assert_error(done, said)
    assert done.out == ""


def test_batch_size(run: Runner) -> None:
    assert_error(run("completion.py", "--batch_size", 0), "batch_size is 0")


@pytest.mark.parametrize("output", ["missing/out.jsonl", ".", "folder"])
def test_output_file_that_cannot_be_written_is_refused_before_the_work(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Generator, "generate", None)
    assert_error(run("completion.py", "--output_file", output))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("script", ["completion.py", "chat.py"])
def test_memory_that_runs_out(run: Runner, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    def fails(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words.")

    monkeypatch.setattr(Generator, "stream", fails)
    assert_error(run(script, "--prompt", "Hello"), "out of memory", "smaller batch")


@pytest.mark.parametrize("sampled", [False, True])
def test_weights_that_are_nan(run: Runner, tmp_path: Path, sampled: bool) -> None:
    model = shutil.copytree(BUNDLED, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.shared_experts.up_proj.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = ["--model", model, *(["--temperature", 1] if sampled else [])]
    said = ("NaN or infinite", "weights are broken", "--dtype bfloat16")
    one = run("completion.py", *options, "--prompt", "Hello")
    assert_error(one, *said, "token 1 of prompt 1", code=1)
    assert one.out == "Hello"
    output = tmp_path / "out.jsonl"
    many = ["--prompt", "Hello", "--prompt", "You", "--output_file", output]
    assert_error(run("completion.py", *options, *many), *said, code=1)
    assert output.read_text() == ""
    talk = run("chat.py", *options, "--prompt", "Hello")
    assert_error(talk, *said, code=1)
    assert talk.out == ""


@pytest.mark.parametrize("script", ["completion.py", "chat.py"])
def test_a_tokenizer_of_another_model(run: Runner, tmp_path: Path, script: str) -> None:
    model = shutil.copytree(BUNDLED, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append(last | {"id": 4096, "content": "<extra>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert_error(run(script, "--model", model, "--prompt", "x"), "ids up to 4096", "vocab_size")


@pytest.mark.parametrize("script", ["completion.py", "chat.py"])
def test_a_model_without_tokenizer_config(run: Runner, tmp_path: Path, script: str) -> None:
    model = shutil.copytree(BUNDLED, tmp_path / "model")
    (model / "tokenizer_config.json").unlink()
    options = ["--prompt", "Hello", "--max_new_tokens", 8]
    done, wanted = (run(script, "--model", it, *options) for it in (model, BUNDLED))
    assert done.code == 0 and done.out == wanted.out


def test_help_names_every_option(run: Runner) -> None:
    done = run("completion.py", "--help")
    options = """
        model prompt prompts_file output_file batch_size max_new_tokens dtype device
        temperature top_k top_p min_p repetition_penalty seed overwrite
    """
    assert done.code == 0
    assert not [option for option in options.split() if f"--{option}" not in done.out]


# Chat


def conversation(run: Runner, text: str, *options: object, new: int = 6) -> Run:
    done = run("chat.py", "--max_new_tokens", new, *options, stdin=text.encode())
    assert done.code == 0, done.err
    return done


def saved(run: Runner, file: Path, text: str, *options: object) -> list[dict[str, str]]:
    conversation(run, f"{text}/save --overwrite {file}\n", *options)
    return json.loads(file.read_text(encoding="utf-8"))


def test_one_shot(run: Runner) -> None:
    done = run("chat.py", "--prompt", "Who are you?", "--max_new_tokens", 6)
    assert done.code == 0
    assert done.out.strip()
    assert done.out == conversation(run, "Who are you?\n").out


def test_a_piped_conversation_has_a_memory(run: Runner, tmp_path: Path) -> None:
    messages = saved(run, tmp_path / "chat.json", "Who are you?\n\n  And I, Zoë?  \n")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["Who are you?", "And I, Zoë?"]
    out = conversation(run, "Who are you?\nAnd I, Zoë?").out
    assert out == "".join(message["content"] + "\n" for message in messages[1::2])
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_undo_forgets_the_last_turn(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    one = saved(run, file, "One?\n")
    assert saved(run, file, "One?\nTwo?\n/undo\n") == one
    assert saved(run, file, "One?\nTwo?\n/undo\n/undo\n") == []
    assert "nothing to undo" in conversation(run, "/undo\n").err


def test_reset_forgets_everything(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    assert saved(run, file, "One?\nTwo?\n/reset\n") == []
    assert saved(run, file, "One?\n/reset\nTwo?\n") == saved(run, file, "Two?\n")
    assert "forgotten" in conversation(run, "/reset\n").err


def test_commands_write_notes_to_stderr_only(run: Runner) -> None:
    done = conversation(run, "/system\n/system Be short.\n/help\n/help\n")
    assert done.out == ""
    assert done.err.count(NO_SYSTEM_PROMPT) == 2
    for command in ("/reset", "/undo", "/save", "/system", "/help", "Ctrl-C", "Ctrl-D"):
        assert done.err.count(command) >= 2


def test_overflow_drops_the_oldest_turns_and_says_so(
    run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lengths = []
    stream = Generator.stream

    def spy(self: Generator, prompts: list[list[int]], *args: object) -> Iterator[list[int]]:
        lengths.append(len(prompts[0]))
        return stream(self, prompts, *args)

    monkeypatch.setattr(Generator, "stream", spy)
    questions = "".join(f"{n} {'word ' * 290}\n" for n in "abcde")
    file = tmp_path / "chat.json"
    done = conversation(run, f"{questions}/save {file}\n")
    assert "the context is full: the oldest 2 messages are no longer seen" in done.err
    assert len(lengths) == 5
    assert max(lengths) <= 1024 - 6
    assert len(json.loads(file.read_text())) == 10  # what is no longer seen is still saved


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LONG, "context is 1024"),
        ("Hello\n" + LONG, "context is 1024"),
        ("/save", "file name"),
        ("/save no/such/folder/chat.json", "no/such/folder/chat.json"),
        ("/save .", "."),
        ("/save /", "/"),
        ("/save ~no_such_user/x", "no_such_user"),
        ("/sav chat.json", "no command /sav; /help lists them"),
    ],
)
def test_an_error_ends_a_piped_conversation(run: Runner, text: str, said: str) -> None:
    done = run("chat.py", "--max_new_tokens", 4, stdin=f"{text}\nNever asked\n".encode())
    assert_error(done, said)
    assert len(done.out.splitlines()) <= text.count("Hello\n")


def test_piped_bytes_that_are_no_text(run: Runner) -> None:
    assert_error(run("chat.py", stdin=b"Caf\xe9\n"), "UTF-8")


def test_save_keeps_a_file_that_is_there(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text("mine")
    done = run("chat.py", stdin=f"/save {file}\n".encode())
    assert_error(done, f"{file} is there already", "--overwrite")
    assert file.read_text() == "mine"
    assert saved(run, file, "") == []  # by /save --overwrite
    assert_error(run("chat.py", stdin=b"/save --overwrite\n"), "file name")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="there is no /dev/null")
def test_a_device_is_not_replaced_by_a_file(run: Runner) -> None:
    done = run("chat.py", stdin=b"/save --overwrite /dev/null\n")
    assert_error(done, "/dev/null cannot be written")
    done = run("completion.py", "--output_file", "/dev/null", "--overwrite")
    assert_error(done, "/dev/null cannot be written")
    assert Path("/dev/null").is_char_device()


def test_save_does_not_leave_half_a_file(run: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_error(run("chat.py", stdin=f"/save {folder}\n".encode()), str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# The real processes


def test_default_completion(processes: dict[str, Future[Run]]) -> None:
    done = processes["completion"].result()
    assert done.code == 0, done.err
    assert done.out.startswith("Once upon a time")
    assert len(done.out.split()) > 30
    assert "\ufffd" not in done.out
    assert re.search(r"\d+ tokens in [\d.]+ s: [\d.]+ tokens/s", done.err)
    assert "Traceback" not in done.err


def test_completion_error(processes: dict[str, Future[Run]]) -> None:
    done = processes["completion error"].result()
    assert_error(done, "no/such/folder does not exist")
    assert done.out == ""


def test_default_chat(processes: dict[str, Future[Run]]) -> None:
    done = processes["chat"].result()
    assert done.code == 0, done.err
    assert done.out.strip()
    assert NO_SYSTEM_PROMPT in done.err
    assert NO_SYSTEM_PROMPT not in done.out


def test_chat_error(processes: dict[str, Future[Run]]) -> None:
    done = processes["chat error"].result()
    assert_error(done, "no/such/folder/x")
    assert done.out == ""


@pytest.mark.parametrize("name", ["head", "nobody reads"])
def test_a_reader_that_leaves_is_no_error(processes: dict[str, Future[Run]], name: str) -> None:
    done = processes[name].result()
    assert done.out == {"head": "Once upon ", "nobody reads": ""}[name]
    assert not re.search("Traceback|Error|Exception", done.err), done.err
    assert done.code == 0


class Terminal:
    """A process in a pseudo-terminal. Another Python makes the terminal: no fork is needed here."""

    SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SPAWN, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=ENVIRONMENT | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        self.raw = b""
        self.seen = 0
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        while new := os.read(self.process.stdout.fileno(), 4096):
            self.raw += new

    @property
    def text(self) -> str:
        """All that was printed, without colours and movements of the cursor."""
        text = self.raw.decode(errors="ignore").replace("\r", "")
        return re.sub(r"\x1b(\[[0-9;?]*([A-Za-z]|$)|[=>]|$)", "", text)

    def wait(self, pattern: str, seconds: float = 60) -> None:
        """Until `pattern` is printed after what was last waited for."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.text, self.seen)):
            assert time.monotonic() < end, f"no {pattern} in:\n{self.text}"
            assert self.process.poll() is None, f"left before {pattern}:\n{self.text}"
            time.sleep(0.05)
        self.seen = found.end()

    def type(self, keys: str) -> None:
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops an answer and keeps the chat, Ctrl-D leaves."""
    model, file = tmp_path / "endless", tmp_path / "chat.json"
    shutil.copytree(BUNDLED, model)
    fields = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    fields["eos_token"] = fields["bos_token"]  # which the model never writes: answers go on
    (model / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    words = r"(\W*\w+){5}"
    terminal = Terminal(
        sys.executable, "examples/chat.py", "--model", str(model), "--max_new_tokens", "1000"
    )
    try:
        terminal.wait("Ctrl-D leaves")
        terminal.wait("> ")
        terminal.type("Hello\r")
        terminal.wait(r"Hello *\n" + words)
        terminal.type("\x03")
        terminal.wait(r"\(stopped\)")
        terminal.wait("> ")
        terminal.type("/save\r")
        terminal.wait("error: /save needs a file name")
        terminal.wait("> ")
        terminal.type("half a line\x03")
        terminal.wait("> ")
        terminal.type("Again\r")
        terminal.wait(r"Again *\n" + words)
        terminal.type("\x03")
        terminal.wait(r"\(stopped\)")
        terminal.wait("> ")
        terminal.type(f"/save {file}\r")
        terminal.wait("4 messages are in")
        terminal.wait("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0, terminal.text
    finally:
        terminal.process.kill()
    assert "Traceback" not in terminal.text
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert [message["content"] for message in messages[::2]] == ["Hello", "Again"]
    assert all(message["content"] for message in messages[1::2])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to a process")
def test_ctrl_c_is_noted_once_and_then_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), noted_interrupts() as pressed:
        assert not pressed
        os.kill(os.getpid(), signal.SIGINT)
        assert len(pressed) == 1
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
