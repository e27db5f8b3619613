"""data/records.py: names of fields, and values of captions and labels."""

import pytest

from mindalle_jax.data.records import Columns, captions_of, decode_text, label_of, read_record
from mindalle_jax.errors import DataError


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["file_name", "text", "label"], ("file_name", "text", "label")),
        (["Label", "CAPTION", "Image"], ("Image", "CAPTION", "Label")),
        (["prompt", "caption", "path"], ("path", "caption", None)),
        (["url", "key"], (None, None, None)),
    ],
)
def test_known_names_in_any_case(names, found):
    assert Columns().find(names) == found


def test_chosen_names():
    assert Columns(image="url", caption="alt").find(["url", "alt", "text"]) == ("url", "alt", None)
    with pytest.raises(DataError, match="data.image_column: there is no 'urls', only url, alt; did you mean url?"):
        Columns(image="urls").find(["url", "alt"])


def test_a_record():
    assert read_record({"caption": None, "text": "a cat", "label": 3.0}, Columns()) == (["a cat"], 3)
    assert read_record({"alt": ["a", "b"], "text": "c"}, Columns(caption="alt")) == (["a", "b"], None)
    assert read_record({"text": "c"}, Columns(caption="alt")) == ([], None)


@pytest.mark.parametrize("value", [3, {"a": 1}, ["a", 3], b"a"])
def test_what_is_no_caption(value):
    with pytest.raises(ValueError):
        captions_of(value)


@pytest.mark.parametrize(
    ("value", "label"),
    [(3, 3), ("3", 3), (" 03\n", 3), ("cat", "cat"), ("", None), (None, None), (2.0, 2), ("-1", "-1")],
)
def test_labels(value, label):
    assert label_of(value) == label


@pytest.mark.parametrize("value", [True, 2.5, [1], float("nan")])
def test_what_is_no_label(value):
    with pytest.raises(ValueError):
        label_of(value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_windows(encoding):
    assert decode_text("é 東".encode(encoding)) == "é 東"
