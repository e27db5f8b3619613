"""scripts/figures/svg.py: valid SVG with both color schemes, on a card, whose text is text."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from scripts.figures import svg

NAME = "{http://www.w3.org/2000/svg}"


def test_a_figure_is_svg_on_a_card():
    tree = ElementTree.fromstring(
        svg.figure(640, 100, 'a "b" <c>', [svg.text(1, 2, "x < y & z"), svg.line(0, 0, 1, 1)])
    )
    assert tree.attrib["viewBox"] == "0 0 640 100" and tree.attrib["aria-label"] == 'a "b" <c>'
    style, card, text, line = tree
    assert (card.tag, card.attrib["class"], card.attrib["width"]) == (f"{NAME}rect", "card", "639")
    assert text.text == "x < y & z" and line.attrib["class"] == "grid"
    assert style.text and "prefers-color-scheme: dark" in style.text


def test_each_class_with_a_color_has_one_in_both_schemes():
    """A class that dark readers lack is dark on dark."""
    light, dark = svg.STYLE.split("@media")
    colored = {name for name, rule in re.findall(r"\.(\w+) \{([^}]*)\}", light) if "#" in rule}
    assert colored == set(re.findall(r"\.(\w+)", dark.replace("0.5", "")))


def test_an_image_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    element = ElementTree.fromstring(svg.image(1, 2, 30, 50, pixels))
    data = element.attrib["href"].removeprefix("data:image/png;base64,")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)
    assert "image { image-rendering: pixelated }" in svg.STYLE


def test_notes_are_broken_into_lines():
    lines = svg.notes(10, "word " * 40, letters=50)
    trees = [ElementTree.fromstring(line) for line in lines]
    assert " ".join(str(tree.text) for tree in trees).split() == ["word"] * 40
    assert [float(tree.attrib["y"]) for tree in trees] == [10 + svg.NOTE_LINE * i for i in range(len(lines))]
    assert max(len(str(tree.text)) for tree in trees) <= 50


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4.2, [0, 1, 2, 3, 4]), (0, 1000, [0, 200, 400, 600, 800, 1000]), (27.2, 31, [28, 29, 30, 31]),
     (0, 0.03, [0, 0.01, 0.02, 0.03])],
)  # fmt: skip
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == expected
