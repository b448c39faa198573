"""The adapter of lm-evaluation-harness beside the harness's own backend for transformers."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from gpu_fixtures import with_engine
from text_fixtures import BUNDLED, assistant, bundled_model, tokenizer_of, user

from deepseek_moe import Generator
from deepseek_moe.errors import UserError
from deepseek_moe.evaluate import scoring

pytest.importorskip("lm_eval", reason="lm_eval is not here: pip install lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from deepseek_moe.evaluate import harness
from deepseek_moe.evaluate.harness import EngineLM
from deepseek_moe.evaluate.scoring import Pair
from deepseek_moe.evaluate.tasks import RememberingLM

pytestmark = pytest.mark.slow  # The harness takes seconds to import.
BOS = 4094
STORY = (
    "Once upon a time there lived a poor woodcutter with his wife and two children in a small hut "
    "at the edge of a great forest. He had little to bite and to break. "
)
CONTEXT = 1024
ways = pytest.mark.parametrize("way", [lambda m: Generator(m, fast=False), with_engine])


def ours(way: Any = with_engine) -> EngineLM:
    return EngineLM(way(bundled_model()), tokenizer_of(BUNDLED))


def theirs(**options: Any) -> HFLM:
    """Without its cache of logits, which mistakes texts that are divided at different places."""
    options |= {"tokenizer": tokenizer_of(BUNDLED), "batch_size": 3, "logits_cache": False}
    return HFLM(bundled_model(), **options)


def requests(kind: str, *args: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, n) for n, one in enumerate(args)]


def text_of(tokens: int) -> str:
    """A text of so many tokens besides BOS."""
    ids = tokenizer_of(BUNDLED)(STORY * 40, add_special_tokens=False).input_ids[:tokens]
    return tokenizer_of(BUNDLED).decode(ids)


@ways
def test_log_likelihoods(way):
    """Unequal lengths, a shared context, none, one that ends in spaces, and a continuation whose
    last token is the first that the model's context does not hold."""
    endings = [" the king", " a", " his wife and the two children", "."]
    asked = [(STORY, ending) for ending in endings]
    asked += [
        ("", STORY),
        ("", " a"),
        ("One day  ", "the bird"),
        ("Said he:\n", "No."),
        (" ", "a b"),
    ]
    whole = text_of(CONTEXT)
    assert len(tokenizer_of(BUNDLED)(whole).input_ids) == CONTEXT + 1
    asked += [(whole[:-9], whole[-9:]), (whole[:20], whole[20:]), (STORY, endings[0])]
    given = requests("loglikelihood", *asked)
    found, wanted = ours(way).loglikelihood(given), theirs().loglikelihood(given)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_context_of_several_answers_is_tokenised_once():
    lm = ours()
    with patch.object(lm, "tokenizer", wraps=lm.tokenizer) as tokenizer:
        lm.loglikelihood(requests("loglikelihood", *[(STORY, f"answer {n}") for n in range(4)]))
    texts = [text for call in tokenizer.call_args_list for text in call.args[0]]
    assert texts.count(STORY.rstrip()) == 1 and len(texts) == 5


@ways
def test_rolling_log_likelihoods(way):
    """Here the other backend adds a second BOS, unless it is told to add none."""
    given = requests("loglikelihood_rolling", (STORY,), (text_of(2500),), ("",), (STORY * 2,))
    found = ours(way).loglikelihood_rolling(given)
    wanted = theirs(add_bos_token=False).loglikelihood_rolling(given)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found[2] == 0


@ways
def test_generations(way):
    options = {"max_gen_toks": 24, "do_sample": False}
    kinds = [{"until": ["."]}, {"until": [" the", ","], "temperature": 0.0}, {"until": "\n\n"}]
    starts = ["The old man", STORY, "A bird", "", "The king said"]
    given = requests("generate_until", *((t, options | k) for k in kinds for t in starts))
    found, wanted = ours(way).generate_until(given), theirs().generate_until(given)
    assert found == wanted
    assert len(set(found)) > 10
    assert not any(" the" in text or "," in text for text in found[5:10])


def pairs_asked(lm: EngineLM, kind: str, *asked: tuple) -> list[Pair]:
    with patch.object(
        harness, "score", side_effect=lambda _, pairs: pairs_seen.extend(pairs) or []
    ):
        pairs_seen: list[Pair] = []
        getattr(lm, kind)(requests(kind, *asked))
    return pairs_seen


def test_every_text_has_one_bos_in_front():
    lm = ours()
    talk = lm.apply_chat_template([user("Hi"), assistant("Hello"), user("Who are you?")])
    assert talk.startswith(lm.tokenizer.bos_token) and talk.endswith("Assistant:")
    open_end = lm.apply_chat_template([user("Hi"), assistant("I")], add_generation_prompt=False)
    assert open_end.endswith("Assistant: I")
    long = text_of(CONTEXT + 200)
    pairs = pairs_asked(lm, "loglikelihood", (talk, " I"), ("", "a"), ("Hi", " a"), (long, " a b"))
    pairs += pairs_asked(lm, "loglikelihood_rolling", (talk,), (STORY,))
    assert len(pairs) == 6
    for pair in pairs:
        assert pair.read[0] == BOS and pair.read.count(BOS) == 1
        assert len(pair.read) <= CONTEXT
    assert len(pairs[3].read) == CONTEXT
    ids = lm.tokenizer(long + " a b").input_ids
    assert (pairs[3].context + pairs[3].continuation)[1:] == tuple(ids[-CONTEXT:])


def test_a_prompt_that_is_too_long_keeps_bos_and_its_end():
    lm, seen = ours(), []
    stream = lm.generator.stream
    with patch.object(lm.generator, "stream", lambda p, *a: seen.extend(p) or stream(p, *a)):
        lm.generate_until(requests("generate_until", (text_of(CONTEXT), {"max_gen_toks": 3})))
    assert seen == [[BOS, *lm.tokenizer(text_of(CONTEXT)).input_ids[-(CONTEXT - 4) :]]]


def test_sampled_texts_and_what_is_refused():
    lm = ours()
    given = {"do_sample": True, "temperature": 5.0, "top_k": 50, "max_gen_toks": 8}
    texts = lm.generate_until(requests("generate_until", *[(STORY, given)] * 6))
    assert len(set(texts)) > 1
    for options, said in (
        ({"max_gen_toks": CONTEXT - 1}, "asks for 1023 new tokens"),
        ({"num_beams": 4}, "num_beams"),
        ({"top_p": 2.0}, "top_p is 2"),
    ):
        with pytest.raises(UserError, match=said):
            lm.generate_until(requests("generate_until", ("a", options)))
    with pytest.raises(UserError, match="but the model's context is 1024"):
        lm.loglikelihood(requests("loglikelihood", ("a", text_of(CONTEXT + 1))))


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("loglikelihood", [(STORY, " a"), ("One day", " he"), ("The", " king of the forest")]),
        ("loglikelihood_rolling", [(STORY,), ("A king.",), (STORY * 2,)]),
        ("generate_until", [(start, {"max_gen_toks": 4}) for start in ("A", STORY, "The king")]),
    ],
)
def test_what_was_answered_before_an_interruption_is_kept(kind, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_ON_CPU", 1)  # one request in each batch
    given = requests(kind, *asked)
    wanted = getattr(ours(), kind)(given)
    lm, calls = ours(), []

    def some(*args: Any, of: Any) -> Any:
        calls.append(len(args[1] if of is score else args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return of(*args)

    score, stream = scoring._score_batch, lm.generator.stream
    monkeypatch.setattr(scoring, "_score_batch", lambda *a: some(*a, of=score))
    monkeypatch.setattr(lm, "generator", SimpleNamespace(**vars(lm.generator)), raising=True)
    lm.generator.context = CONTEXT
    lm.generator.stream = lambda *a: some(*a, of=stream)
    asked_of = RememberingLM(lm, tmp_path / "answers")
    with pytest.raises(KeyboardInterrupt):
        getattr(asked_of, kind)(given)
    asked_of.dbdict.stream.write('["cut off')
    asked_of.dbdict.stream.close()
    asked_of = RememberingLM(lm, tmp_path / "answers")
    assert getattr(asked_of, kind)(given) == wanted
    assert calls == [1] * 4  # the third was interrupted, and only that one is asked again
