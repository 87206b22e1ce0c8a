"""Drawings: the SVG is well formed, the PNG shows the same thing, axes and legends hold what they are given."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from engine.plots import (
    BOTTOM,
    COLOURS,
    LEFT,
    RIGHT,
    Drawing,
    Line,
    Picture,
    Series,
    Text,
    _dashes,
    encode,
    histogram,
    plot,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"
BLUE = tuple(bytes.fromhex(COLOURS["accent"][1:]))


def elements(drawing: Drawing, kind: str) -> list[ET.Element]:
    return ET.fromstring(drawing.svg()).findall(f"{SVG}{kind}")


def points(line: ET.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-1, 0.7, [-1, -0.5, 0, 0.5]),
        (1.3, 3.4, [1.5, 2, 2.5, 3]),
        (2.00001, 2.00005, [2.00001, 2.00002, 2.00003, 2.00004, 2.00005]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_what_is_counted_are_whole():
    assert ticks(1, 3, least=1) == [1, 2, 3]
    assert all(tick == int(tick) for tick in ticks(1, 60, least=1))


def test_words_are_escaped_in_svg():
    drawing = Drawing('a "<b>" & c', 10, 10, [Text(0, 5, "<script>&")])
    assert ET.fromstring(drawing.svg()).get("aria-label") == 'a "<b>" & c'
    assert elements(drawing, "text")[0].text == "<script>&"


def test_svg_and_png_show_the_same_line(tmp_path):
    drawing = Drawing("line", 40, 20, [Line([(5, 10), (35, 10)], "accent", 2.0)])
    drawing.save(tmp_path, "line", scale=2)
    assert points(elements(drawing, "polyline")[0]) == [(5, 10), (35, 10)]
    picture = np.asarray(Image.open(tmp_path / "line.png"))
    assert picture.shape == (40, 80, 3)
    assert tuple(picture[20, 40]) == BLUE
    assert (picture[:10] == 255).all()
    assert (picture[:, :8] == 255).all()
    assert ET.parse(tmp_path / "line.svg").getroot().get("viewBox") == "0 0 40 20"


def test_pictures_are_embedded_and_placed():
    pixels = Image.new("RGB", (4, 4), (200, 10, 20))
    drawing = Drawing("picture", 30, 20, [Picture(10, 5, 10, 10, pixels)])
    source = elements(drawing, "image")[0].get("href").removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(source))).getpixel((0, 0)) == (200, 10, 20)
    painted = drawing.png(scale=1)
    assert painted.getpixel((15, 10)) == (200, 10, 20)
    assert painted.getpixel((5, 10)) == (255, 255, 255)


def test_a_curve_spans_its_axes():
    line = elements(plot("t", [Series("a", [0, 1], [0, 2])], "x", "y", (0, 1), (0, 2)), "polyline")[-1]
    (x0, y0), (x1, y1) = points(line)
    assert (x0, x1, y0) == (LEFT, RIGHT, BOTTOM)
    assert y1 < y0


def test_legend_names_curves_and_breaks_lines():
    names = ["first " * 4, "second " * 4, ""]
    drawing = plot("t", [Series(name, [0, 1], [0, 1]) for name in names], "x", "y", (0, 1), (0, 1))
    shown = {text.text: float(text.get("y")) for text in elements(drawing, "text")}
    assert shown[names[0]] < shown[names[1]]  # two lines
    assert "" not in shown


def test_an_empty_range_is_drawn():
    assert elements(plot("t", [Series("a", [3, 3], [1, 1])], "x", "y", (3, 3), (1, 1)), "polyline")


def test_histogram_is_in_percent_of_each_class():
    groups = [("few", np.array([0.0, 1.0]), "ink"), ("many", np.repeat([0.0, 1.0], 50), "accent")]
    drawing = histogram("t", groups, "score", bins=2)
    few, many = (points(line) for line in elements(drawing, "polyline")[-2:])
    assert few == many  # half of each class in each bin
    assert len(elements(drawing, "polygon")) == 2


def test_histogram_reaches_the_threshold():
    drawing = histogram("t", [("a", np.array([1.0, 1.1]), "ink")], "score", [(3.0, "threshold")])
    dashed = [points(line) for line in elements(drawing, "polyline") if line.get("stroke-dasharray")]
    assert [x for x, _ in dashed[0]] == [RIGHT, RIGHT]


def test_dashes_follow_the_path():
    pieces = _dashes([(0, 0), (7, 0), (7, 4)])
    assert pieces == [[(0, 0), (5, 0)], [(7, 2), (7, 4)]]  # 5 drawn, 4 left out, what is left of 11


def test_encode_is_a_picture_file():
    image = Image.open(io.BytesIO(base64.b64decode(encode(Image.new("L", (3, 2)), "WEBP"))))
    assert (image.format, image.size) == ("WEBP", (3, 2))
