"""scripts/figures/stages.py: the figures of docs/how-it-works.md show what `demo` really computes."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.figures import stages
from scripts.figures.svg import NOT_SAMPLED

IMAGES = Path(__file__).resolve().parents[3] / "docs" / "images"
FIGURES = ("stage-tokens.svg", "stage-codes.svg", "stage-cache.svg", "stage-ranking.svg")


@pytest.fixture(scope="module")
def run(demo):
    return stages.run_model(demo, candidates=3)


def texts(figure: str) -> list[str]:
    return [str(element.text) for element in ElementTree.fromstring(figure) if element.tag.endswith("text")]


def images(figure: str) -> list[np.ndarray]:
    data = re.findall(r"base64,([^\"]+)", figure)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in data]


def test_the_tokens_are_those_of_the_tokenizer(demo, run):
    figure = stages.draw_tokens(run.tokens, run.rare)
    ids = demo.tokenize(stages.PROMPT)[0].tolist()
    assert run.tokens.texts == ["a", "red", "apple"] and run.tokens.ids == ids
    assert run.rare.texts[0] == "a" and "".join(run.rare.texts[1:]) == "spaceship" and len(run.rare.texts) > 2
    shown = texts(figure)
    at = shown.index("“a red apple”") + 1
    assert shown[at + 1 : at + 2 * len(ids) : 2] == [str(number) for number in ids]
    assert shown[at : at + 2 * len(ids) : 2] == ["a", "red", "apple"] + ["[PAD]"] * (len(ids) - 3)


def test_the_codes_are_those_of_the_image(demo, run):
    figure = stages.draw_codes(run.images[0], run.again_codes, run.again)
    assert np.array_equal(demo.encode_images(run.images[0])[0], run.again_codes)
    image, part, _, _, again, _ = images(figure)
    assert np.array_equal(image, run.images[0]) and np.array_equal(again, run.again)
    rows, columns = stages.busy_part(run.again_codes)
    assert np.array_equal(part, image[4 * rows.start : 4 * rows.stop, 4 * columns.start : 4 * columns.stop])
    shown = texts(figure)
    codes = [str(code) for code in run.again_codes[rows, columns].ravel()]
    at = shown.index(codes[0], shown.index("codes"))
    assert shown[at : at + len(codes)] == codes
    assert [text for text in shown if text.startswith("code ")][0].removeprefix("code ") in codes


def test_the_cache_has_the_cells_that_a_step_reads(demo, run):
    """16 of the prompt, codes 0 to 105, and 150 that are not sampled."""
    figure = stages.draw_cache(run.tokens, run.codes[0], run.partial)
    row, column = stages.SHOWN_STEP
    fed = row * demo.code_size + column
    cells = [element.attrib for element in ElementTree.fromstring(figure) if element.tag.endswith("rect")]
    legend = 1  # cell of each kind
    assert sum(cell.get("class") == "text" for cell in cells) == len(run.tokens.ids) + legend
    assert sum("fill" in cell for cell in cells) == fed + 1
    assert sum(cell.get("class") == "empty" for cell in cells) == 256 - (fed + 1) + legend
    assert f"code {fed}: goes in" in texts(figure) and f"code {fed + 1}: comes out" in texts(figure)
    assert (run.partial[4 * row :] == NOT_SAMPLED).all()
    near = np.abs(run.partial[: 4 * row - 4].astype(int) - run.images[0][: 4 * row - 4])
    assert near.mean() < 8  # below, codes were missing that the decoder looks at


def test_candidates_are_shown_from_best_to_worst(run):
    figure = stages.draw_ranking(stages.PROMPT, run.images, run.scores)
    assert np.all(np.diff(run.scores) <= 0)
    assert all(np.array_equal(shown, image) for shown, image in zip(images(figure), run.images, strict=True))
    assert texts(figure)[2:] == [f"{score:.2f}" for score in run.scores]


def test_equal_codes_have_equal_colors():
    codes = np.array([[0, 0, 5], [5, 7, 0]])
    colors = stages.colors_of_codes(codes)
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 3
    assert len(set(colors[0, 0].tolist())) == 1 and len(set(colors[0, 2].tolist())) > 1  # the most frequent is grey


def test_all_figures_are_made_and_the_committed_ones_are_small(run):
    made = stages.draw_stages(run)
    assert tuple(made) == FIGURES
    for name, content in made.items():
        ElementTree.fromstring(content)
        committed = (IMAGES / name).read_text(encoding="utf-8")
        assert len(committed) < 150_000
        assert re.search(r"<style>.*?</style>", committed, re.DOTALL)[0] in content  # type: ignore[index]
