"""What people type and pipe into both examples, and what they are told."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from adapter_fixtures import ADAPTED, load, make_adapter
from example_fixtures import ENVIRONMENT, EXAMPLES, assert_error, both_scripts, piped, run, talk
from text_fixtures import BUNDLED, ROOT, bundled_model, tokenizer_of

from deepseek_moe import Generator
from deepseek_moe.checkpoint import Checkpoint
from deepseek_moe.checkpoint_writer import write_checkpoint
from deepseek_moe.errors import UserError
from deepseek_moe.training.merge_lora import merged_tensors

with patch("sys.path", [str(EXAMPLES), *sys.path]):
    from conversation import named_base


@both_scripts
def test_dashes_are_underscores_and_the_nearest_option_is_named(script):
    wanted = run(script, "--prompt", "Once", "--max_new_tokens", 3)
    dashed = run(script, "--prompt", "Once", "--max-new-tokens=3")
    assert (dashed.code, dashed.out) == (0, wanted.out)
    assert run(script, "--prompt", "Once", "--max-new", 3).out == wanted.out
    for wrong in ("--max_tokens", "--max-tokens"):
        assert_error(run(script, wrong, 3), f"no option {wrong}; did you mean --max_new_tokens?")
    assert_error(run(script, "--zzzzz"), "no option --zzzzz; --help lists the options")


@pytest.mark.parametrize("prompt", ["--well-known old-king said", "--well-known king-size=2 x"])
def test_a_prompt_that_begins_with_dashes_stays_as_it_is(prompt):
    done = run("completion.py", "--prompt", prompt, "--max-new-tokens", 2)
    assert (done.code, done.out[: len(prompt)]) == (0, prompt), done.err
    assert run("completion.py", f"--prompt={prompt}", "--max-new-tokens", 2).out == done.out


@pytest.mark.parametrize("option", ["--top_p=0.9", "--top_k=5", "--min_p=0.1", "--seed=0"])
@both_scripts
def test_options_of_sampling_need_a_temperature(script, option):
    said = f"{option.partition('=')[0]} has no effect without --temperature"
    assert_error(run(script, "--prompt", "Once", option), said)
    done = run(script, "--prompt", "Once", option, "--temperature=1", "--max_new_tokens=2")
    assert done.code == 0, done.err


@both_scripts
def test_an_adapter_is_merged_in_memory(script, tmp_path):
    model = load(BUNDLED, dtype=torch.float32)
    adapter = make_adapter(model, tmp_path / "adapter", 0.05, **ADAPTED)
    whole, words = tmp_path / "whole", ["--prompt", "Once upon a time", "--max_new_tokens", 8]
    with_adapter = run(script, *words, "--model", BUNDLED, "--adapter", adapter)
    assert with_adapter.code == 0, with_adapter.err
    assert with_adapter.out != run(script, *words, "--model", BUNDLED).out
    tensors = merged_tensors(BUNDLED, adapter)
    write_checkpoint(tensors, Checkpoint(BUNDLED), whole, dtype=torch.float32)
    assert with_adapter.out == run(script, *words, "--model", whole).out
    if script == "completion.py":  # The content of an adapter decides, not its path.
        command = [*words, "--model", BUNDLED, "--adapter", adapter]
        command += ["--output_file", tmp_path / "out.jsonl"]
        assert run(script, *command).code == 0
        make_adapter(load(BUNDLED, dtype=torch.float32), adapter, 0.06, **ADAPTED)
        assert_error(run(script, *command), "holds completions of another command (adapter: ")
    refused = run(script, *words, "--adapter", adapter, "--quantization", "int4")
    assert_error(refused, "cannot be merged into quantised weights")
    assert_error(run(script, *words, "--adapter", tmp_path), "adapter_config.json does not exist")


@both_scripts
def test_sampling_settings_of_a_checkpoint_have_no_effect(script, tmp_path):
    """Each would change the text, or draw another one at each start."""
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    words = [script, "--prompt", "Once upon a time", "--max_new_tokens", 12, "--model", folder]
    wanted = run(*words)
    file = folder / "generation_config.json"
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 3}
    settings |= {"min_new_tokens": 11, "bad_words_ids": [[n] for n in range(4000)]}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert wanted.code == 0 and run(*words).out == wanted.out
    drawn = [*words, "--temperature", 1, "--seed", 3]
    with_settings = run(*drawn).out
    file.unlink()
    assert with_settings == run(*drawn).out != wanted.out


# --- Completions


def completion(line: str) -> subprocess.CompletedProcess[str]:
    """A line for bash, in which $@ is the program with few tokens to make."""
    program = [sys.executable, "examples/completion.py", "--max_new_tokens", "4"]
    return subprocess.run(
        ["bash", "-c", line, "bash", *program],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("content", "options", "begins"),
    [
        (b"The old king\nhad", (), "The old king\nhad"),
        (b"A bird", ("--prompt", "-"), "A bird"),
        (b"A bird", ("--prompt", "Gold"), "Gold"),
        (None, (), "Once upon a time"),
        (b"", (), "Once upon a time"),
    ],
)
def test_what_is_piped_in_is_a_prompt(content, options, begins):
    """None is /dev/null. test_completion.py has the pipe of a shell."""
    done = run("completion.py", "--max_new_tokens", 4, *options, stdin=content)
    assert done.code == 0, done.err
    assert done.out.startswith(begins)
    assert done.out.count("A bird") == begins.count("A bird")


def test_a_newline_at_the_end_of_what_is_piped_in_is_no_part_of_the_prompt():
    """`echo` puts one there."""
    one, other = (
        run("completion.py", "--prompt", "-", "--max_new_tokens", 4, stdin=text)
        for text in (b"A bird", b"A bird\n")
    )
    assert other.code == 0 and other.out == one.out


@pytest.mark.parametrize(
    ("script", "options", "encoding", "said"),
    [
        ("completion.py", ("--prompt", "-"), None, "the standard input is closed; pipe some text"),
        ("chat.py", (), None, "the standard input is closed; pipe some text in"),
        ("completion.py", (), "utf-8", "not UTF-8"),
        ("completion.py", ("--prompt", "-"), "ascii", "not UTF-8"),
    ],
)
def test_an_input_that_cannot_be_read_is_one_line(script, options, encoding, said):
    """Python decodes it by PYTHONIOENCODING. Where it is closed, there is none."""
    stdin = piped(b"ab\xff", encoding) if encoding else nullcontext()
    done = run(script, *options, stdin=stdin)
    assert_error(done, said)
    assert done.err.count("\n") == 1, done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_or_closed_output_is_one_line():
    for line, code in (('"$@" > /dev/full <&-', 1), ('"$@" >&-', 2)):
        done = completion(line)
        assert done.returncode == code
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
        assert "usage: " not in done.stderr


def test_fewer_tokens_than_asked_are_explained():
    """The stop id is the third id that greedy decoding makes."""
    tokenizer = tokenizer_of(BUNDLED)
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "The old king")]
    ids = Generator(bundled_model()).generate(prompts, 4)
    words = ["completion.py", "--prompt", "Once upon a time", "--max_new_tokens", 4]
    assert "before" not in run(*words).err
    with patch("deepseek_moe.decode.texts.end_ids", lambda *_: {ids[0][2]}):
        assert "; 1 of 1 texts ended, or filled the context of 1024 tokens" in run(*words).err
        assert "; 1 of 2 texts ended" in run(*words, "--prompt", "The old king").err


# --- Chats


def test_the_model_is_named_and_a_base_model_is_warned_of():
    done = run("chat.py", "--prompt", "Hi", "--max_new_tokens", 2)
    assert "talking to " in done.err and "tiny-chat" in done.err
    assert "base model" not in done.err
    done = run("chat.py", "--prompt", "Hi", "--max_new_tokens", 2, "--model", BUNDLED)
    assert "by its name it is a base model" in done.err


def test_a_base_model_is_known_by_a_word_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLED)
    (tmp_path / "link-to-it").symlink_to(BUNDLED)
    for name in (".", str(tmp_path / "link-to-it"), "deepseek-ai/deepseek-moe-16b-base", "My_Base"):
        assert named_base(name), name
    for name in ("database-helper", "models/base/tuned", "deepseek-ai/deepseek-moe-16b-chat"):
        assert not named_base(name), name


def test_retry_asks_again_and_exit_leaves():
    asked = talk("One?", "Two?")
    again = talk("One?", "Two?", "/retry")
    assert again.messages == asked.messages
    with pytest.raises(UserError, match="there is no question yet"):
        talk("/retry")
    done = run("chat.py", "--max_new_tokens", 2, stdin=b"Hi\n/exit\nNever asked\n")
    assert (done.code, done.out.count("\n")) == (0, 1)


def test_load_takes_what_save_has_written(tmp_path):
    file = tmp_path / "chat.json"
    saved = talk("One?", f"/save {file}")
    assert talk(f"/load {file}").messages == saved.messages
    assert talk(f"/load {file}", "Two?").messages == talk("One?", "Two?").messages
    file.write_text(json.dumps([saved.messages[0], {"role": "assistant", "content": ""}]))
    assert len(talk(f"/load {file}").messages) == 2  # its answer was stopped at once
    marked = [message | {"train": None, "id": 7} for message in saved.messages]
    file.write_text(json.dumps(marked))
    assert talk(f"/load {file}").messages == saved.messages
    half = json.dumps([{"role": "user", "content": "a\ud800"}, saved.messages[1]])
    for content in ("not JSON", "[1]", json.dumps(saved.messages[1:]), '{"role": "user"}', half):
        file.write_text(content)
        with pytest.raises(UserError, match="is no conversation that /save has written"):
            talk(f"/load {file}")
    with pytest.raises(UserError, match="no file is no conversation"):
        talk("/load")


def test_an_answer_that_is_cut_is_marked(capsys):
    conversation = talk("One?", new=3)
    assert "(cut after --max_new_tokens 3)" in capsys.readouterr().err
    with patch("conversation.end_ids", lambda *_: range(4096)):
        conversation.turn("Two?")
    assert "cut" not in capsys.readouterr().err
