"""Perplexity of a text: each token is predicted once, and what is no text is refused."""

import json
import math

import pytest
import torch
from text_fixtures import BUNDLED, bundled_model, tokenizer_of

from deepseek_moe import perplexity
from deepseek_moe.errors import UserError
from deepseek_moe.perplexity import measure_loss, read_held_out

BOS = 4094
TEXT = "Once upon a time there was a “king”.\nHe had three sons, and none of them was wise.\n" * 2


@pytest.mark.parametrize("window", [2, 9, 1024])
@pytest.mark.parametrize("piece", [3, 512])
def test_equals_the_sum_over_tokens_one_by_one(window, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "PIECE", piece)
    model, tokenizer, file = bundled_model(), tokenizer_of(BUNDLED), tmp_path / "text.jsonl"
    texts = [TEXT, "", "A bird."]
    file.write_text("\n\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n")
    loss = measure_loss(model, read_held_out(file, tokenizer), window, BOS)
    nats, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens += len(ids)
        while ids:
            seen, ids = [BOS, *ids[: window - 1]], ids[window - 1 :]
            with torch.no_grad():
                logs = model(torch.tensor([seen])).logits[0].double().log_softmax(-1)
            nats -= sum(logs[at, seen[at + 1]].item() for at in range(len(seen) - 1))
    assert (loss.tokens, loss.bytes) == (tokens, sum(len(text.encode()) for text in texts))
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / loss.bytes, rel=1e-5)


def test_a_plain_file_is_one_document(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())  # with a byte order mark
    found = read_held_out(file, tokenizer_of(BUNDLED))
    assert found.documents == [tokenizer_of(BUNDLED)(TEXT, add_special_tokens=False).input_ids]
    assert found.bytes == len(TEXT.encode())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "is no text"),
        ("a.txt", b"abc\x00def", "is no text, because"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\nbroken\n', 'line 3 has no "text"'),
        ("a.jsonl", b'{"prompt": "a"}', 'line 1 has no "text"'),
        ("a.jsonl", b'{"text": 5}', 'line 1 has no "text"'),
        ("a.jsonl", b'["text"]', 'line 1 has no "text"'),
        ("a.jsonl", rb'{"text": "\ud800"}', 'line 1 has no "text"'),
    ],
)
def test_what_is_no_text_is_refused(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{said}.*; give UTF-8"):
        read_held_out(tmp_path / name, tokenizer_of(BUNDLED))
    for file in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            read_held_out(file, tokenizer_of(BUNDLED))
