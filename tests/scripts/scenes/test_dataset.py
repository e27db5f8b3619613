"""scenes/dataset.py: the same scenes everywhere, splits that share nothing they must not, captions that tell all."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import OutputError, UsageError
from scripts.scenes.dataset import (
    BACKGROUNDS,
    COLORS,
    HELDOUT_LOOKS,
    HELDOUT_PAIRS,
    MARGIN,
    SHAPES,
    SIZES,
    SPLITS,
    STEP,
    STRIPES,
    Scene,
    Thing,
    background_image,
    captions,
    heldout_parts,
    make_contrast,
    make_scene,
    render,
    thing_mask,
    write_scenes,
)

COUNT = 4_000


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: [make_scene(split, index) for index in range(COUNT)] for split in SPLITS}


# Scenes


def test_a_scene_is_a_function_of_split_and_index():
    """A literal, so that another machine or version cannot draw others unnoticed: pictures are found by their index."""
    assert make_scene("train", 7) == make_scene("train", 7)
    assert make_scene("train", 3) == Scene(
        (Thing("circle", "pink", "small", False), Thing("ring", "yellow", "small", True)),
        "above",
        "grey",
        ((32, 16), (32, 48)),
    )
    text = repr([(scene, captions(scene)) for scene in (make_scene(split, 11) for split in SPLITS)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "01d3e468e5ebcdb4"


def test_what_is_held_out_is_never_in_train_or_valid(scenes):
    for split in ("train", "valid"):
        for scene in scenes[split]:
            assert not {(thing.colour, thing.shape) for thing in scene.things} & HELDOUT_LOOKS
            if scene.relation:
                assert (scene.things[0].shape, scene.relation, scene.things[1].shape) not in HELDOUT_PAIRS
            assert heldout_parts(scene) == set()
    assert all(heldout_parts(scene) for scene in scenes["heldout"])


def test_every_held_out_part_is_drawn_and_its_words_are_in_train(scenes):
    """Else the split would measure words never seen, not their combinations."""
    drawn = Counter(part for scene in scenes["heldout"] for part in heldout_parts(scene))
    assert set(drawn) == HELDOUT_LOOKS | HELDOUT_PAIRS and min(drawn.values()) >= 20
    things = [thing for scene in scenes["train"] for thing in scene.things]
    assert set(Counter(thing.shape for thing in things)) == set(SHAPES)
    for field, share in (("shape", 1 / 14), ("colour", 1 / 18), ("size", 1 / 4), ("striped", 1 / 4)):
        counts = Counter(getattr(thing, field) for thing in things)
        assert min(counts.values()) > share * len(things), field
    seen = {(thing.colour, thing.shape) for thing in things}
    assert len(seen) == len(COLORS) * len(SHAPES) - len(HELDOUT_LOOKS)


def test_valid_has_no_description_of_train(scenes):
    descriptions = {split: {scene.description() for scene in scenes[split]} for split in SPLITS}
    assert not descriptions["train"] & descriptions["valid"]
    assert len(descriptions["valid"]) > COUNT / 2  # and is not one scene again and again


def test_two_scenes_in_five_have_one_thing(scenes):
    """Also where scenes are drawn again until their split fits. 0.04 is 5 standard deviations."""
    for split in SPLITS:
        assert np.mean([len(scene.things) == 1 for scene in scenes[split]]) == pytest.approx(0.4, abs=0.04)


def test_things_are_inside_apart_and_where_the_relation_says(scenes):
    for scene in scenes["train"]:
        radii = [SIZES[thing.size] // 2 for thing in scene.things]
        for centre, radius in zip(scene.centres, radii, strict=True):
            assert all(radius + MARGIN <= at <= 64 - radius - MARGIN and at % STEP == 0 for at in centre)
        if scene.relation:
            (x0, y0), (x1, y1) = scene.centres
            right, down = (x1 - x0, y1 - y0) if scene.relation == "left of" else (y1 - y0, x1 - x0)
            assert right >= sum(radii) + 4 and down == 0


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", -1)])
def test_other_splits_and_indices_are_refused(split, index):
    with pytest.raises(UsageError, match="split must be one of train, valid, heldout"):
        make_scene(split, index)


def test_a_contrast_differs_in_one_way():
    """In one attribute, or two things have exchanged one or all; it is a scene of train too. All kinds occur."""
    kinds = Counter()
    for index in range(COUNT // 4):
        scene, other = make_scene("train", index), make_contrast(index)
        assert dataclasses.replace(other, things=scene.things) == scene != other
        assert heldout_parts(other) == set() and other == make_contrast(index)
        changed = [
            (name, place)
            for place, (one, two) in enumerate(zip(scene.things, other.things, strict=True))
            for name in vars(one)
            if getattr(one, name) != getattr(two, name)
        ]
        names = {name for name, _ in changed}
        if other.things == scene.things[::-1]:
            kinds["all exchanged"] += 1
        elif len(changed) == 1:
            kinds[next(iter(names))] += 1
        else:
            (name,) = names
            values = [getattr(thing, name) for thing in scene.things]
            assert [getattr(thing, name) for thing in other.things] == values[::-1]
            kinds["one exchanged"] += 1
    assert set(kinds) == {"shape", "colour", "size", "striped", "one exchanged", "all exchanged"}
    assert min(kinds.values()) > COUNT / 4 / 20


# Captions

SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}


def understood(caption: str) -> tuple[list[Thing], str | None, str | None]:
    """Things in the order of the scene, relation and background, from the words alone."""
    words = caption.replace(",", " ").split()
    background = next((word for word in words if word in BACKGROUNDS), None)
    at = [place for place, word in enumerate(words) if word in SHAPES]
    starts = [place for place, word in enumerate(words) if word in SIZE_WORDS]
    things = []
    for start, shape in zip(starts, at, strict=True):
        part = words[start : shape + 1]
        striped = "striped" in part or words[shape + 1 : shape + 3] == ["with", "stripes"]
        assert not ("plain" in part and striped)
        (colour,) = [word for word in part if word in COLORS]
        things.append(Thing(words[shape], colour, SIZE_WORDS[part[0]], striped))
    if len(things) == 1:
        return things, None, background
    between, after = words[at[0] : starts[1]], words[at[1] :]
    told = {word: word for word in ("left", "right")} | {"above": "above", "over": "above"}
    told |= {"below": "below", "under": "below"}
    (said,) = [told[word] for word in between + after if word in told]
    last = any(word in told for word in after)  # "one with other on its left": the other is left
    if (said in ("left", "above")) == last:
        things.reverse()
    return things, "left of" if said in ("left", "right") else "above", background


def test_a_caption_determines_its_scene(scenes):
    named = []
    for scene in scenes["train"]:
        texts = captions(scene)
        assert len(set(texts)) == 2 and texts == captions(scene)
        for caption in texts:
            assert set(caption) <= set("abcdefghijklmnopqrstuvwxyz ,") and len(caption.split()) <= 20
            things, relation, background = understood(caption)
            assert (tuple(things), relation) == (scene.things, scene.relation), caption
            assert background in (scene.background, None)
            named.append(background is not None)
        assert understood(texts[0])[2] is not None
    assert 0.6 < np.mean(named) < 0.95


def test_captions_vary_and_their_number_has_bounds(scenes):
    (scene,) = [scene for scene in scenes["train"][:50] if len(scene.things) == 2][:1]
    assert len(set(captions(scene, 8))) == 8
    with pytest.raises(UsageError, match="count must be from 1 to 8, not 0"):
        captions(scene, 0)


# Pictures


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_a_thing_has_its_colour_where_it_is_and_nothing_elsewhere(size):
    scene = Scene((Thing("square", "red", "large", False),), None, "sky", ((24, 40),))
    picture = render(scene, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    x, y = 24 * size // 64, 40 * size // 64
    assert tuple(picture[y, x]) == COLORS["red"]
    changed = np.argwhere((picture != BACKGROUNDS["sky"][0]).any(2))
    half = 14 * size / 64
    assert (np.abs(changed + 0.5 - (y, x)) <= half + 0.5).all()
    assert len(changed) > (1.6 * half) ** 2


def test_the_same_picture_at_any_size():
    """Halved, a picture of 128 is that of 64: sizes, places and stripes scale.

    A pixel's part is counted on 8 x 8 points, which an upright edge between two of them makes up to 1/16 wrong.
    """
    for index in range(20):
        scene = make_scene("train", index)
        halved = render(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(halved - render(scene, 64)).max() <= 1 + 255 / 16


def test_stripes_are_two_bands_of_four_pixels():
    scene = Scene((Thing("square", "blue", "large", True),), None, "white", ((32, 32),))
    column = render(scene)[:, 32]
    for y in range(21, 44):
        assert tuple(column[y]) == (COLORS["blue"], STRIPES)[y // 4 % 2]


def test_tiles_change_a_quarter_of_the_background_alone():
    scene = Scene((Thing("circle", "red", "large", False),), None, "sky", ((32, 32),))
    flat, tiled = render(scene), render(scene, style="tiled")
    assert (background_image("sky", 64, "flat") != background_image("sky", 64, "tiled")).any(2).mean() == 0.25
    assert (flat[24:40, 24:40] == tiled[24:40, 24:40]).all() and (flat != tiled).any()


def test_masks_differ():
    """No two shapes of a size share more than 4/5 of what they cover together, so small ones can be told apart."""
    for size in SIZES:
        masks = {shape: thing_mask(shape, size, 64) for shape in SHAPES}
        for one in SHAPES:
            for other in SHAPES[: SHAPES.index(one)]:
                both = np.minimum(masks[one], masks[other]).sum() / np.maximum(masks[one], masks[other]).sum()
                assert both < 0.8, (one, other, size)


@pytest.mark.parametrize(("size", "style", "message"), [(60, "flat", "multiple of 16"), (64, "oil", "flat, tiled")])
def test_other_sizes_and_styles_are_refused(size, style, message):
    with pytest.raises(UsageError, match=message):
        render(make_scene("train", 0), size, style)


# Data sets


def test_what_is_written_is_read_as_a_data_set_of_text(tmp_path):
    write_scenes(tmp_path / "set", "valid", 5, 20)
    source = open_source(tmp_path / "set", "text")
    assert len(source) == 20 and not source.report.dropped
    rows = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    for sample, row in zip(source.samples, rows, strict=True):
        scene = make_scene(row["split"], row["index"])
        assert sample.id == f"{row['index']:06}.png" and list(sample.captions) == captions(scene)
        assert (np.asarray(Image.open(tmp_path / "set" / sample.id)) == render(scene)).all()


def test_contrasts_stand_beside_their_scenes(tmp_path):
    """So that groups of two of the data set are pairs."""
    write_scenes(tmp_path / "set", "train", 5, 10, contrasts=True)
    samples = open_source(tmp_path / "set", "text").samples
    assert len(samples) == 20
    for index, one, two in zip(range(5, 15), samples[::2], samples[1::2], strict=True):
        assert (one.id, two.id) == (f"{index:06}-contrast.png", f"{index:06}.png")
        for sample, scene in ((one, make_contrast(index)), (two, make_scene("train", index))):
            assert list(sample.captions) == captions(scene)
            assert (np.asarray(Image.open(tmp_path / "set" / sample.id)) == render(scene)).all()
    with pytest.raises(UsageError, match="contrasts are of the split train, with captions"):
        write_scenes(tmp_path / "other", "valid", 0, 3, contrasts=True)


def test_class_folders_are_read_as_a_data_set_of_classes(tmp_path):
    write_scenes(tmp_path / "set", "train", 0, 60, classes=True, style="tiled", size=80)
    source = open_source(tmp_path / "set", "class")
    assert source.classes == sorted(SHAPES)
    expected = {index: make_scene("train", index) for index in range(60)}
    expected = {f"{index:06}.png": scene for index, scene in expected.items() if len(scene.things) == 1}
    assert len(source) == len(expected)
    for sample in source.samples:
        shape, name = sample.id.split("/")
        assert expected[name].things[0].shape == shape == source.classes[sample.label]
        assert (np.asarray(Image.open(tmp_path / "set" / sample.id)) == render(expected[name], 80, "tiled")).all()


def test_a_complete_folder_is_kept_and_any_other_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()  # empty: may be used
    write_scenes(folder, "train", 0, 3)
    time = (folder / "000000.png").stat().st_mtime_ns
    write_scenes(folder, "train", 0, 3)
    assert (folder / "000000.png").stat().st_mtime_ns == time
    with pytest.raises(OutputError, match="exists already"):
        write_scenes(folder, "train", 0, 4)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists already"):
        write_scenes(other, "train", 0, 3)
    assert [path.name for path in other.iterdir()] == ["letter.txt"]
