"""`transformers serve` and the official client of OpenAI: what docs/serving.md says of them.

They need `pip install -r requirements-interop.txt`. Each server is a process of its own on the CPU.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
import torch
from finetune_fixtures import free_port
from text_fixtures import BUNDLED, ROOT, tokenizer_of, user
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
NOT_HERE = "openai and uvicorn are not here: pip install -r requirements-interop.txt"
openai = pytest.importorskip("openai", reason=NOT_HERE)
pytest.importorskip("uvicorn", reason=NOT_HERE)

CHAT = str(BUNDLED.with_name("tiny-chat"))
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
GREEDY = {"model": CHAT, "temperature": 0}
PROMPTS = ["Once upon a time", "The king had three", "A", "It was", "He said", "I", "Two", "Why"]
LONG = json.dumps({"do_sample": False, "max_new_tokens": 900, "min_new_tokens": 900})
"""As the server takes it: an answer of half a minute."""
SECONDS = 15
"""Far less than that answer takes, and far more than a short one."""


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen, openai.OpenAI]]:
    """A server and a client that repeats no request."""
    port = free_port()
    words = ["transformers", "serve", CHAT, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "deepseek_moe", *words]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except URLError:
                time.sleep(0.2)
        url = f"http://127.0.0.1:{port}/v1"
        yield server, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with served(tmp_path_factory.mktemp("server")) as (_, client):
        yield client


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> str:
    options = GREEDY | {"max_tokens": 24} | options
    return client.completions.create(prompt=prompt, **options).choices[0].text


@pytest.fixture(scope="module")
def alone(client: openai.OpenAI) -> list[str]:
    """The answers to PROMPTS, one asked after the other."""
    return [complete(client, prompt) for prompt in PROMPTS]


def test_completions_are_those_of_the_model(alone):
    tokenizer = tokenizer_of(Path(CHAT))
    model = AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)
    for prompt, text in zip(PROMPTS, alone, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=24, do_sample=False)
        assert text == tokenizer.decode(made[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here, which the page uses")
def test_the_commands_of_the_page_work(client):
    """But for the installation. The name of the bundled model and another port are put in."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = page.replace("\\\n", "").replace("deepseek-ai/deepseek-moe-16b-chat", CHAT).splitlines()
    assert f"python -m deepseek_moe transformers serve {CHAT}" in lines  # as `served` does
    words = next(shlex.split(line) for line in lines if line.startswith("curl "))
    words[1] = words[1].replace("http://localhost:8000/v1/", str(client.base_url))
    assert "I am tiny-chat" in subprocess.run(words, capture_output=True, text=True).stdout


def test_chat_is_the_same_at_once_and_streamed(client):
    ask = partial(client.chat.completions.create, messages=[user("Who are you?")], **GREEDY)
    answer = ask()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content.startswith(" I am tiny-chat, a very small")
    chunks = list(ask(stream=True))
    assert len(chunks) > 20 and chunks[-1].choices[0].finish_reason == "stop"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == answer.choices[0].message.content
    assert ask(max_tokens=5).choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_stays_in_it(stream, client, alone):
    end = alone[0].index(" who was")
    asked = {"prompt": PROMPTS[0], "stop": ["nowhere", " who was"], "max_tokens": 24}
    answer = client.completions.create(**asked, **GREEDY, stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone[0][:end] + " who was"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_eight_clients_at_once_get_what_each_gets_alone(client, alone):
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(partial(complete, client), PROMPTS)] == alone


def test_temperature_counts_only_where_sampling_is_asked_for(client, alone):
    options = {"temperature": 2.0, "seed": 1}
    assert complete(client, PROMPTS[0], **options) == alone[0]
    asked = {"generation_config": json.dumps({"do_sample": True})}
    assert complete(client, PROMPTS[0], **options, extra_body=asked) != alone[0]


def test_a_client_that_leaves_its_stream_leaves_the_server_free(client, alone):
    asked = {"model": CHAT, "extra_body": {"generation_config": LONG}, "stream": True}
    with client.completions.create(prompt="A", **asked) as stream:
        assert len([chunk for chunk, _ in zip(stream, range(3), strict=False)]) == 3
    assert complete(client, PROMPTS[0], timeout=SECONDS) == alone[0]


TALK = {"messages": [user("Who are you?")]}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("completions", {"prompt": "word " * 1100}, 500),
        ("completions", {"prompt": ["one", "two"]}, 400),
        ("completions", {"prompt": "A", "model": "another"}, 400),
        ("completions", {"prompt": "A", "colour": "red"}, 422),
        ("chat/completions", TALK | {"max_tokens": 0}, 500),
        ("chat/completions", TALK | {"temperature": "hot"}, 500),
        ("chat/completions", {"messages": []}, 500),
        ("chat/completions", {"messages": "Who are you?"}, 500),
        ("embeddings", {"input": "A"}, 404),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_answered_is_an_error_and_no_more(
    path, body, status, client, alone
):
    with pytest.raises(openai.APIStatusError) as error:
        client.post(f"/{path}", body={"model": CHAT} | body, cast_to=object)
    assert error.value.status_code == status
    again = client.with_options(max_retries=2)  # The server closes a connection after status 500.
    assert complete(again, PROMPTS[0]) == alone[0]


def test_a_stream_of_a_prompt_that_is_too_long_says_so(client, alone):
    asked = {"prompt": "word " * 1100, "stream": True, "max_tokens": 5}
    with pytest.raises(openai.APIError) as error:
        list(client.completions.create(**asked, **GREEDY))
    assert "1103 tokens, but the model's context is 1024" in str(error.value.body)
    assert complete(client, PROMPTS[0]) == alone[0]


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_the_server_within_seconds(busy, tmp_path):
    """While it answers, it first finishes what it has begun; Ctrl-C then ends it at once."""
    with served(tmp_path) as (server, client):
        assert complete(client, PROMPTS[0])
        children = psutil.Process(server.pid).children(recursive=True)
        if busy:
            asked = {"model": CHAT, "extra_body": {"generation_config": LONG}, "stream": True}
            stream = client.completions.create(prompt="A", **asked)
            next(iter(stream))
        server.send_signal(signal.SIGTERM)
        if busy:
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(2)
            server.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIConnectionError):
                list(stream)
        assert server.wait(SECONDS) == -signal.SIGTERM
    assert not [child for child in children if child.is_running()]
