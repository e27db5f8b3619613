"""data/metadata.py: metadata files and captions of COCO, as people write them; bad lines are counted."""

import codecs
import json

import pytest
from image_folders import captions, fill, labels, picture

from mindalle_jax.data.records import Columns
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError


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
        "lines whose file_name points outside the folder": 1,
        "lines whose image is missing": 2,
        "in a format other than JPEG, PNG and WebP": 1,
        "lines whose text is no text": 1,
    }
    assert source.report.first["lines that are no JSON object"] == "line 1"


def test_an_unquoted_comma_does_not_cut_a_caption(tmp_path):
    fill(tmp_path, metadata_csv="file_name,text\na.jpg,a cat, small\nb.jpg,a dog\n", a_jpg=None, b_jpg=None)
    source = open_source(tmp_path, "text")
    assert captions(source) == {"b.jpg": ["a dog"]} and "quote captions" in str(source.report)


def test_metadata_that_is_none(tmp_path):
    fill(tmp_path / "a", metadata_csv="picture,words\n")
    with pytest.raises(DataError, match="its first line must name the columns, among them file_name and text"):
        open_source(tmp_path / "a", "text")
    fill(tmp_path / "b", metadata_jsonl=b"\xff\x00")
    with pytest.raises(DataError, match="metadata.jsonl: cannot be read"):
        open_source(tmp_path / "b", "text")
    fill(tmp_path / "c", metadata_jsonl="", metadata_csv="")
    with pytest.raises(DataError, match="holds both metadata.csv and metadata.jsonl"):
        open_source(tmp_path / "c", "text")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata_csv", "file_name,caption\na.jpg,a cat\nb.jpg,a dog\n"),
        ("metadata_csv", "file_name;text\r\na.jpg;a cat\r\nb.jpg;a dog\r\n"),
        ("metadata_csv", "image\tprompt\na.jpg\ta cat\nb.jpg\ta dog\n"),
        ("metadata_tsv", "path\tTEXT\na.jpg\ta cat\nb.jpg\ta dog\n"),
        ("metadata_csv", codecs.BOM_UTF16_LE + "file_name;text\na.jpg;a cat\nb.jpg;a dog\n".encode("utf-16-le")),
        ("metadata_csv", "text,file_name\na cat,C:\\photos\\a.jpg\na dog,/home/me/photos/b.jpg\n"),
        ("metadata_jsonl", '{"image": "a.jpg", "caption": "a cat"}\n{"image": "b.jpg", "prompt": "a dog"}\n'),
        ("metadata_jsonl", '{"FILE_NAME": "./a.jpg", "Caption": ["a cat"]}\n{"path": "b.jpg", "TEXT": "a dog"}'),
        ("metadata_jsonl", '\ufeff{"file": "a.jpg", "text": "a cat"}\n{"file": "b.jpg", "text": "a dog"}'),
    ],
    ids=["caption", "semicolon", "tab", "tsv", "UTF-16", "other systems' paths", "names", "cases", "BOM"],
)  # fmt: skip
def test_tables_as_people_write_them(tmp_path, name, text):
    fill(tmp_path, **{name: text}, a_jpg=None, b_jpg=None)
    source = open_source(tmp_path, "text")
    assert captions(source) == {"a.jpg": ["a cat"], "b.jpg": ["a dog"]} and not source.report.dropped


def test_a_chosen_column(tmp_path):
    table = "file_name,text,long\na.jpg,cat,a cat on a sofa\n"
    fill(tmp_path, metadata_csv=table, a_jpg=None)
    assert captions(open_source(tmp_path, "text")) == {"a.jpg": ["cat"]}
    chosen = open_source(tmp_path, "text", columns=Columns(caption="long"))
    assert captions(chosen) == {"a.jpg": ["a cat on a sofa"]}
    with pytest.raises(DataError, match="data.caption_column: there is no 'lnog', only .*; did you mean long?"):
        open_source(tmp_path, "text", columns=Columns(caption="lnog"))
    fill(tmp_path / "b", metadata_jsonl='{"photo": "a.jpg", "text": "cat"}', a_jpg=None)
    assert captions(open_source(tmp_path / "b", "text", columns=Columns(image="photo"))) == {"a.jpg": ["cat"]}


def test_metadata_of_subfolders(tmp_path):
    """Paths begin at the folder of the file."""
    for part in ("a", "b"):
        row = {"file_name": f"deep/{part}.jpg", "text": f"cat {part}"}
        fill(tmp_path / part, metadata_jsonl=json.dumps(row), **{f"deep__{part}_jpg": None})
    assert captions(open_source(tmp_path, "text")) == {"a/deep/a.jpg": ["cat a"], "b/deep/b.jpg": ["cat b"]}


def test_names_of_classes_are_numbered_in_order(tmp_path):
    table = "file_name,label\na.jpg,dog\nb.jpg,cat\nc.jpg,dog\n"
    fill(tmp_path, metadata_csv=table, a_jpg=None, b_jpg=None, c_jpg=None)
    source = open_source(tmp_path, "class")
    assert source.classes == ["cat", "dog"] and labels(source) == {"a.jpg": 1, "b.jpg": 0, "c.jpg": 1}
    fill(tmp_path / "v", metadata_csv="file_name,label\na.jpg,dog\n", a_jpg=None)
    assert labels(open_source(tmp_path / "v", "class", classes=source.classes)) == {"a.jpg": 1}
    fill(tmp_path / "w", metadata_csv="file_name,label\na.jpg,eel\n", a_jpg=None)
    with pytest.raises(DataError, match="has classes that the training data does not have: eel; .* has 2: cat, dog"):
        open_source(tmp_path / "w", "class", classes=source.classes)
    fill(tmp_path / "m", metadata_csv="file_name,label\na.jpg,dog\nb.jpg,3\n", a_jpg=None, b_jpg=None)
    with pytest.raises(DataError, match="labels are numbers and names: 3"):
        open_source(tmp_path / "m", "class")


def test_an_image_that_two_folders_have_needs_its_folder(tmp_path):
    rows = ["a/1.jpg", "D:/x/b/1.jpg", "E:/1.jpg"]
    lines = "\n".join(json.dumps({"file_name": name, "text": name}) for name in rows)
    fill(tmp_path, metadata_jsonl=lines, a__1_jpg=None, b__1_jpg=None)
    source = open_source(tmp_path, "text")
    assert captions(source) == {"a/1.jpg": ["a/1.jpg"], "b/1.jpg": ["D:/x/b/1.jpg"]}
    assert dict(source.report.dropped) == {"lines whose image is not unique": 1}


def test_what_metadata_does_not_list_is_named(tmp_path):
    line = json.dumps({"file_name": "a.jpg", "text": "a cat"})
    fill(tmp_path, metadata_jsonl=line, a_jpg=None, b_jpg=None, a_txt="x", c_caption="y", d_caption="z", e_parquet="")
    assert str(open_source(tmp_path, "text").report) == (
        "1 samples; left out: 1 not listed in metadata.jsonl (first: 'b.jpg'); not used: 2 .caption (metadata.jsonl "
        "has the captions), 1 .parquet (metadata.jsonl has the captions), 1 .txt (metadata.jsonl has the captions)"
    )


@pytest.mark.parametrize("place", ["captions_val2017.json", "annotations/captions_val2017.json"])
def test_captions_of_coco(tmp_path, place):
    tree = {
        "info": {},
        "images": [{"id": number, "file_name": f"{number:03}.jpg"} for number in (7, 8, 9)],
        "annotations": [{"image_id": 7, "id": 1, "caption": "a cat"}, {"image_id": 7, "id": 2, "caption": "cats"},
                        {"image_id": 8, "id": 3, "bbox": [0, 0, 1, 1]}],
    }  # fmt: skip
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(tree))
    fill(tmp_path, val2017__007_jpg=None, val2017__008_jpg=None, stray_jpg=None)
    source = open_source(tmp_path, "text")
    assert captions(source) == {"val2017/007.jpg": ["a cat", "cats"]}
    assert dict(source.report.dropped) == {
        "lines whose image is missing": 1, f"not listed in {place}": 1, "without a caption": 1
    }  # fmt: skip
    if "/" not in place:
        assert captions(open_source(file, "text")) == captions(source)


@pytest.mark.parametrize(
    "text", ['{"images": [], "annotations"', '{"images": 3, "annotations": []}', '{"images": [{}]}']
)
def test_broken_captions_of_coco(tmp_path, text):
    fill(tmp_path, coco_json=text, a_jpg=picture())
    with pytest.raises(DataError, match="coco.json: cannot be read as captions of COCO"):
        open_source(tmp_path, "text")
