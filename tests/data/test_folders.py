"""data/folders.py: captions beside images, folders of classes, tables; what is left out is counted."""

import json
import os

import pytest
from image_folders import captions, fill, labels, picture

from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError

# Captions beside the pictures


def test_captions_beside_pictures(tmp_path):
    """Several lines are several captions; nested folders, upper-case extensions and every format count."""
    fill(tmp_path, b_jpg=None, b_txt="a cat\n\n  a small cat \r\n", a__x_PNG=None, a__x_txt="\ufeffa dog", c_webp=None)
    fill(tmp_path, c_txt="bird", README_md="about", _hidden_jpg=None, d_jpeg=None, d_txt="fish")
    source = open_source(tmp_path, "text")
    assert captions(source) == {
        "a/x.PNG": ["a dog"],
        "b.jpg": ["a cat", "a small cat"],
        "c.webp": ["bird"],
        "d.jpeg": ["fish"],
    }
    assert source[1].image.read() == (tmp_path / "b.jpg").read_bytes()
    assert str(source.report) == "4 samples"


def test_what_is_left_out_is_counted(tmp_path):
    fill(tmp_path, a_jpg=None, a_txt="a cat", b_jpg=None, c_jpg=None, c_txt="\n  \n", d_gif=None, d_txt="x", e_jpg=None)
    fill(tmp_path, e_txt="\xff".encode("latin1"), f_jpg=None, f_txt="x" * 2_001, g_jpg=None, g_txt=b"x" * 70_000)
    fill(tmp_path, h_jpg=None, h_txt="good\nnot \0 good", i_jpg=None, i_txt="")
    (tmp_path / os.fsdecode(b"j\xff.jpg")).write_bytes(picture())
    source = open_source(tmp_path, "text")
    assert captions(source) == {"a.jpg": ["a cat"], "h.jpg": ["good"]}
    assert str(source.report) == (
        "2 samples; left out: 1 without a caption (first: 'b.jpg'), 2 with an empty caption (first: 'c.jpg'), "
        "1 in a format other than JPEG, PNG and WebP (first: 'd.gif'), "
        "1 with a caption file that is not UTF-8 or cannot be read (first: 'e.jpg'), "
        "1 with a caption that is too long or no text (first: 'f.jpg'), "
        "1 with a caption file over 65536 bytes (first: 'g.jpg'), "
        "1 with a name that is not UTF-8 (first: \"'j\\\\udcff.jpg'\"), "
        "1 captions without an image (first: 'd.txt')"
    )


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
    fill(tmp_path, a_jpg=None, b_jpg=None, c_jpg=None, c_txt=" ")
    with pytest.raises(DataError) as caught:
        open_source(tmp_path, "text")
    assert str(caught.value) == (
        f"{tmp_path}: nothing to train on for the task 'text': 0 samples; left out: "
        "2 without a caption (first: 'a.jpg'), 1 with an empty caption (first: 'c.jpg')"
    )
    assert caught.value.exit_code == 9


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path / "real", a_jpg=None, a_txt="a cat")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert captions(open_source(tmp_path / "data", "text")) == {"linked/a.jpg": ["a cat"]}


# Pictures alone, classes


def test_pictures_alone(tmp_path):
    fill(tmp_path, b_jpg=None, a__a_png=None, b_txt="ignored")
    source = open_source(tmp_path, "unconditional")
    assert captions(source) == {"a/a.png": [], "b.jpg": []} and source.classes is None


def test_class_folders(tmp_path):
    """The label is the place of the topmost folder in the sorted names; pictures beside the folders have none."""
    fill(tmp_path, n02__b_jpg=None, n02__deep__a_jpg=None, n01__c_png=None, stray_jpg=None)
    (tmp_path / "n00-empty").mkdir()
    source = open_source(tmp_path, "class", num_classes=3)
    assert labels(source) == {"n01/c.png": 1, "n02/b.jpg": 2, "n02/deep/a.jpg": 2}
    assert source.classes == ["n00-empty", "n01", "n02"]
    assert str(source.report) == "3 samples; left out: 1 without a label (first: 'stray.jpg')"


def test_more_classes_than_the_model_has(tmp_path):
    fill(tmp_path, a__a_jpg=None, b__b_jpg=None)
    message = r"'b/b.jpg' has the label 1, but the model has 1 classes; labels start at 0: set stage2.hparams.n_classes"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, "class", num_classes=1)


def test_validation_folders_get_the_labels_of_training(tmp_path):
    """A validation set without one of the classes would otherwise have all later labels shifted."""
    fill(tmp_path / "train", a__a_jpg=None, b__b_jpg=None, c__c_jpg=None)
    fill(tmp_path / "val", c__x_jpg=None)
    classes = open_source(tmp_path / "train", "class").classes
    assert labels(open_source(tmp_path / "val", "class", classes=classes)) == {"c/x.jpg": 2}
    fill(tmp_path / "val", d__x_jpg=None)
    with pytest.raises(
        DataError, match="has classes that the training data does not have: d; the training data has 3: a, b, c"
    ):
        open_source(tmp_path / "val", "class", classes=classes)


def test_no_class_folders(tmp_path):
    fill(tmp_path, a_jpg=None)
    with pytest.raises(DataError, match="holds no subfolders; the task 'class' needs one folder of images per class"):
        open_source(tmp_path, "class")


# Metadata


def test_metadata_jsonl(tmp_path):
    """A list is several captions, and so are several lines of one picture."""
    rows = [
        {"file_name": "b.jpg", "text": ["a cat", "a small cat"], "label": 3},
        {"file_name": "sub/a.png", "text": "a dog", "label": 0},
        {"file_name": "b.jpg", "text": "a third"},
    ]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    fill(tmp_path, metadata_jsonl=lines, b_jpg=None, sub__a_png=None, unlisted_jpg=None)
    assert captions(open_source(tmp_path, "text")) == {
        "b.jpg": ["a cat", "a small cat", "a third"],
        "sub/a.png": ["a dog"],
    }
    assert labels(open_source(tmp_path, "class")) == {"b.jpg": 3, "sub/a.png": 0}
    assert len(open_source(tmp_path, "unconditional")) == 2


def test_metadata_csv(tmp_path):
    table = 'file_name,text,label\nb.jpg,"a cat, small",7\na.jpg,a dog,\n'
    fill(tmp_path, metadata_csv="\ufeff" + table, a_jpg=None, b_jpg=None)
    assert captions(open_source(tmp_path, "text")) == {"a.jpg": ["a dog"], "b.jpg": ["a cat, small"]}
    assert labels(open_source(tmp_path, "class")) == {"b.jpg": 7}


def test_bad_lines_of_metadata_are_counted(tmp_path):
    lines = ["{", "[1]", "{}", '{"file_name": "../x.jpg"}', '{"file_name": "/x.jpg"}', '{"file_name": "gone.jpg"}']
    lines += ['{"file_name": "a.gif"}', '{"file_name": "a.jpg", "text": 5}', '{"file_name": "a.jpg", "label": "cat"}']
    fill(tmp_path, metadata_jsonl="\n".join([*lines, '{"file_name": "a.jpg", "text": "good"}']), a_jpg=None)
    source = open_source(tmp_path, "text")
    assert captions(source) == {"a.jpg": ["good"]}
    assert dict(source.report.dropped) == {
        "lines that are no JSON object": 2,
        "lines without file_name": 1,
        "lines whose file_name points outside the folder": 2,
        "lines whose image is missing": 1,
        "in a format other than JPEG, PNG and WebP": 1,
        "lines whose text is no text": 1,
        "lines whose label is no number": 1,
    }
    assert source.report.first["lines that are no JSON object"] == "line 1"


def test_an_unquoted_comma_does_not_cut_a_caption(tmp_path):
    fill(tmp_path, metadata_csv="file_name,text\na.jpg,a cat, small\nb.jpg,a dog\n", a_jpg=None, b_jpg=None)
    source = open_source(tmp_path, "text")
    assert captions(source) == {"b.jpg": ["a dog"]} and "quote captions" in str(source.report)


def test_metadata_that_is_none(tmp_path):
    fill(tmp_path / "a", metadata_csv="image,caption\n")
    with pytest.raises(DataError, match="its first line must name the columns, among them file_name and text"):
        open_source(tmp_path / "a", "text")
    fill(tmp_path / "b", metadata_jsonl=b"\xff\xfe")
    with pytest.raises(DataError, match="metadata.jsonl: cannot be read"):
        open_source(tmp_path / "b", "text")
    fill(tmp_path / "c", metadata_jsonl="", metadata_csv="")
    with pytest.raises(DataError, match="holds both metadata.jsonl and metadata.csv"):
        open_source(tmp_path / "c", "text")
