"""examples/web_chat.py without its page: answers, errors, and the experts beside them."""

import re
import sys
from collections.abc import Iterator
from functools import partial
from html import unescape
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from example_fixtures import EXAMPLES, LONG, assert_error, run, talk
from page_fixtures import EVIL, Page
from text_fixtures import BUNDLED, bundled_model, tokenizer_of

from deepseek_moe import Generator, load
from deepseek_moe.decode.sampling import Sampling
from deepseek_moe.experts import coloured_text
from deepseek_moe.experts.measure import picked_experts

with patch("sys.path", [str(EXAMPLES), *sys.path]):
    import web_talk
    from web_page import conversation, frame
    from web_talk import Answerer, Talk, texts_of

GREEDY = (0, 1, 0, 6)  # temperature, top_p, top_k, max_new_tokens


def answerer(generator: Any = None) -> Answerer:
    generator = generator or Generator(bundled_model())
    return Answerer(generator, tokenizer_of(BUNDLED), "a model", {"temperature": 0.0})


def last(steps: Iterator[tuple[Any, ...]]) -> tuple[Any, ...]:
    return list(steps)[-1]


def test_answers_are_those_of_the_conversation_in_a_terminal():
    model, tab = answerer(), Talk()
    for question in ("One?", "Two?"):
        tab.ask(question)
        assert tab.shown[-1] == {"role": "user", "content": question}
        messages, said, refused = last(model.answer(tab, *GREEDY))
        assert (said.strip(), refused) == ("(cut after --max_new_tokens 6)", "")
    assert messages == tab.messages == talk("One?", "Two?").messages
    text = tokenizer_of(BUNDLED).decode(tab.ids[tab.begin :])
    assert text.strip() == messages[-1]["content"] != "" and len(tab.ids) == tab.begin + 6
    tab.retry()
    assert tab.shown == tab.messages[:3]
    assert last(model.answer(tab, *GREEDY))[0] == messages
    other = Talk()
    other.ask("Two?")
    assert last(model.answer(other, *GREEDY))[0] == talk("Two?").messages
    tab.clear()
    tab.retry()
    assert "the prompt is empty" in last(model.answer(tab, *GREEDY))[1]


def test_an_answer_is_shown_as_it_comes_and_stops_where_it_is(monkeypatch):
    monkeypatch.setattr(web_talk, "SHOWN_EVERY", 0.0)
    model, tab = answerer(), Talk()
    tab.ask("One?")
    steps = model.answer(tab, 0, 1, 0, 50)
    texts = [next(steps)[0][-1]["content"] for _ in range(4)]
    assert sorted(texts, key=len) == texts and len(texts[0]) < len(texts[3])
    tab.stop()
    messages, said, _ = last(steps)
    assert said.strip() == "(stopped)" and messages[-1]["content"].startswith(texts[3])
    assert tab.messages == messages and tab.ids[tab.begin :]
    tab.ask("Two?")  # is not stopped
    assert "cut" in last(model.answer(tab, *GREEDY))[1]


@pytest.mark.parametrize(
    ("question", "settings", "said"),
    [
        (LONG, GREEDY, "error: the prompt has .* context is 1024"),
        ("a\ud800", GREEDY, "error: the prompt .* is not UTF-8"),
        ("Two?", (-1, 1, 0, 6), "error: temperature is -1"),
        ("Two?", (1, None, 0, 6), "error: a setting is no number"),
        ("break", GREEDY, re.escape(f"error: {EVIL} twice")),
    ],
)
def test_an_error_is_one_line_and_leaves_the_conversation_as_it_was(question, settings, said):
    class Broken(Generator):
        def stream(self, *args: Any) -> Iterator[list[int]]:
            if tab.question == "break":
                raise RuntimeError(f"{EVIL}\ntwice")
            return super().stream(*args)

    model, tab = answerer(Broken(bundled_model())), Talk()
    tab.ask("One?")
    last(model.answer(tab, *GREEDY))
    before = [*tab.messages], [*tab.ids]
    tab.ask(question)
    messages, found, refused = last(model.answer(tab, *settings))
    assert re.match(said, found) and "\n" not in found
    assert refused == question
    assert (tab.messages, tab.ids) == before and messages == tab.messages
    tab.retry()
    assert last(model.answer(tab, *GREEDY))[0] == before[0]


def test_the_sampler_stays_while_its_settings_do():
    """The engine captures its graph anew for another one."""
    model, tab, samplers = answerer(), Talk(), []
    with patch.object(Generator, "stream", lambda *args: samplers.append(args[3]) or iter([[5]])):
        for settings in ((0, 1, 0, 6), (0.7, 0.9, 5, 6), (0.7, 0.9, 5, 7), (0, 1, 0, 6)):
            tab.ask("One?")
            last(model.answer(tab, *settings))
    assert samplers[1] is samplers[2] and len(set(map(id, samplers[::2]))) == 2
    assert vars(samplers[1]) == vars(Sampling(0.7, top_k=5, top_p=0.9))
    assert samplers[3].temperature == 0


def test_the_experts_are_those_of_all_that_the_model_has_seen():
    model, tab = answerer(), Talk()
    for question in ("One?", f"{EVIL} é 🎉"):
        tab.ask(question)
        last(model.answer(tab, *GREEDY))
    text = model.experts_page(tab)
    page = Page(text)
    of_text, of_map = page.data
    assert "img" not in page.tags and "alert(1)" in "".join(of_text["tokens"])
    texts = texts_of(tab.ids, tokenizer_of(BUNDLED))
    assert of_text["tokens"] == [coloured_text.visible(text) for text in texts]
    assert of_text["begin"] == tab.begin
    picks = picked_experts(bundled_model(), tab.ids)
    for layer in of_text["layers"]:
        assert layer["experts"] == picks[layer["number"]].experts
    assert [(part["name"], part["tokens"]) for part in of_map["profiles"]] == [
        ("conversation", len(tab.ids)),
        ("last answer", 6),
    ]
    shown = Page(conversation(tab.messages))
    assert shown.tags == ["div"] * 4 and shown.attributes == {"class"}
    framed = frame(model, tab)
    start = r'<iframe sandbox="allow-scripts" title="[\w ]+" '
    assert re.fullmatch(start + 'srcdoc="[^"<>]*"></iframe>', framed)
    assert unescape(re.search('srcdoc="(.*)"', framed, re.DOTALL)[1]) == text
    assert frame(model, Talk()) == ""


def test_each_character_stands_at_its_first_token():
    tokenizer, text = tokenizer_of(BUNDLED), "A Führer 🎉 é"
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    texts = texts_of(ids, tokenizer)
    assert "".join(texts) == f"<BOS>{text}<EOS>"
    party = next(at for at, piece in enumerate(texts) if "🎉" in piece)
    assert texts[party + 1] == ""  # It is made of several tokens.


def test_experts_of_quantised_weights_are_shown_and_a_dense_model_has_none(tiny_model):
    quantised, _ = load(str(BUNDLED), quantization="int8")
    tab = Talk(ids=[0, 5, 6, 7], begin=2)
    assert len(Page(answerer(Generator(quantised)).experts_page(tab)).data[0]["layers"]) == 5
    dense = SimpleNamespace(model=tiny_model(first_k_dense_replace=9))
    assert "error: the model has no routed experts" in frame(answerer(dense), tab)


def test_what_is_wrong_is_said_before_the_model_is_loaded():
    refused = partial(patch, "web_page.load_model", side_effect=AssertionError("it is loaded"))
    with patch.dict(sys.modules, {"gradio": None}):
        assert_error(run("web_chat.py", "--model", "absent"), "the page needs gradio; pip install")
    assert_error(run("web_chat.py", "--top_k", 3), "no effect without --temperature")
    pytest.importorskip("gradio", reason="gradio is not here: pip install gradio")
    with refused():
        assert_error(run("web_chat.py", "--temperature", -1), "temperature is -1.0")
