"""data/folders.py: captions beside images, folders of classes, tables; what is left out is counted."""

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
    assert str(source.report) == "4 samples; not used: 1 .md (no caption file of an image)"


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


@pytest.mark.parametrize("num_classes", [1, 3])
def test_another_number_of_classes_than_the_model_has(tmp_path, num_classes):
    fill(tmp_path, a__a_jpg=None, b__b_jpg=None)
    message = f"has 2 classes, but the model has {num_classes}; set stage2.hparams.n_classes=2, or choose other data"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, "class", num_classes=num_classes)


def test_a_label_that_the_model_does_not_have(tmp_path):
    """Numbers without names may be fewer than the classes, and not more."""
    fill(tmp_path, metadata_csv="file_name,label\na.jpg,0\nb.jpg,5\n", a_jpg=None, b_jpg=None)
    assert len(open_source(tmp_path, "class", num_classes=6)) == 2
    message = r"'b.jpg' has the label 5, but the model has 5 classes; labels start at 0: set stage2.hparams.n_classes"
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, "class", num_classes=5)


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
