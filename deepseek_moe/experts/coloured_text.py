"""A text with each token coloured by its top expert at a layer: in a terminal, and as HTML.

No palette has as many colours as a layer has experts. The most frequent experts of the text have a
colour each, and all others share a grey. A legend names the experts and counts their tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .heatmap import json_in_html
from .profile import Picks

# Paul Tol's light scheme: backgrounds of black text that colour-blind readers can tell apart. The
# most frequent expert has the first colour. OTHERS is the pale grey of that scheme.
COLOURS = "#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#44bb99", "#bbcc33", "#99ddff", "#aaaa00"
OTHERS = "#dddddd"
SIGNS = {code: 0x2400 + code for code in range(32)} | {9: "\t", 10: "↵\n", 127: "\u2421"}
SIGNS |= dict.fromkeys(range(128, 160), "\ufffd")  # These are control characters too.


def visible(token: str) -> str:
    """The token with signs for control characters. A line feed has a sign and still ends a line."""
    return token.translate(SIGNS)


def most_frequent(top: Sequence[int]) -> list[tuple[int, int]]:
    """The experts that have a colour of their own, and their tokens; most tokens first."""
    ranked = sorted(Counter(top).items(), key=lambda pair: (-pair[1], pair[0]))
    return ranked[: len(COLOURS)]


def in_terminal(tokens: list[str], top_E: list[int], num_experts: int, layer: int) -> Any:
    """What rich can print. Without colours, the number of its expert follows each token.

    Args:
        tokens: the text of each token.
        top_E: for each token the expert with the largest gate weight.
        num_experts: how many experts the layer has.
        layer: its number.

    Raises:
        UserError: rich is missing.
    """
    try:
        import rich.text
    except ImportError as error:
        raise UserError("coloured text in a terminal needs rich; pip install rich") from error
    del rich
    return _ColouredText([visible(token) for token in tokens], top_E, num_experts, layer)


@dataclass(frozen=True)
class _ColouredText:
    tokens: list[str]
    top: list[int]
    num_experts: int
    layer: int

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Called by rich, which knows the terminal."""
        from rich.columns import Columns
        from rich.text import Text

        frequent = most_frequent(self.top)
        colour_of = {expert: colour for (expert, _), colour in zip(frequent, COLOURS, strict=False)}
        # With 16 colours or fewer, several of ours would become the same one.
        has_colours = console.color_system in ("256", "truecolor") and not console.no_color

        def coloured(text: str, expert: int | None) -> Text:
            style = f"#000000 on {colour_of.get(expert, OTHERS)}" if has_colours else ""
            return Text(text, style)

        text = Text()
        for token, expert in zip(self.tokens, self.top, strict=True):
            line, line_feed, _ = token.partition("\n")
            number = "" if has_colours else f"[{expert}]"
            text.append_text(coloured(line + number, expert)).append(line_feed)
        yield text
        used, count = len(set(self.top)), len(self.top)
        yield Text(
            f"\nLayer {self.layer}: {used} of {self.num_experts} experts are the top expert of a "
            f"token. They have so many of the {count} tokens:"
        )
        chips = [coloured(f" expert {expert}: {own} ", expert) for expert, own in frequent]
        if used > len(frequent):
            rest = count - sum(own for _, own in frequent)
            chips.append(coloured(f" {used - len(frequent)} others: {rest} ", None))
        yield Columns(chips)


def as_html(
    tokens: list[str], picks_by_layer: dict[int, Picks], num_experts: int, begin: int = 0
) -> str:
    """A fragment for `heatmap.page`, or for any page. It needs no network.

    A layer is chosen above the text. Hovering over a token, clicking it or moving to it by the
    arrow keys shows its experts and their gate weights at every layer.

    Args:
        tokens: the text of each token.
        picks_by_layer: by the number of the layer.
        num_experts: how many experts a layer has.
        begin: the token that a long text is scrolled to.
    """
    data = {
        "tokens": [visible(token) for token in tokens],
        "experts": num_experts,
        "colours": COLOURS,
        "others": OTHERS,
        "begin": begin,
        "layers": [
            {
                "number": number,
                "experts": picks.experts,
                "weights": [[round(w, 3) for w in weights_K] for weights_K in picks.weights],
                "frequent": most_frequent(picks.top),
            }
            for number, picks in picks_by_layer.items()
        ],
    }
    fragment = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return fragment.replace("<!--DATA-->", json_in_html(data))
