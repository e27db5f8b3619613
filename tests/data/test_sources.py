"""data/sources.py: every format that people have, what is left out of it, and what they are told."""

import shlex
import sys

import pytest
from image_folders import captions, fill, write_tar

from mindalle_jax.data.sources import check_path, open_source
from mindalle_jax.errors import DataError, UsageError


def test_no_such_path_and_no_such_task(tmp_path):
    with pytest.raises(
        DataError,
        match="gone: does not exist; images are read from folders, uncompressed tars, parquet",
    ):
        open_source(tmp_path / "gone", "text")
    with pytest.raises(UsageError, match="task must be one of text, class, unconditional, not 'txt'"):
        open_source(tmp_path, "txt")


@pytest.mark.parametrize(
    ("name", "command"),
    [("00000.tar.gz", "gunzip -k"), ("photos.zip", "unzip"), ("a b.tar.zst", "unzstd"), ("x.tgz", "gunzip -k -S .tgz")],
)
def test_archives_are_refused_with_the_command_that_unpacks_them(tmp_path, name, command):
    """In a folder, and named alone."""
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError) as caught:
            open_source(path, "text")
        extension = name[name.index(".") :]
        told = f"holds 1 {extension} files, which are not read; unpack them: {command} "
        alone = f"{tmp_path / name}: {extension} files are not read; unpack it: {command} "
        assert (told if path == tmp_path else alone) in str(caught.value)
        assert shlex.split(str(caught.value))[-1] == str(tmp_path / name)


def test_a_layout_has_a_name(tmp_path):
    """check-data and the start of a run say it."""
    fill(tmp_path / "beside", a_jpg=None, a_txt="a cat")
    fill(tmp_path / "table", metadata_csv="file_name,text\na.jpg,a cat\n", a_jpg=None)
    write_tar(tmp_path / "tars" / "0.tar", {"a.jpg": b"x", "a.txt": "a cat"})
    layouts = {name: open_source(tmp_path / name, "text").report.layout for name in ("beside", "table", "tars")}
    assert layouts == {
        "beside": "images with caption files beside them",
        "table": "images listed in metadata.csv",
        "tars": "tar files as webdataset writes them",
    }


@pytest.mark.parametrize(
    "names",
    [("a_TXT",), ("a_caption",), ("a_jpg_txt",), ("a_JPG_CAPTION",), ("a_json",), ("a_txt", "a_caption")],
    ids=" ".join,
)
def test_caption_files_as_people_name_them(tmp_path, names):
    content = '{"caption": "a cat"}' if names == ("a_json",) else "a cat"
    fill(tmp_path, a_jpg=None, **{names[0]: content}, **dict.fromkeys(names[1:], "not this"))
    source = open_source(tmp_path, "text")
    assert captions(source) == {"a.jpg": ["a cat"]}


def test_caption_files_in_utf_16(tmp_path):
    fill(tmp_path, a_jpg=None, a_txt="a cat\r\ncats".encode("utf-16"))
    assert captions(open_source(tmp_path, "text")) == {"a.jpg": ["a cat", "cats"]}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "data.train: {folder} holds nothing to train on: 0 samples"),
        ({"a.txt": b"a cat", "b.caption": b"a dog"}, "0 samples; left out: 2 captions without an image"),
        ({"a.tiff": b"II"}, "1 in a format other than JPEG, PNG and WebP"),
        ({"a.zip": b"PK"}, "which are not read; unpack them: unzip"),
        ({"train/a.jpg": b"", "test/b.jpg": b""}, None),
        ({"val/a.jpg": b"", "test/b.jpg": b""}, "holds the splits test, val, and no train"),
        ({"metadata.jsonl": b"{}"}, "0 samples; left out: 1 lines without file_name"),
    ],
)
def test_what_is_wrong_with_data_is_known_without_a_model(tmp_path, files, said):
    """A run checks this before it downloads gigabytes."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    if said is None:
        check_path(str(tmp_path), "data.train")
        return
    with pytest.raises(DataError) as caught:
        check_path(str(tmp_path), "data.train")
    assert said.format(folder=tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", ["hf://pets/cats", "shards"])
def test_a_missing_library_is_known_without_a_model(tmp_path, monkeypatch, path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=f"{path}: needs the library datasets: pip install"):
        check_path(path, "data.train")


def test_codes_are_checked_with_the_model(tmp_path):
    """Whose VQGAN made them."""
    (tmp_path / "codes.json").touch()
    check_path(str(tmp_path), "data.train")
