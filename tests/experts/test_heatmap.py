"""Heat maps: what is drawn is what was measured, and no name can break a picture."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps, rc_context
from page_fixtures import EVIL, Page
from PIL import Image

from deepseek_moe.errors import UserError
from deepseek_moe.experts.heatmap import load_image, page, write_html, write_png
from deepseek_moe.experts.profile import SCORES, LayerProfile, Profile


def profile(*picks: list[int]) -> Profile:
    """Layers 2, 3, … with these picks, and two other scores."""
    layers = {
        number: LayerProfile(of, [n / 1000 for n in of], [n / 7 + 1 for n in of])
        for number, of in enumerate(picks, 2)
    }
    return Profile(layers, 50, "tensors:m", "d", {"model": "/home/me/models/tiny-base"})


FIRST = profile([0, 10, 20, 30, 40], [22, 18, 20, 34, 6])
SECOND = profile([20, 20, 20, 20, 20], [30, 25, 21, 19, 5])


def draw(file: Path, **profiles: Profile) -> np.ndarray:
    """The picture, [H, W, 3]."""
    write_png(profiles, file)
    return np.array(Image.open(file).convert("RGB")).astype(int)


def test_the_png_has_the_colour_of_each_share_where_its_expert_is(tmp_path):
    pixels = draw(tmp_path / "map.png", stories=FIRST)
    cells = pixels[:, : int(0.85 * pixels.shape[1])]  # The colour bar is right of them.
    found = []
    for layer in FIRST.layers.values():
        for picks in layer.picks:
            share = picks * 5 / sum(layer.picks)
            wanted = 255 * np.array(colormaps["viridis"](share / 2)[:3])  # 2 is the largest share.
            near = np.argwhere(np.abs(cells - wanted).max(axis=-1) <= 6)
            assert len(near) > 400, (picks, len(near))
            found.append(np.median(near, axis=0))
    rows = np.array(found).reshape(2, 5, 2)
    unique = [0, 1, 3, 4]  # The shares of expert 2 are equal in both layers.
    assert (np.diff(rows[:, :, 1], axis=1) > 100).all()
    assert (rows[1, unique, 0] - rows[0, unique, 0] > 10).all()
    assert np.ptp(rows[0, unique, 0]) < 5 and np.ptp(rows[1, unique, 0]) < 5


def test_a_difference_is_orange_for_more_and_purple_for_less(tmp_path):
    alone = draw(tmp_path / "1.png", a=FIRST)
    same = draw(tmp_path / "2.png", a=FIRST, b=FIRST)
    other = draw(tmp_path / "3.png", a=FIRST, b=SECOND)
    assert alone.shape[0] < 0.6 * same.shape[0] and same.shape == other.shape
    bottom = slice(int(0.7 * same.shape[0]), None)
    cells = slice(100, int(0.85 * same.shape[1]))
    orange, purple = [], []
    for pixels in (same, other):
        red, _, blue = np.moveaxis(pixels[bottom, cells], -1, 0)
        orange.append(np.argwhere(red - blue > 60))
        purple.append(np.argwhere(blue - red > 30))
    assert len(orange[0]) == len(purple[0]) == 0
    # Expert 0 on the left has more in both layers, expert 4 on the right has less.
    assert len(orange[1]) > 1000 and len(purple[1]) > 1000
    assert np.median(orange[1], axis=0)[1] + 300 < np.median(purple[1], axis=0)[1]


def test_the_png_of_the_official_size_is_small_and_the_same_each_time(tmp_path):
    random = np.random.default_rng(0)
    big = [profile(*random.integers(0, 400, (27, 64)).tolist()) for _ in range(2)]
    names = {"general text": replace(big[0], settings={"model": EVIL}), EVIL * 3: big[1]}
    write_png(names, tmp_path / "1.png")
    with rc_context({"image.interpolation": "bilinear", "font.size": 30}):  # a user's own style
        write_png(names, tmp_path / "2.png")
    content = (tmp_path / "1.png").read_bytes()
    assert content == (tmp_path / "2.png").read_bytes()
    assert len(content) < 200_000
    image = Image.open(io.BytesIO(content))
    assert "Software" not in image.info  # It would name the version of matplotlib.
    width, height = image.size
    assert width == 1216 and 1 < height / width < 1.6


def test_the_page_holds_the_numbers_of_the_profiles(tmp_path):
    write_html({"a": FIRST, "b": SECOND}, tmp_path / "page.html")
    data = Page((tmp_path / "page.html").read_text(encoding="utf-8")).data[0]
    assert data["layers"] == [2, 3] and data["experts"] == 5
    assert data["model"] == "tiny-base"  # and not where it lies on this machine
    for kept, drawn in zip(data["profiles"], (FIRST, SECOND), strict=True):
        assert kept["tokens"] == 50
        for score in SCORES:
            assert kept[score] == [getattr(layer, score) for layer in drawn.layers.values()]
    assert [kept["name"] for kept in data["profiles"]] == ["a", "b"]


def test_the_page_offers_the_scores_that_were_measured():
    assert Page(page({"a": FIRST})).data[0]["scores"] == list(SCORES)
    bare = {n: replace(layer, gate_times_norm=[]) for n, layer in FIRST.layers.items()}
    data = Page(page({"a": replace(FIRST, layers=bare)})).data[0]
    assert data["scores"] == ["picks", "gate"] and "gate_times_norm" not in data["profiles"][0]


def test_the_page_is_whole_whatever_the_names_are(tmp_path):
    plain, evil = tmp_path / "plain.html", tmp_path / "evil.html"
    write_html({"a": FIRST, "b": SECOND}, plain)
    write_html({EVIL: FIRST, "<!--TEXT-->": SECOND}, evil, text="<p>above</p>")
    pages = [Page(file.read_text(encoding="utf-8")) for file in (plain, evil)]
    assert [tag for tag in pages[1].tags if tag != "p"] == [t for t in pages[0].tags if t != "p"]
    assert pages[1].tags.count("p") == pages[0].tags.count("p") + 1
    assert [kept["name"] for kept in pages[1].data[0]["profiles"]] == [EVIL, "<!--TEXT-->"]
    assert not {"src", "href", "onerror"} & pages[0].attributes
    assert not re.search(r"https?:|url\(|@import|\bfetch\b", plain.read_text(encoding="utf-8"))


@pytest.mark.parametrize("write", [write_png, write_html])
def test_profiles_of_two_models_and_files_that_are_there_are_refused(write, tmp_path):
    with pytest.raises(UserError, match="a and b differ in layers or experts; draw"):
        write({"a": FIRST, "b": profile([1, 2, 3, 4, 5])}, tmp_path / "file")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write({"a": FIRST}, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    write({"a": FIRST}, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").stat().st_size > 4000


def test_only_the_png_needs_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="needs matplotlib; pip install matplotlib"):
        write_png({"a": FIRST}, tmp_path / "map.png")
    write_html({"a": FIRST}, tmp_path / "page.html")
    assert load_image([[1, 2]], [1]).any()


def test_the_picture_of_the_load_is_lighter_for_more_picks():
    image = load_image([list(range(16)), [0] * 16, [15] * 16], [1, 2, 3])
    assert image.dtype == np.uint8 and image.shape == ((1 + 3 + 3) * 12, (2 + 16) * 12, 3)
    luminance = image @ [0.2126, 0.7152, 0.0722]
    cells = luminance[12 + 5 :: 12, 24 + 5 :: 12]  # a pixel in the middle of each
    assert (np.diff(cells[0]) > 0).all()
    assert (cells[1] == cells[0][0]).all()  # An expert without picks; a layer without any.
    assert (image[12 + 24 + 5, 24 + 5 :: 12] == image[12 + 24 + 5, 24 + 5]).all()
    even = 255 * np.array(colormaps["viridis"](1 / 3)[:3])
    assert np.abs(image[12 + 24 + 5, 24 + 5] - even).max() <= 6
    strip = luminance[12 + 4 * 12 + 5, 24:]
    assert (np.diff(strip) >= 0).all() and np.ptp(strip) > 150
    # The colours do not depend on other layers, and what is beyond the strip has its last colour.
    busy = load_image([[100] + [0] * 15], [1])
    assert (busy[12 + 5, 24 + 5] == image[12 + 4 * 12 + 5, -1]).all()
