"""JSON files of strangers: what is read, and what is refused in one line with the file's name."""

import json

import pytest

from deepseek_moe import json_file
from deepseek_moe.errors import UserError
from deepseek_moe.json_file import DEEPEST, read_object


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((content, "is not JSON") for content in (b"", b"{", b"\xff", b"[" * 10**6)),
        *((content, "no JSON object") for content in (b"[]", b"5", b"null", b'"a"')),
        (nested(DEEPEST + 1).encode(), f"more than {DEEPEST} deep"),
        (b'{"a": ["\\ud800"]}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),  # a number of so many digits
    ],
    ids=lambda content: str(content[:20]),
)
def test_what_is_refused(content, said, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_object(file, "mend it")
    assert str(file) in str(caught.value) and said in str(caught.value)
    assert str(caught.value).endswith("; mend it") and "\n" not in str(caught.value)


def test_what_is_no_file_or_too_large(tmp_path, monkeypatch):
    for name in ("absent", ".", "x" * 5000):
        with pytest.raises(UserError, match=r"cannot be read: .*; get it anew"):
            read_object(tmp_path / name)
    monkeypatch.setattr(json_file, "LARGEST", 10)
    (tmp_path / "large").write_text('{"a": "123456789"}')
    with pytest.raises(UserError, match="it has more than 10 bytes"):
        read_object(tmp_path / "large")


def test_all_else_is_read(tmp_path):
    content = json.loads(nested(DEEPEST)) | {"\U0001f600": ["\U0001f600", 1.5, None, True, [], {}]}
    for ascii_only in (True, False):  # escapes of characters come in pairs
        text = json.dumps(content, ensure_ascii=ascii_only)
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert read_object(str(tmp_path / "a.json")) == content
