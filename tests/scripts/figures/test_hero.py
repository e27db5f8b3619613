"""scripts/figures/hero.py: the sheet and the animation show what `demo` samples; no pixel of a model is pinned."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.emoji.dataset import GROUNDS
from scripts.emoji.things import STYLES
from scripts.figures import hero
from scripts.figures.svg import NOT_SAMPLED

IMAGES = Path(__file__).resolve().parents[3] / "docs" / "images"
PROMPTS = hero.PROMPTS[:2]


@pytest.fixture(scope="module")
def streamed(demo):
    """What the model gives after each row of codes."""
    return list(hero.stream_rows(demo, PROMPTS))


def test_the_prompts_are_all_different_and_of_all_styles_and_grounds():
    assert len(set(hero.PROMPTS)) == 40 == hero.COLUMNS * 4
    assert {style for prompt in hero.PROMPTS for style in STYLES if f", {style} style" in prompt} == set(STYLES)
    assert {g for prompt in hero.PROMPTS for g in GROUNDS if prompt.endswith(f" on {g}")} == {"sky", "sand", "grey"}


@pytest.mark.slow
def test_the_sheet_has_the_best_of_each_prompt(demo):
    best = hero.sample_best(demo, PROMPTS, best_of=2)
    found = demo.generate(list(PROMPTS), num_candidates=2, seed=hero.SEED, mixed_batches=True)
    assert all(np.array_equal(best[i], one.images[one.scores.argmax()]) for i, one in enumerate(found))
    sheet = np.asarray(hero.make_sheet(best, columns=1))
    cell = hero.ENLARGED + hero.GAP
    assert sheet.shape == (2 * cell - hero.GAP, hero.ENLARGED, 4)
    middle = sheet[cell + 16 : cell + hero.ENLARGED - 16, 16:-16]
    assert (middle[..., 3] == 255).all() and (sheet[hero.ENLARGED : cell, :, 3] == 0).all()
    assert sheet[0, 0, 3] == 0 and sheet[0, hero.ENLARGED // 2, 3] == 255  # a round corner; an edge
    half = np.asarray(Image.fromarray(sheet[cell:, :, :3]).reduce(hero.ENLARGED // best.shape[1]))
    assert np.abs(half[8:-8, 8:-8].astype(int) - best[1][8:-8, 8:-8]).mean() < 4  # enlarged, not changed


def test_the_animation_has_a_frame_per_row_and_ends_with_the_finished_images(demo, streamed, tmp_path):
    frames = hero.make_frames(streamed, PROMPTS)
    done = streamed[-1]
    assert np.array_equal(frames[-1], hero.make_frame(done.images[:, 0], done.codes[:, 0], PROMPTS))
    assert (done.codes >= 0).all()
    hero.write_gif(frames, tmp_path / "rows.gif")
    with Image.open(tmp_path / "rows.gif") as gif:
        assert gif.n_frames == demo.code_size + 1 and gif.info["loop"] == 0
        for number, frame in enumerate(frames):
            gif.seek(number)
            assert gif.info["duration"] == (hero.PAUSE_MS if number == demo.code_size else hero.FRAME_MS)
            shown, wanted = np.asarray(gif.convert("RGB")).astype(int), np.asarray(frame).astype(int)
            assert np.abs(shown - wanted).mean() < 3, number  # 256 colors
            assert (shown[0, 0] == 255).all()


def test_rows_that_are_not_sampled_are_grey(streamed):
    after_four = streamed[3]
    frame = np.asarray(hero.make_frame(after_four.images[:, 0], after_four.codes[:, 0], PROMPTS))
    shown = after_four.images.shape[2] * hero.GIF_SCALE
    first = frame[hero.GAP : hero.GAP + shown, hero.GAP : hero.GAP + shown]
    assert (first[shown // 4 :] == NOT_SAMPLED).all() and not (first[: shown // 4] == NOT_SAMPLED).all(-1).any()


def test_the_nearest_color_is_found():
    palette = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]])
    frame = Image.fromarray(np.array([[[255, 255, 255], [250, 10, 10], [9, 9, 9]]], np.uint8))
    assert np.asarray(hero.nearest_colors(frame, palette)).tolist() == [[0, 2, 1]]


def test_the_committed_files_are_small_enough_for_a_page():
    assert (IMAGES / "hero.png").stat().st_size < 1_200_000 and (IMAGES / "rows.gif").stat().st_size < 1_500_000
    with Image.open(IMAGES / "rows.gif") as gif:
        assert gif.n_frames == 17
