"""Order, captions and files of ranked pictures; the rest of Generation is tested with the models that make it."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from mindalle_jax import Generation
from mindalle_jax.errors import OutputError, UsageError
from mindalle_jax.sampling.image_file import read_image_record


def make(scores, *, size=16, seed=3) -> Generation:
    """A Generation of flat pictures: the red of candidate i of prompt p is 10 p + i, its codes are all i."""
    scores = None if scores is None else np.asarray(scores, np.float32)
    shape = (4,) if scores is None else scores.shape
    images = np.zeros((*shape, size, size, 3), np.uint8)
    images[..., 0] = np.arange(shape[-1])[:, None, None]
    if len(shape) == 2:
        images[..., 0] += 10 * np.arange(shape[0], dtype=np.uint8)[:, None, None, None]
    images[..., 1] = 200
    codes = np.broadcast_to(np.arange(shape[-1], dtype=np.int32)[:, None], (*shape, 9)).copy()
    prompts = ["a cat", "a dog"][: shape[0] if len(shape) == 2 else 1]
    return Generation(images, codes, scores, np.full(shape, seed, np.uint32), prompts, {"ranker": "likelihood"})


def reds(sheet: Image.Image) -> list[int]:
    """The reds of the pictures of a grid in reading order."""
    pixels = np.asarray(sheet)
    rows, columns = np.nonzero((pixels[..., 1] == 200) & (pixels[..., 2] == 0))
    corners = {}
    for y, x in zip(rows, columns, strict=True):
        corners.setdefault(int(pixels[y, x, 0]), (y, x))
    return sorted(corners, key=corners.__getitem__)


def test_images_come_best_first():
    """By index, by iteration and by `best`: PIL images, in the order of the sheet."""
    generation = make([0.1, 0.4, 0.2])
    assert len(generation) == 3
    assert [image.getpixel((0, 0))[0] for image in generation] == [1, 2, 0]
    assert generation[0].size == (16, 16) and generation[0].getpixel((0, 0)) == (1, 200, 0)
    assert generation[-1].getpixel((0, 0))[0] == 0
    assert [image.getpixel((0, 0))[0] for image in generation[:2]] == [1, 2]
    assert [image.getpixel((0, 0))[0] for image in generation.best(2)] == [1, 2]
    assert len(generation.best(9)) == 3 and len(make(None)) == 4
    for index in (3, -4):
        with pytest.raises(IndexError):
            generation[index]


def test_prompts_come_one_by_one():
    generations = make([[0.1, 0.4, 0.2], [3.0, 2.0, 1.0]])
    assert len(generations) == 2
    assert [one.prompts for one in generations] == [["a cat"], ["a dog"]]
    assert [image.getpixel((0, 0))[0] for image in generations[1]] == [10, 11, 12]
    assert [[image.getpixel((0, 0))[0] for image in images] for images in generations.best(1)] == [[1], [10]]
    assert generations[-1].prompts == ["a dog"]


def test_the_repr_is_one_line():
    assert repr(make([0.1, 0.4])) == "<Generation of 'a cat': 2 images of 16 x 16, ranked by likelihood, best 0.4000>"
    assert repr(make(None)) == "<Generation of 'a cat': 4 images of 16 x 16>"
    assert repr(make([float("nan")])) == "<Generation of 'a cat': 1 image of 16 x 16>"
    assert repr(make([[0.1], [0.2]])).startswith("<Generation of 'a cat', 'a dog': 2 images")


def test_a_notebook_shows_the_sheet_enlarged():
    sheet = Image.open(io.BytesIO(make([0.1, 0.4])._repr_png_()))
    assert sheet.format == "PNG" and sheet.width > 2 * 128
    assert reds(make([0.1, 0.4]).grid(scale=3)) == [1, 0]


def test_what_is_not_sampled_yet_is_grey_on_the_sheet():
    """The image itself shows the mean of the codebook there, which looks like a result."""
    generation = make([0.3, 0.1], size=18)
    codes = generation.codes.copy()
    codes[0, 4:] = -1  # of 3 x 3 codes, each 6 pixels wide
    sheet = np.asarray(dataclasses.replace(generation, codes=codes).grid())[4 : 4 + 18, 4 : 4 + 18]
    assert (sheet[:6] == [0, 200, 0]).all() and (sheet[6:12, :6] == [0, 200, 0]).all()
    assert (sheet[6:12, 6:] == 128).all() and (sheet[12:] == 128).all()
    assert (generation.images[0] == [0, 200, 0]).all()


def test_order_is_best_first():
    """Equal scores keep their order; NaN, a picture that is not complete, is last."""
    assert make([0.1, 0.3, float("nan"), 0.3, -1.0]).order.tolist() == [1, 3, 0, 4, 2]
    assert make([[0.1, 0.3], [5.0, -2.0]]).order.tolist() == [[1, 0], [0, 1]]
    assert make(None).order.tolist() == [0, 1, 2, 3]


def test_grid_is_in_the_order_of_the_scores():
    """A person looks at the upper left first."""
    assert reds(make([0.1, 0.4, 0.2, 0.3, 0.0]).grid()) == [1, 3, 2, 0, 4]
    assert reds(make([0.1, 0.4, 0.2, 0.3, 0.0]).grid(best=2)) == [1, 3]
    assert reds(make([[0.1, 0.4, 0.2], [3.0, 2.0, 1.0]]).grid()) == [1, 2, 0, 10, 11, 12]
    assert reds(make([[0.1, 0.4, 0.2], [3.0, 2.0, 1.0]]).grid(best=1)) == [1, 10]
    assert reds(make([0.1, 0.4]).grid(best=5)) == [1, 0]
    assert reds(make(None).grid()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (3, 3), (4, 4), (5, 4), (8, 4), (9, 4), (16, 4), (24, 6), (96, 12), (97, 14)]
)
def test_a_sheet_has_few_empty_cells(count, columns):
    """Sixteen once stood in rows of five, with one left over."""
    sheet = make(np.linspace(1, 0.5, count)).grid()
    first_row = np.asarray(sheet)[4, :, 2] == 0  # images have no blue, the sheet is white
    assert np.count_nonzero(np.diff(first_row.astype(int)) == 1) == columns
    assert reds(sheet) == list(range(count))


def test_captions_are_not_cut_off():
    """Narrow pictures get wider cells: the ink of every caption ends before the next cell begins."""
    narrow = make([-1234.5678, -1234.5999, -99.25, -1000.125]).grid()
    assert narrow.width > 4 * 50
    sheet = np.asarray(narrow.convert("L"))
    ink = (sheet[4 + 16 :] < 128).any(axis=0)  # below the pictures
    cell = (narrow.width - 4) // 4
    for column in range(1, 5):
        assert not ink[column * cell : column * cell + 4].any()
    assert ink.any()


def test_another_score_is_another_caption():
    """Captions show rank, score and candidate."""
    grids = [np.asarray(make(scores).grid()) for scores in ([0.1, 0.2], [0.1, 0.3], None)]
    assert not np.array_equal(grids[0], grids[1])
    assert np.array_equal(grids[0], np.asarray(make([0.1, 0.2]).grid()))


def test_files_are_named_by_rank_and_score(tmp_path):
    """In a file browser the best comes first; the candidate number says how to get it again."""
    paths = make([0.12345, 0.4, -0.25, 1e-7]).save(tmp_path / "out")
    assert [path.name for path in paths] == [
        "rank001_score0.4000_seed3_candidate001.png",
        "rank002_score0.1235_seed3_candidate000.png",
        "rank003_score0.0000_seed3_candidate003.png",
        "rank004_score-0.2500_seed3_candidate002.png",
    ]
    assert sorted(paths) == paths
    assert [np.asarray(Image.open(path))[0, 0, 0] for path in paths] == [1, 0, 3, 2]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert [(e["rank"], e["candidate"], e["codes"][0]) for e in meta["pictures"]] == [
        (1, 1, 1), (2, 0, 0), (3, 3, 3), (4, 2, 2),
    ]  # fmt: skip
    assert [e["score"] for e in meta["pictures"]] == pytest.approx([0.4, 0.12345, 1e-7, -0.25])


def test_only_the_best_are_written(tmp_path):
    """96 are drawn to keep 4."""
    generation = make([[0.1, 0.4, 0.2], [3.0, 2.0, 1.0]])
    paths = generation.save(tmp_path / "out", best=2)
    assert [path.name for path in paths] == [
        "prompt00_rank001_score0.4000_seed3_candidate001.png",
        "prompt00_rank002_score0.2000_seed3_candidate002.png",
        "prompt01_rank001_score3.0000_seed3_candidate000.png",
        "prompt01_rank002_score2.0000_seed3_candidate001.png",
    ]
    assert reds(Image.open(tmp_path / "out" / "grid.png")) == [1, 2, 10, 11]
    assert len(json.loads((tmp_path / "out" / "meta.json").read_text())["pictures"]) == 4


@pytest.mark.parametrize("best", [0, -1, 2.0, True, "2"])
def test_best_out_of_range(tmp_path, best):
    for call in (make(None).grid, lambda best: make(None).save(tmp_path / "out", best=best)):
        with pytest.raises(UsageError, match="best must be an integer of at least 1, not"):
            call(best=best)
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_not_complete_are_not_saved(tmp_path):
    """A preview among results would pass for one."""
    generation = make([0.1, float("nan"), 0.3])
    codes = generation.codes.copy()
    codes[1, 4:] = -1
    paths = dataclasses.replace(generation, codes=codes).save(tmp_path / "out")
    assert [path.name for path in paths] == [
        "rank001_score0.3000_seed3_candidate002.png", "rank002_score0.1000_seed3_candidate000.png",
    ]  # fmt: skip
    assert "NaN" not in (tmp_path / "out" / "meta.json").read_text()


def test_nothing_is_saved_of_nothing(tmp_path):
    """A folder with a sheet of grey cells would pass for a result."""
    generation = make(None)
    nothing = dataclasses.replace(generation, codes=np.full_like(generation.codes, -1))
    with pytest.raises(UsageError, match="no image is complete"):
        nothing.save(tmp_path / "out")
    assert not (tmp_path / "out").exists() and "4 images of 16 x 16, 0 complete" in repr(nothing)


def test_a_single_image_is_no_folder(tmp_path):
    with pytest.raises(UsageError, match=r"save writes a folder; images\[0\].save"):
        make(None).save(tmp_path / "cat.png")


def test_a_generation_of_one_prompt_has_one_prompt():
    generation = make([0.1, 0.4])
    assert generation.of_prompt(0) is generation
    with pytest.raises(IndexError, match="there is one prompt"):
        generation.of_prompt(1)


def test_images_that_a_ranker_did_not_score_are_saved(tmp_path):
    paths = make([0.5, float("nan")]).save(tmp_path / "out")
    assert [path.name[:16] for path in paths] == ["rank001_score0.5", "rank002_scorenan"]


def test_the_sheet_of_a_stopped_run_has_what_is_saved(tmp_path):
    generation = make([0.1, float("nan"), 0.3])
    codes = generation.codes.copy()
    codes[1, 4:] = -1
    dataclasses.replace(generation, codes=codes).save(tmp_path / "out")
    assert reds(Image.open(tmp_path / "out" / "grid.png")) == [2, 0]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert all(path.parent == tmp_path / "out" for path in make([0.1, 0.2]).save("~/out"))


def test_files_say_how_they_were_made(tmp_path):
    generation = make([[0.1, 0.4], [3.0, 2.0]])
    for path, (prompt, candidate, score) in zip(
        generation.save(tmp_path / "out"),
        [("a cat", 1, 0.4), ("a cat", 0, 0.1), ("a dog", 0, 3.0), ("a dog", 1, 2.0)],
        strict=True,
    ):
        record = read_image_record(path)
        assert (record.prompt, record.candidate, record.seed) == (prompt, candidate, 3)
        assert record.score == pytest.approx(score) and record.codes.tolist() == [candidate] * 9
        assert record.settings == {"ranker": "likelihood"}


def test_ranked_pictures_never_replace_silently(tmp_path):
    make([0.1, 0.2]).save(tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        make([0.1, 0.2]).save(tmp_path / "out", best=1)
