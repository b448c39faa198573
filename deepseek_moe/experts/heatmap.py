"""Heat maps of profiles, layers down and experts across: as PNG, as HTML page, for TensorBoard.

A cell is the score of an expert over the mean of its layer. For picks this is the expert's share
over the even share: 1 where all experts are used alike. A difference is that of two such numbers.
"""

import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_bytes, write_text
from .profile import SCORES, Profile


def _points(colours: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(colours), dtype=np.uint8).reshape(-1, 3)


# Points of viridis and of ColorBrewer's PuOr, between which colours are interpolated. Both are made
# for colour-blind readers; the first one's lightness grows evenly, so it also works in grey.
SEQUENTIAL = _points("440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725")
DIVERGING = _points("2d004b 5f3a91 9990bf cfcfe5 f7f7f6 fed59f ee9b39 bd6109 7f3b08")
MOST = 3.0
"""What is larger has the same colour, so that one busy expert does not darken all others."""
INK, GREY = "#1e293b", "#64748b"
WIDTH, LEFT, RIGHT = 7.6, 0.52, 1.02  # inches of a PNG, and beside its cells
HEAD, ABOVE, BELOW, FOOT = 0.66, 0.3, 0.26, 0.2  # above all, around each map, below all
CELL = 12  # pixels in TensorBoard


def over_mean(layers: Sequence[Sequence[float]]) -> np.ndarray:
    """[layers, E]: scores over the mean of their layer; 0 in a layer whose scores are all 0."""
    scores = np.array(layers, dtype=float)
    mean = scores.mean(axis=1, keepdims=True)
    return np.divide(scores, mean, out=np.zeros_like(scores), where=mean > 0)


def write_png(profiles: dict[str, Profile], file: Path, overwrite: bool = False) -> None:
    """Draws the picks of each profile, and the differences to the first. Same input, same bytes.

    Args:
        profiles: by the names that stand above the maps; all of one model.

    Raises:
        UserError: they differ in layers or experts, matplotlib is missing, or `file` cannot be
            written, or it exists and `overwrite` is False.
    """
    first, shares = _comparable(profiles)
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a heat map as PNG needs matplotlib; pip install matplotlib") from error
    names = list(profiles)
    maps = [(f"{_short(name)}: {profiles[name].tokens:,} tokens", shares[name]) for name in names]
    maps += [
        (f"{_short(name)} minus {_short(names[0])}", shares[name] - shares[names[0]])
        for name in names[1:]
    ]
    cell = min(max((WIDTH - LEFT - RIGHT) / first.num_experts, 0.1), 0.26)
    inner = len(first.layers) * cell
    height = HEAD + len(maps) * (ABOVE + inner + BELOW) + FOOT
    # The user's own style of matplotlib shall not change the picture. DejaVu comes with it.
    with style.context(["default", {"font.size": 8.5, "font.family": "DejaVu Sans"}]):
        figure = Figure((WIDTH, height), facecolor="white")
        _write_title(figure, first, height)
        for at, (title, values) in enumerate(maps):
            bottom = height - HEAD - at * (ABOVE + inner + BELOW) - ABOVE - inner
            box = (LEFT / WIDTH, bottom / height, 1 - (LEFT + RIGHT) / WIDTH, inner / height)
            ax = figure.add_axes(box)
            top = max(shares[name].max() for name in names)
            _draw_map(ax, title, values, list(first.layers), top, at >= len(names))
        ax.set_xlabel("expert", color=INK)
        image = io.BytesIO()
        small: dict[str, Any] = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
        figure.savefig(image, format="png", dpi=160, **small)
    write_bytes(file, image.getvalue(), overwrite)


def _write_title(figure: Any, first: Profile, height: float) -> None:
    place = {"parse_math": False, "va": "center"}  # A name may contain $.
    title = f"Which experts the tokens choose: {_short(_model_name(first), 44)}"
    figure.text(0.02, 1 - 0.2 / height, title, size=11, weight="bold", color=INK, **place)
    a_token = sum(next(iter(first.layers.values())).picks) / first.tokens
    what = f"Each token picks {a_token:.0f} of {first.num_experts} experts in a layer."
    what += " Colours: an expert's share of the picks over the even share."
    figure.text(0.02, 1 - 0.42 / height, what, color=GREY, **place)


def _draw_map(
    ax: Any, title: str, values: np.ndarray, layers: list[int], top: float, is_difference: bool
) -> None:
    """One map with its colour bar. `top` is the largest share of all maps."""
    from matplotlib.colors import LinearSegmentedColormap

    points = DIVERGING if is_difference else SEQUENTIAL
    colours = LinearSegmentedColormap.from_list("experts", points / 255)
    most = min(MOST, max(1.5, top)) - is_difference
    image = ax.imshow(
        values, cmap=colours, vmin=-most if is_difference else 0, vmax=most, aspect="auto"
    )
    ax.set_title(title, loc="left", size=9, color=INK, pad=4, parse_math=False)
    ax.set_ylabel("layer", color=INK)
    every = 1 if len(layers) <= 10 else 3
    ax.set_yticks(range(0, len(layers), every), layers[::every])
    num_experts = values.shape[1]
    ax.set_xticks(range(0, num_experts, 1 if num_experts <= 32 else 4))
    ax.tick_params(length=0, labelsize=7.5, labelcolor=INK, pad=3)
    for edge, count in (("x", num_experts), ("y", len(layers))):  # lines between the cells
        getattr(ax, f"set_{edge}ticks")(np.arange(count + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.4)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    if is_difference:  # In grey, more and less would look alike.
        rows, columns = np.nonzero(values < -most / 3)
        ax.scatter(columns, rows, marker="_", s=400 / num_experts, lw=0.8, color="white")
    _draw_colour_bar(ax, image, most, is_difference)


def _draw_colour_bar(ax: Any, image: Any, most: float, is_difference: bool) -> None:
    """Beside the map. It ends in an arrow where a value lies beyond its end."""
    box, width = ax.get_position(), ax.figure.get_figwidth()
    place = (box.x1 + 0.12 / width, box.y0, 0.12 / width, box.height)
    beyond = np.abs(image.get_array()).max() > most
    extend = ("both" if is_difference else "max") if beyond else "neither"
    bar = ax.figure.colorbar(image, cax=ax.figure.add_axes(place), extend=extend)
    step = 1 if most >= 2 - is_difference else 0.5
    ticks = [tick for tick in np.arange(-MOST, MOST + 1, step) if bar.vmin <= tick <= bar.vmax]
    said = {0: "0 = same"} if is_difference else {1: "1 = even"}
    plain = "+g" if is_difference else "g"
    bar.set_ticks(ticks, labels=[said.get(tick, f"{tick:{plain}}") for tick in ticks])
    bar.ax.tick_params(length=2, labelsize=7.5, labelcolor=INK, color=GREY)
    bar.outline.set_visible(False)


def write_html(
    profiles: dict[str, Profile], file: Path, text: str = "", overwrite: bool = False
) -> None:
    """Writes `page` into a file.

    Raises:
        UserError: the profiles differ in layers or experts, or `file` cannot be written, or it
            exists and `overwrite` is False.
    """
    write_text(file, page(profiles, text), overwrite)


def page(profiles: dict[str, Profile], text: str = "") -> str:
    """A page in HTML that shows each profile and its difference to the first, by any score.

    The page needs no network. Hovering over a cell, tapping it or moving to it by the arrow keys
    shows all numbers of this expert.

    Args:
        profiles: by their names; all of one model, with the same scores.
        text: HTML that is put above the map, as it is: coloured_text.as_html makes it.

    Raises:
        UserError: they differ in layers or experts.
    """
    first, _ = _comparable(profiles)
    layer = next(iter(first.layers.values()))
    scores = [score for score in SCORES if getattr(layer, score)]
    data = {
        "model": _model_name(first),
        "layers": list(first.layers),
        "experts": first.num_experts,
        "most": MOST,
        "colours": {"sequential": SEQUENTIAL.tolist(), "diverging": DIVERGING.tolist()},
        "scores": scores,
        "profiles": [
            {"name": name, "tokens": profile.tokens}
            | {score: [getattr(at, score) for at in profile.layers.values()] for score in scores}
            for name, profile in profiles.items()
        ],
    }
    empty = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return empty.replace("<!--DATA-->", json_in_html(data)).replace("<!--TEXT-->", text)


def json_in_html(data: Any) -> str:
    """JSON for a <script> element, which no text in it can end."""
    return json.dumps(data).replace("<", r"\u003c")


def load_image(picks: list[list[int]], layers: list[int]) -> np.ndarray:
    """The picture of the load for TensorBoard, drawn without matplotlib.

    The colours mean the same in every picture: the strip below the map shows them from no picks to
    MOST times the even share.

    Args:
        picks: of each layer, how many tokens chose each expert.
        layers: the numbers of these layers, which stand on the left.

    Returns:
        [H, W, 3] uint8, with cells of 12 x 12 pixels.
    """
    from PIL import Image, ImageDraw  # TensorBoard needs Pillow itself.

    shares = over_mean(picks)
    height, width = shares.shape
    strip = _colours(np.linspace(0, 1, width * CELL))
    cells = _colours(shares / MOST).repeat(CELL, axis=0).repeat(CELL, axis=1)
    cells[CELL - 1 :: CELL] = cells[:, CELL - 1 :: CELL] = 255  # lines between the cells
    left, top = 2 * CELL, CELL
    image = np.full((top + (height + 3) * CELL, left + width * CELL, 3), 255, dtype=np.uint8)
    image[top : top + height * CELL, left:] = cells
    image[top + (height + 1) * CELL : top + (height + 2) * CELL, left:] = strip
    drawing = Image.fromarray(image)
    write = ImageDraw.Draw(drawing).text
    for row, layer in enumerate(layers):
        write((left - 2, top + row * CELL), str(layer), INK, anchor="ra")
    for expert in range(0, width, 4):
        write((left + (expert + 0.5) * CELL, 0), str(expert), INK, anchor="ma")
    for share in range(int(MOST) + 1):
        at = left + share / MOST * width * CELL
        write((at, top + (height + 2) * CELL), str(share), INK, anchor="ra" if share else "la")
    return np.array(drawing)


def _colours(values: np.ndarray) -> np.ndarray:
    """Values of [0, 1] -> their colours, [..., 3] uint8."""
    at = np.linspace(0, 1, len(SEQUENTIAL))
    channels = [np.interp(values, at, channel) for channel in SEQUENTIAL.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _comparable(profiles: dict[str, Profile]) -> tuple[Profile, dict[str, np.ndarray]]:
    """The first profile, and the picks of all over the means of their layers, [layers, E]."""
    first_name, first = next(iter(profiles.items()))
    for name, profile in profiles.items():
        if (list(profile.layers), profile.num_experts) != (list(first.layers), first.num_experts):
            raise UserError(
                f"the profiles {first_name} and {name} differ in layers or experts; "
                "draw those of one model together"
            )
    return first, {
        name: over_mean([layer.picks for layer in profile.layers.values()])
        for name, profile in profiles.items()
    }


def _model_name(profile: Profile) -> str:
    """As the user gave it, or the last folder of a long path; the fingerprint if none is known."""
    name = str(profile.settings.get("model", profile.model))
    return Path(name).name if Path(name).is_absolute() else name


def _short(name: str, width: int = 40) -> str:
    """In one line. What no encoding has written is replaced."""
    return textwrap.shorten(name.encode(errors="replace").decode(), width, placeholder=" …")
