"""data/walk.py: which subfolders are splits, and which stay classes."""

import pytest
from image_folders import captions, fill, labels

from mindalle_jax.data.sources import open_source
from mindalle_jax.data.walk import split_of
from mindalle_jax.errors import DataError


def test_splits_above_captions(tmp_path):
    fill(tmp_path, train__a_jpg=None, train__a_txt="a cat", Val__b_jpg=None, Val__b_txt="a dog", README_md="")
    assert captions(open_source(tmp_path, "text")) == {"a.jpg": ["a cat"]}
    assert captions(open_source(tmp_path, "text", split="valid")) == {"b.jpg": ["a dog"]}
    assert captions(open_source(tmp_path / "Val", "text", split="valid")) == {"b.jpg": ["a dog"]}


def test_splits_above_classes(tmp_path):
    fill(tmp_path, train__cat__a_jpg=None, train__dog__b_jpg=None, validation__dog__c_jpg=None, test__cat__d_jpg=None)
    source = open_source(tmp_path, "class")
    assert source.classes == ["cat", "dog"] and labels(source) == {"cat/a.jpg": 0, "dog/b.jpg": 1}
    assert labels(open_source(tmp_path, "class", split="valid", classes=source.classes)) == {"dog/c.jpg": 1}


def test_splits_above_metadata(tmp_path):
    fill(tmp_path / "train", metadata_jsonl='{"file_name": "a.jpg", "text": "a cat"}', a_jpg=None)
    assert captions(open_source(tmp_path, "text")) == {"a.jpg": ["a cat"]}


@pytest.mark.parametrize(
    "names", [["train", "plane", "car"], ["train", "test", "cat"], ["validate", "train"]], ids=" ".join
)
def test_a_class_may_be_called_train(tmp_path, names):
    for name in names:
        fill(tmp_path / name, a_jpg=None)
    assert open_source(tmp_path, "class").classes == sorted(names)


def test_images_beside_the_folders_are_not_lost(tmp_path):
    fill(tmp_path, train__a_jpg=None, val__b_jpg=None, c_jpg=None)
    assert len(open_source(tmp_path, "unconditional")) == 3


def test_a_split_that_is_not_there(tmp_path):
    fill(tmp_path, val__a_jpg=None, test__b_jpg=None)
    with pytest.raises(DataError, match="holds the splits test, val, and no train; name one of these folders"):
        open_source(tmp_path, "unconditional")


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-00000-of-00001.parquet", "train"), ("validation.parquet", "valid"), ("TEST_1", "test"), ("trainer", None)],
)
def test_the_split_of_a_file(name, split):
    assert split_of(name) == split
