"""What stands behind the page of web_chat.py, called as Gradio does: from changing threads."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

from example_fixtures import EXAMPLES, Conversation

from deepseek_moe import Generator, load
from deepseek_moe.bundled import BUNDLED_CHAT_MODEL
from deepseek_moe.decode.sampling import Sampling

with patch("sys.path", [str(EXAMPLES), *sys.path]):
    import web_talk
    from web_talk import Answerer, Talk

QUESTIONS = ("Who are you?", "Tell me about a king.")


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def test_threads_change_nothing_and_experts_leave_the_engine_as_it_is(
    device, dtype, new_tokens, monkeypatch
):
    monkeypatch.setattr(web_talk, "SHOWN_EVERY", 0.0)
    (other, tokenizer), (model, _) = (
        load(str(BUNDLED_CHAT_MODEL), dtype, str(device)) for _ in range(2)
    )
    wanted = Conversation(Generator(other), tokenizer, new_tokens, Sampling())
    generator, tab = Generator(model), Talk()
    answerer = Answerer(generator, tokenizer, "tiny-chat", {})
    decoders = []
    for question in QUESTIONS:
        tab.ask(question)
        steps = answerer.answer(tab, 0, 1, 0, new_tokens)
        while in_a_thread(lambda steps=steps: next(steps, None)) is not None:
            pass
        assert "<section" in in_a_thread(lambda: answerer.experts_page(tab))
        wanted.ask(question)
        assert tab.messages == wanted.messages
        decoders.append(generator.engine and generator.engine.decoder)
    assert decoders[0] is decoders[1]
    assert (decoders[0] is not None) == (device.type == "cuda")
