"""data/sources.py: every format that people have, what is left out of it, and what they are told."""

import sys
from pathlib import Path

import pytest
from image_folders import captions, labels, picture

from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError, UsageError


def test_no_such_path_and_no_such_task(tmp_path):
    with pytest.raises(
        DataError, match="gone: does not exist; images are read from folders and from uncompressed tars"
    ):
        open_source(tmp_path / "gone", "text")
    with pytest.raises(UsageError, match="task must be one of text, class, unconditional, not 'txt'"):
        open_source(tmp_path, "txt")


def test_saved_datasets_need_the_library(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="saved by the library datasets: pip install 'datasets>=4'"):
        open_source(tmp_path, "text")


def test_saved_datasets(tmp_path):
    import datasets

    files = []
    for number in range(4):
        files.append(str(tmp_path / f"{number}.jpg"))
        Path(files[-1]).write_bytes(picture(number))
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(names=["x", "y"])
    )
    rows = {"image": files, "caption": ["a cat", "", "a dog", None], "label": [0, 1, 1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved", "text")
    assert list(captions(source).values()) == [["a cat"], ["a dog"]] and source[1].image.read() == picture(2)
    assert source.fingerprint() == open_source(tmp_path / "saved", "text").fingerprint()
    source = open_source(tmp_path / "saved", "class", num_classes=2)
    assert list(labels(source).values()) == [0, 1, 1, 0] and source.classes == ["x", "y"]
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="holds several splits; name the folder of one: train"):
        open_source(tmp_path / "splits", "text")
    dataset.select_columns("caption").save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match="has no column 'image' of images, only caption"):
        open_source(tmp_path / "text", "text")
