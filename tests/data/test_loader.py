"""data/loader.py: the same rows for any number of threads, processes and restarts; every sample once an epoch."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.data.images import crop_square, decode_image
from mindalle_jax.data.loader import Loader
from mindalle_jax.data.samples import Source
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import CheckpointError, DataError, UsageError
from mindalle_jax.text.tokenizer import TextTokenizer

SAMPLES = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures 24 x 16 in three classes, whose columns tell the crop; three captions each."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        path = root / f"class{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text("the cat\nthe dog\nand the")
    return root


@pytest.fixture(scope="module")
def source(folder) -> Source:
    return open_source(folder, "text")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder) -> TextTokenizer:
    return TextTokenizer(tiny_model_folder / "tokenizer", 12, 110)


@pytest.fixture
def stream(source, tokenizer):
    """stream(batches, **options): the first batches of training as one dict of rows."""

    def run(batches: int, *, state: dict | None = None, **options) -> dict[str, np.ndarray]:
        options = {"batch_size": 8, "train": True, "image_size": 16, "tokenizer": tokenizer} | options
        loader = Loader(source, **options)
        if state is not None:
            loader.set_state(state)
        return join(itertools.islice(loader, batches))

    return run


def join(batches) -> dict[str, np.ndarray]:
    batches = list(batches)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# What is in a batch


def test_a_batch(stream, source, tokenizer):
    batch = stream(1)
    assert {key: (array.dtype, array.shape) for key, array in batch.items()} == {
        "index": (np.int64, (8,)),
        "sample": (np.int32, (8,)),
        "image": (np.uint8, (8, 16, 16, 3)),
        "text": (np.int32, (8, 12)),
    }
    for number, image, text in zip(batch["sample"], batch["image"], batch["text"], strict=True):
        whole = np.asarray(decode_image(source[number].image.read()))
        assert any((whole[:, left : left + 16] == image).all() for left in range(9))
        assert any((tokenizer([caption]).ids[0] == text).all() for caption in source[number].captions)


def test_labels_and_no_text(folder):
    source = open_source(folder, "class")
    batch = next(Loader(source, batch_size=4, train=True, image_size=16))
    assert set(batch) == {"index", "sample", "image", "label"} and batch["label"].dtype == np.int32
    assert [source[number].label for number in batch["sample"]] == batch["label"].tolist()
    source = open_source(folder, "unconditional")
    assert set(next(Loader(source, batch_size=4, train=True, image_size=16))) == {"index", "sample", "image"}


def test_captions_and_crops_change_from_epoch_to_epoch(stream):
    rows = stream(11 * 8)  # 32 epochs
    first = rows["sample"] == rows["sample"][0]
    assert first.sum() == 32
    assert len({text.tobytes() for text in rows["text"][first]}) == 3
    assert len({image.tobytes() for image in rows["image"][first]}) >= 8  # of 9


# Order


def test_every_sample_once_an_epoch_in_another_order(stream):
    order = stream(11)["sample"].reshape(4, SAMPLES)  # 11 batches of 8 are 4 epochs
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in order)
    assert len({epoch.tobytes() for epoch in order}) == 4


def test_index_is_the_position_in_the_stream(stream):
    assert stream(11)["index"].tolist() == list(range(88))


def test_the_seed_decides(stream):
    assert equal(stream(2, seed=5), stream(2, seed=5))
    assert not np.array_equal(stream(2, seed=5)["sample"], stream(2, seed=6)["sample"])
    stream(1, seed=(1 << 32) - 1)


def test_groups_stay_together_and_are_shuffled(stream):
    """Also over several processes: the rows of a batch are the same."""
    order = stream(11, group_size=2)["sample"].reshape(4, SAMPLES // 2, 2)
    assert (order[:, :, 0] % 2 == 0).all() and (order[:, :, 1] == order[:, :, 0] + 1).all()
    assert all(sorted(epoch[:, 0]) == list(range(0, SAMPLES, 2)) for epoch in order)
    assert len({epoch.tobytes() for epoch in order}) == 4
    parts = [stream(11, group_size=2, process_index=index, process_count=2)["sample"] for index in range(2)]
    assert np.stack(parts, axis=1).reshape(-1).tolist() == order.reshape(-1).tolist()


@pytest.mark.parametrize("group_size", [0, 3])
def test_groups_must_be_whole(source, group_size):
    with pytest.raises(DataError, match=f"22 samples are not a multiple of data.group_size {group_size}"):
        Loader(source, batch_size=8, train=True, image_size=16, group_size=group_size)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads(stream, threads):
    assert equal(stream(6, threads=threads), stream(6, threads=1))


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes(stream, count):
    """The rows of a whole batch are dealt to the processes one by one."""
    whole = stream(6)
    parts = [stream(6, process_index=index, process_count=count) for index in range(count)]
    for key in whole:
        dealt = np.stack([part[key] for part in parts], axis=1).reshape(whole[key].shape)
        assert np.array_equal(dealt, whole[key])


# State


def test_resuming_is_going_on(source, tokenizer, stream):
    loader = Loader(source, batch_size=8, train=True, image_size=16, tokenizer=tokenizer)
    join(itertools.islice(loader, 4))
    state = json.loads(json.dumps(loader.get_state()))
    assert state == {"next_index": 32}
    rest = join(itertools.islice(loader, 3))
    assert equal(rest, stream(3, state=state, threads=3))
    parts = [stream(3, state=state, process_index=index, process_count=2) for index in range(2)]
    assert sorted(np.concatenate([part["sample"][:4] for part in parts])) == sorted(rest["sample"][:8])
    # Another batch size goes on at the same row.
    assert equal(stream(6, state=state, batch_size=4), rest)
    loader.set_state(state)
    assert equal(join(itertools.islice(loader, 3)), rest)


@pytest.mark.parametrize("state", [{}, {"next_index": -1}, {"next_index": "3"}, {"next_index": True}])
def test_a_state_of_something_else(source, state):
    with pytest.raises(CheckpointError, match="state of the training data must be"):
        Loader(source, batch_size=8, train=True, image_size=16).set_state(state)


# Validation


@pytest.mark.parametrize("count", [1, 2])
def test_validation_is_one_pass_in_order(source, tokenizer, count):
    for index in range(count):
        loader = Loader(
            source,
            batch_size=8,
            train=False,
            image_size=16,
            tokenizer=tokenizer,
            process_index=index,
            process_count=count,
        )
        rows = join(loader)
        assert len(rows["sample"]) == 24 // count and rows["valid"].dtype == bool
        valid = rows["valid"]
        assert rows["sample"][valid].tolist() == list(range(SAMPLES))[index::count]
        for number, image, text in zip(rows["sample"], rows["image"], rows["text"], strict=True):
            assert (image == crop_square(decode_image(source[number].image.read()), 16, None)).all()
            assert (text == tokenizer(["the cat"]).ids[0]).all()
        next(iter(loader))
        assert equal(join(loader), rows), "every pass starts at the beginning"


def test_a_validation_set_smaller_than_a_batch(source):
    (batch,) = Loader(source.part(0, 3), batch_size=8, train=False, image_size=16)
    assert batch["valid"].tolist() == [True] * 3 + [False] * 5 and batch["image"].shape == (8, 16, 16, 3)


# Damaged pictures


@pytest.fixture
def damaged(tmp_path):
    """damaged(count, bad): a source of pictures, in a folder of its own, of which some are cut short."""
    folders = itertools.count()

    def make(count: int, bad: set[int]) -> Source:
        folder = tmp_path / f"pictures{next(folders)}"  # an earlier loader still reads ahead
        folder.mkdir()
        for number in range(count):
            path = folder / f"{number:04}.png"
            Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)
            if number in bad:
                path.write_bytes(path.read_bytes()[:50])
        return open_source(folder, "unconditional")

    return make


def test_damaged_pictures_are_replaced_by_the_next(damaged, caplog):
    source = damaged(12, {3, 4, 11})
    loader = Loader(source, batch_size=6, train=True, image_size=16)
    rows = join(itertools.islice(loader, 6))
    replaced = {3: 5, 4: 5, 11: 0}
    expected = join(itertools.islice(Loader(damaged(12, set()), batch_size=6, train=True, image_size=16), 6))["sample"]
    assert rows["sample"].tolist() == [replaced.get(number, number) for number in expected.tolist()]
    assert (rows["image"][:, 0, 0, 0] == rows["sample"]).all()
    assert loader.counts["bad_images"] == 3 and loader.counts["images_read"] >= 36
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 3, "each is named once"
    assert f"{source.path}: left out: 0003.png: truncated or damaged" in "\n".join(lines)


def test_damaged_pictures_do_not_count_in_validation(damaged):
    loader = Loader(damaged(12, {3, 11}), batch_size=5, train=False, image_size=16)
    rows = join(loader)
    assert rows["sample"][rows["valid"]].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert loader.counts["bad_images"] == 2 and (rows["image"][3] == 0).all()


def test_too_many_damaged_pictures_stop_the_run(damaged):
    source = damaged(100, set(range(0, 100, 8)))
    message = r"6 of the \d+ images tried cannot be read, over 5%; the last one: 00\d\d.png: truncated or damaged"
    with pytest.raises(DataError, match=message):
        join(itertools.islice(Loader(source, batch_size=10, train=True, image_size=16, threads=1), 10))


def test_no_picture_can_be_read(damaged):
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        next(Loader(damaged(3, {0, 1, 2}), batch_size=2, train=True, image_size=16))


def test_a_picture_that_went_away(damaged):
    source = damaged(4, set())
    (Path(source.path) / "0002.png").unlink()
    rows = join(itertools.islice(Loader(source, batch_size=4, train=True, image_size=16), 2))
    assert 2 not in rows["sample"] and (rows["sample"] == 3).sum() == 4


# Arguments


def test_fewer_samples_than_a_batch(folder):
    (folder.parent / "few").mkdir(exist_ok=True)
    for number in range(3):
        Image.new("RGB", (16, 16)).save(folder.parent / "few" / f"{number}.png")
    (folder.parent / "few" / "0.txt").write_text("a cat")
    source = open_source(folder.parent / "few", "text")
    with pytest.raises(DataError) as caught:
        Loader(source, batch_size=2, train=True, image_size=16)
    assert str(caught.value) == (
        f"{source.path}: a batch of 2 needs as many samples, but has 1 samples; left out: "
        "2 without a caption (first: '1.png')"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"batch_size": 7, "process_count": 4}, "batch_size 7 must be a multiple of the 4 processes, such as 4 or 8"),
        ({"batch_size": 3, "process_count": 4}, "batch_size 3 must be a multiple of the 4 processes, such as 4"),
        ({"seed": -1}, "seed must lie in"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"image_size": None}, "holds images: image_size must be given"),
    ],
)
def test_arguments_out_of_range(source, options, message):
    with pytest.raises(UsageError, match=message):
        Loader(source, **{"batch_size": 8, "train": True, "image_size": 16, **options})


def test_grain_is_an_extra(source, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(UsageError, match=r"needs grain: pip install '.*'grain>=0.2.18'"):
        Loader(source, batch_size=8, train=True, image_size=16)
