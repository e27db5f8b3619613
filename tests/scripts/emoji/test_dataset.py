"""scripts/emoji/dataset.py: image n is always the same, and what is held out is not in training."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import OutputError, UsageError
from scripts.emoji import dataset
from scripts.emoji.dataset import (
    CORNER,
    GROUNDS,
    ROUND,
    STYLE_WORDS,
    Example,
    captions,
    full_caption,
    heldout_style,
    make_contrast,
    make_example,
    pairs,
    render,
    with_article,
    write_emoji,
)
from scripts.emoji.things import MARGIN, SIDE, STYLES

EXPECTED = [
    (
        Example(2, "flat", "sand"),
        [
            "a flat picture of a dog on a sand background",
            "a flat emoji of a dog on a sand ground",
            "dog in flat style on a sand ground",
            "a dog in twemoji on a sand ground",
        ],
    ),
    (
        Example(2, "flat", "sand"),
        [
            "an icon of a dog, twemoji on a sand ground",
            "a photo of a dog, flat style on sand",
            "an icon of a dog, flat on sand",
            "a drawing of a dog in flat style on a sand background",
        ],
    ),
    (
        Example(1, "flat", "white"),
        ["draw a cat in flat", "one cat", "draw a cat in flat", "the cat in twemoji"],
    ),
]


@pytest.fixture(autouse=True)
def held_out(monkeypatch):
    """Holds out one of three things: of ten, one in 32 would be none."""
    monkeypatch.setattr(dataset, "HELDOUT_SHARE", 3)
    pairs.cache_clear()
    yield
    pairs.cache_clear()


def test_an_example_is_a_function_of_split_and_index(things):
    """A literal, so that another machine or version cannot make others unnoticed: images are found by their index."""
    known = things.things
    assert make_example(known, "train", 7) == make_example(known, "train", 7)
    found = [(one := make_example(known, split, 5), captions(known, split, 5, one)) for split in dataset.SPLITS]
    assert found == EXPECTED


def test_pairs_are_in_one_split(things):
    """Each thing is in training in two styles at least, and every pair is in just one of the two."""
    learned, heldout = (set(pairs(things.things, held)) for held in (False, True))
    assert not learned & heldout and len(learned | heldout) == 3 * len(things.things)
    assert 1 <= len(heldout) <= len(things.things) // 2
    assert all(sum(thing == number for thing, _ in learned) >= 2 for number in range(len(things.things)))
    for number in range(200):
        assert make_example(things.things, "train", number)[:2] in learned
        assert make_example(things.things, "valid", number)[:2] in learned
        assert make_contrast(things.things, number)[:2] in learned
        assert make_example(things.things, "heldout", number)[:2] in heldout


def test_every_pair_comes_on_every_ground(things):
    """In as many rounds as ROUND is long, on white most."""
    count = len(ROUND) * len(pairs(things.things, False))
    examples = [make_example(things.things, "train", index) for index in range(count)]
    assert {(one.thing, one.style) for one in examples} == set(pairs(things.things, False))
    for thing, style in pairs(things.things, False):
        assert sorted(one.ground for one in examples if one[:2] == (thing, style)) == sorted(ROUND)


def test_a_contrast_differs_in_one_thing(things):
    for index in range(100):
        one, other = make_example(things.things, "train", index), make_contrast(things.things, index)
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
    changed = {field for index in range(100) for field in Example._fields
               if getattr(make_contrast(things.things, index), field)
               != getattr(make_example(things.things, "train", index), field)}  # fmt: skip
    assert changed == set(Example._fields)


def words(text: str) -> set[str]:
    return set(text.replace(",", "").split())


def test_captions_say_what_is_shown(things):
    """A ground that is not white always, the style in the first of them, and no style or ground that is not shown."""
    for split in dataset.SPLITS:
        for index in range(60):
            example = make_example(things.things, split, index)
            texts = captions(things.things, split, index, example)
            assert set(STYLE_WORDS[example.style]) & words(texts[0])
            assert all(part in texts[0] for part in things.things[example.thing].names[0].split())
            for text in texts:
                assert text == text.lower() and len(text.split()) <= 14 and "{" not in text
                others = {word for style in STYLES if style != example.style for word in STYLE_WORDS[style]}
                assert not others & words(text)
                assert (set(GROUNDS) & words(text) or {"white"}) == {example.ground}
            full = full_caption(things.things, example)
            assert example.style in words(full) and example.ground in words(full)


def test_wordings_to_measure_by_are_not_in_training(things):
    """And none of their words is new: what is measured is the wording."""
    forms = {split: set(itertools.chain(*table.values()))
             for split, table in (("train", dataset.TRAIN_FORMS), ("valid", dataset.UNSEEN_FORMS))}  # fmt: skip
    assert not forms["train"] & forms["valid"]
    known = set(itertools.chain(*(words(form) for form in forms["train"]))) | {"one"}
    assert set(itertools.chain(*(words(form) for form in forms["valid"]))) <= known
    trained = {
        text
        for index in range(600)
        for text in captions(things.things, "train", index, make_example(things.things, "train", index))
    }
    for index in range(100):
        assert not trained & set(captions(things.things, "valid", index, make_example(things.things, "valid", index)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cat", "a cat"), ("owl", "an owl"), ("grapes", "grapes"), ("compass", "a compass"), ("iris", "an iris"),
     ("octopus", "an octopus")],
)  # fmt: skip
def test_articles(name, expected):
    assert with_article(name) == expected


def test_a_thing_is_rendered_over_its_ground(things):
    """On a white card with round corners, so that nothing of a thing depends on the ground."""
    on_white = render(things, Example(1, "flat", "white"))
    pixels = np.pad(things.pixels[1, STYLES.index("flat")], ((MARGIN,), (MARGIN,), (0,)))
    opaque, blank = pixels[..., 3] == 255, pixels[..., 3] == 0
    np.testing.assert_array_equal(on_white[opaque], pixels[opaque][:, :3])
    assert (on_white[blank] == 255).all()
    margin = np.pad(np.zeros((SIDE - 2 * MARGIN,) * 2, bool), MARGIN, constant_values=True)
    corners = np.zeros_like(margin)
    for rows, columns in itertools.product(
        (slice(MARGIN, MARGIN + CORNER), slice(-MARGIN - CORNER, -MARGIN)), repeat=2
    ):
        corners[rows, columns] = True
    for ground, color in GROUNDS.items():
        image = render(things, Example(1, "flat", ground))
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert (image[margin] == color).all()
        assert ground == "white" or (image[MARGIN, MARGIN] != 255).any()
        np.testing.assert_array_equal(image[~margin & ~corners], on_white[~margin & ~corners])
        np.testing.assert_array_equal(image[opaque], on_white[opaque])


def test_a_folder_is_a_data_set(tmp_path, things):
    write_emoji(tmp_path / "d", things, "train", 12)
    source = open_source(tmp_path / "d", "text")
    assert len(source.samples) == 12 and all(len(sample.captions) == 4 for sample in source.samples)
    example = make_example(things.things, "train", 3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "d" / "000003.png")), render(things, example))
    rows = [json.loads(line) for line in (tmp_path / "d" / "metadata.jsonl").read_text().splitlines()]
    assert rows[3]["text"] == captions(things.things, "train", 3, example)

    before = (tmp_path / "d" / "metadata.jsonl").stat().st_mtime_ns
    write_emoji(tmp_path / "d", things, "train", 12)
    assert (tmp_path / "d" / "metadata.jsonl").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="holds something else"):
        write_emoji(tmp_path / "d", things, "train", 13)


def test_contrasts_lie_beside_their_images(tmp_path, things):
    write_emoji(tmp_path / "d", things, "train", 5, contrasts=True)
    rows = [json.loads(line) for line in (tmp_path / "d" / "metadata.jsonl").read_text().splitlines()]
    names = [f"{index:06}{end}.png" for index in range(5) for end in ("", "-contrast")]
    assert [row["file_name"] for row in rows] == names
    assert rows[1]["text"][0] == full_caption(things.things, make_contrast(things.things, 0))
    with pytest.raises(UsageError, match="contrasts are of the split train"):
        write_emoji(tmp_path / "e", things, "valid", 5, contrasts=True)


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", -1), ("", 3)])
def test_what_is_no_example_is_refused(things, split, index):
    with pytest.raises(UsageError, match="split must be one of train, valid, heldout and index at least 0"):
        make_example(things.things, split, index)


def test_a_thing_is_held_out_in_one_style_at_most(things):
    assert {heldout_style(thing) for thing in things.things} <= {None, *STYLES}
