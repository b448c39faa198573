"""Coloured text: each token has the colour, or the number, of its expert, wherever it is shown."""

import io
import sys
from collections import Counter

import pytest
from page_fixtures import EVIL, Page
from rich.color import Color, ColorSystem
from rich.console import Console

from deepseek_moe.errors import UserError
from deepseek_moe.experts.coloured_text import COLOURS, OTHERS, as_html, in_terminal
from deepseek_moe.experts.profile import Picks

TOKENS = [" The", " cat", "\n", "sat.\n", "\ufffd", "[red]", "\x1b[31m", "\t"]
TOP = [3, 1, 3, 3, 0, 1, 2, 3]


def shown(tokens: list[str], top: list[int], **console: object) -> str:
    out = io.StringIO()
    Console(file=out, width=100, **console).print(in_terminal(tokens, top, 64, 5))
    return out.getvalue()


def backgrounds(tokens: list[str], top: list[int]) -> list[str]:
    """The background of each token in a terminal with all colours."""
    console = Console(file=io.StringIO(), color_system="truecolor", force_terminal=True, width=999)
    text = next(iter(in_terminal(tokens, top, 64, 5).__rich_console__(console, console.options)))
    styles = [part.style for part in console.render(text) if part.style and part.text.strip("\n")]
    assert {style.color.triplet.hex for style in styles} == {"#000000"}
    return [style.bgcolor.triplet.hex for style in styles]


def test_frequent_experts_have_a_colour_of_their_own_and_the_others_grey():
    top = [expert for expert in range(12) for _ in range(20 - expert)] + [40, 41, 0]
    found = backgrounds(["word"] * len(top), top)
    ranked = [expert for expert, _ in Counter(top).most_common(len(COLOURS))]
    for expert, background in zip(top, found, strict=True):
        assert background == (COLOURS[ranked.index(expert)] if expert in ranked else OTHERS)
    said = shown(["word"] * len(top), top, color_system=None)
    assert "Layer 5: 14 of 64 experts are the top expert of a token." in said
    assert f"{len(top)} tokens:" in " ".join(said.split())
    assert "expert 0: 21" in said and "expert 7: 13" in said and "expert 8:" not in said
    assert f"6 others: {12 + 11 + 10 + 9 + 1 + 1}" in said


def test_without_colours_the_number_follows_the_token(monkeypatch):
    expected = " The[3] cat[1]↵[3]\nsat.↵[3]\n\ufffd[0][red][1]␛[31m[2]"
    assert shown(TOKENS, TOP).startswith(expected)  # a pipe
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(TOKENS, TOP, force_terminal=True, color_system="truecolor").startswith(expected)


def test_few_colours_are_taken_for_none():
    """Of 16 colours several would be the same; of 256 none is."""
    assert "cat[1]" in shown(TOKENS, TOP, force_terminal=True, color_system="standard")
    assert "cat[1]" not in shown(TOKENS, TOP, force_terminal=True, color_system="256")
    numbers = {Color.parse(c).downgrade(ColorSystem.EIGHT_BIT).number for c in [*COLOURS, OTHERS]}
    assert len(numbers) == len(COLOURS) + 1


def test_no_token_reaches_the_terminal_as_a_command():
    for console in ({}, {"force_terminal": True, "color_system": "truecolor"}):
        assert "\x1b[31m" not in shown(["a", "\x1b[31m", "\x9b31m", "\r"], [0] * 4, **console)
    assert "\x9b" not in shown(["\x9b31m"], [0])
    assert "␍[0]" in shown(["\r"], [0])


def test_the_fragment_holds_tokens_and_experts_and_no_markup_of_theirs():
    first = Picks([[top, 9] for top in [*TOP, 0]], [[0.50049, 0.25]] * 9)
    plain = Page(as_html(["a"] * 9, {1: first}, 64))
    second = Picks([[7]] * 9, [[0.1]] * 9)
    page = Page(as_html([*TOKENS, EVIL], {1: first, 4: second}, 64, begin=3))
    assert page.tags == plain.tags
    data = page.data[0]
    assert data["tokens"] == [
        *[" The", " cat", "↵\n", "sat.↵\n", "\ufffd", "[red]", "␛[31m", "\t"],
        EVIL,
    ]
    assert data["begin"] == 3
    assert [(layer["number"], layer["experts"]) for layer in data["layers"]] == [
        (1, first.experts),
        (4, second.experts),
    ]
    assert [layer["weights"][0] for layer in data["layers"]] == [[0.5, 0.25], [0.1]]
    assert data["layers"][0]["frequent"] == [[3, 4], [0, 2], [1, 2], [2, 1]]
    assert len(data["colours"]) == len(set(data["colours"])) == 8


def test_rich_is_named_where_it_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(UserError, match="needs rich; pip install rich"):
        in_terminal(["a"], [0], 4, 1)
    assert "a" in as_html(["a"], {1: Picks([[0]], [[1.0]])}, 4)
