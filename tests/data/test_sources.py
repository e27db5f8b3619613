"""data/sources.py: every format that people have, what is left out of it, and what they are told."""

import io
import json
import os
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.data.samples import Source
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError, UsageError


def picture(number: int = 0, extension: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), number * 7 % 256, np.uint8)).save(file, extension)
    return file.getvalue()


def fill(folder: Path, **files: str | bytes | None) -> Path:
    """Files by name (a__b is a/b, _jpg is .jpg); None is a picture."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = picture(number) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(source: Source) -> dict[str, list[str]]:
    return {sample.id: list(sample.captions) for sample in source.samples}


def labels(source: Source) -> dict[str, int | None]:
    return {sample.id: sample.label for sample in source.samples}


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
        "1 captions without a picture (first: 'd.txt')"
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
        DataError, match="has classes that the training data has not: d; the training data has 3: a, b, c"
    ):
        open_source(tmp_path / "val", "class", classes=classes)


def test_no_class_folders(tmp_path):
    fill(tmp_path, a_jpg=None)
    with pytest.raises(DataError, match="holds no folders; the task 'class' needs one folder of pictures a class"):
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
        "lines whose file_name leads out of the folder": 2,
        "lines whose picture is missing": 1,
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


# Tars


def write_tar(path: Path, members: dict[str, bytes | str | tarfile.TarInfo], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars(tmp_path, form):
    """Captions from key.txt or key.json, labels from key.cls or key.json; long and foreign names."""
    long = "d" * 90 + "/" + "k" * 60
    members = {
        "x/1.txt": "a cat\na small cat",
        "x/1.jpg": picture(1),
        f"./{long}.jpg": picture(2),
        f"./{long}.json": json.dumps({"caption": "a dog", "label": 4, "url": "..."}),
        "3.cls": "2\n",
        "3.PNG": picture(3, "PNG"),
        "3.json": json.dumps({"text": ["a fish", "fishes"]}),
        "東.webp": picture(4, "WEBP"),
        "4.seg.png": picture(5, "PNG"),
    }
    file = write_tar(tmp_path / "a.tar", members, format=form)
    source = open_source(file, "text")
    assert captions(source) == {
        "a.tar/x/1.jpg": ["a cat", "a small cat"],
        f"a.tar/{long}.jpg": ["a dog"],
        "a.tar/3.png": ["a fish", "fishes"],
    }
    assert [sample.image.read() for sample in source.samples] == [picture(1), picture(2), picture(3, "PNG")]
    assert labels(open_source(file, "class")) == {f"a.tar/{long}.jpg": 4, "a.tar/3.png": 2}
    assert len(open_source(file, "unconditional")) == 4
    assert dict(source.report.dropped) == {"without a caption": 1, "members without a picture": 1}


def test_folders_and_patterns_of_tars(tmp_path):
    for shard in range(12):
        write_tar(tmp_path / f"cc-{shard:02}.tar", {f"{shard}.jpg": picture(shard), f"{shard}.txt": f"caption {shard}"})
    (tmp_path / "sizes.json").write_text("{}")
    assert len(open_source(tmp_path, "text")) == 12
    assert len(open_source(f"{tmp_path}/cc-{{00..11}}.tar", "text")) == 12
    assert list(captions(open_source(f"{tmp_path}/cc-{{09..10}}.tar", "text"))) == [
        "cc-09.tar/9.jpg",
        "cc-10.tar/10.jpg",
    ]
    assert len(open_source(f"{tmp_path}/cc-{{00,0{{3..4}}}}.tar", "text")) == 3
    assert len(open_source(f"{tmp_path}/cc-0*.tar", "text")) == 10
    with pytest.raises(DataError, match=r"no .tar fits .*cc-12.tar \(2 of 4 patterns fit none\)"):
        open_source(f"{tmp_path}/cc-{{10..13}}.tar", "text")


def test_hostile_members_are_left_alone(tmp_path):
    members = {
        "a.jpg": picture(),
        "a.txt": "a cat",
        "link.jpg": link(tarfile.SYMTYPE),
        "hard.jpg": link(tarfile.LNKTYPE),
        "pipe.jpg": link(tarfile.FIFOTYPE),
        "../up.jpg": picture(),
        "/root.jpg": picture(),
        "b.jpg": picture(),
        "b.txt": b"\xff",
        "c.jpg": picture(),
        "c.json": "[" * 10_000,
        "d.jpg": picture(),
        "d.txt": "x" * 70_000,
        "e.jpg": picture(),
        "e.cls": "cat",
    }
    source = open_source(write_tar(tmp_path / "a.tar", members), "text")
    assert captions(source) == {"a.tar/a.jpg": ["a cat"]}
    assert dict(source.report.dropped) == {
        "members of a tar that are no regular files": 3,
        "members of a tar whose name leads out of it": 2,
        "with a caption or label that cannot be read": 4,
    }


def test_a_name_that_is_there_twice(tmp_path):
    first, second = write_tar(tmp_path / "1", {"a.jpg": picture(1)}), write_tar(tmp_path / "2", {"a.jpg": picture(2)})
    # The end of an archive is 1,024 zeros, and then padding.
    (tmp_path / "a.tar").write_bytes(first.read_bytes().rstrip(b"\0").ljust(1536, b"\0") + second.read_bytes())
    source = open_source(tmp_path / "a.tar", "unconditional")
    assert source[0].image.read() == picture(1)
    assert source.report.dropped["members of a tar with the same name"] == 1


@pytest.mark.parametrize("lost", [1, 600, 5_632, 11_000])
def test_truncated_tar(tmp_path, lost):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": random.Random(i).randbytes(5_000) for i in range(4)})
    used = 4 * (512 + 5_120)
    path.write_bytes(path.read_bytes()[: used - lost])
    with pytest.raises(DataError, match="a.tar: not an uncompressed tar, or damaged: .*truncated"):
        open_source(path, "unconditional")


def test_a_damaged_header_does_not_end_a_tar_early(tmp_path):
    """tarfile takes it for the end, and half of the samples would be gone."""
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": picture(i) for i in range(4)})
    data = bytearray(path.read_bytes())
    data[data.index(b"2.jpg")] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.tar: .*no member and no end at byte"):
        open_source(path, "unconditional")


def test_no_tar(tmp_path):
    for name, content in {"page.tar": b"<html>" * 200, "empty.tar": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: not an uncompressed tar, or damaged"):
            open_source(tmp_path / name, "text")
    path = write_tar(tmp_path / "a.tar", {"a.jpg": picture()})
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(path, "a.jpg")
    with pytest.raises(DataError, match="is it truncated, or compressed"):
        open_source(tmp_path / "b.tar", "text")
    (tmp_path / "b.tar").rename(tmp_path / "c.tar.gz")
    with pytest.raises(DataError, match="c.tar.gz: is neither a folder nor a .tar; .*uncompressed tars"):
        open_source(tmp_path / "c.tar.gz", "text")


def test_a_huge_extension_header_is_not_read(tmp_path):
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match="extension header of 8589934592 bytes"):
        open_source(tmp_path / "a.tar", "text")


# Opening and fingerprints


def test_no_such_path_and_no_such_task(tmp_path):
    with pytest.raises(
        DataError, match="gone: does not exist; pictures are read from folders and from uncompressed tars"
    ):
        open_source(tmp_path / "gone", "text")
    with pytest.raises(UsageError, match="task must be one of text, class, unconditional, not 'txt'"):
        open_source(tmp_path, "txt")


def test_saved_datasets_need_the_library(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'mindalle-jax\[datasets\]'"):
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
    with pytest.raises(DataError, match="has no column 'image' of pictures, only caption"):
        open_source(tmp_path / "text", "text")


@pytest.mark.parametrize("format", ["folder", "metadata", "tar"])
def test_another_data_set_has_another_fingerprint(tmp_path, format):
    def build(name: str, **changes: str | bytes | None) -> str:
        files = {"a.jpg": picture(1), "a.txt": "a cat", "b.jpg": picture(2), "b.txt": "a dog"} | changes
        files = {key: content for key, content in files.items() if content is not None}
        if format == "tar":
            return open_source(write_tar(tmp_path / name / "a.tar", files), "text").fingerprint()
        (tmp_path / name).mkdir()
        rows = []
        for key, content in files.items():
            if format == "metadata" and key.endswith(".txt"):
                rows.append(json.dumps({"file_name": key.replace(".txt", ".jpg"), "text": content}))
            else:
                (tmp_path / name / key).write_bytes(content.encode() if isinstance(content, str) else content)
        if rows:
            (tmp_path / name / "metadata.jsonl").write_text("\n".join(rows))
        return open_source(tmp_path / name, "text").fingerprint()

    same = build("1")
    assert build("2") == same, "the place on the disk is no part of it"
    others = [
        build("3", **{"b.txt": "a dig"}),
        build("4", **{"b.jpg": picture(2) + b"\0"}),
        build("5", **{"b.jpg": None, "b.txt": None}),
        build("6", **{"c.jpg": picture(3), "c.txt": "a fish"}),
    ]
    assert len({same, *others}) == 5
