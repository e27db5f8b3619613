"""data/tars.py: members of tars by their place in the file; damaged and hostile ones are found."""

import json
import random
import tarfile

import pytest
from image_folders import captions, labels, picture, write_tar

from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError


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
    assert len(open_source(file, "unconditional")) == 5  # 4.seg.png too: the part after the last dot says what it is
    assert dict(source.report.dropped) == {"without a caption": 2}


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
    with pytest.raises(DataError, match=r"no .tar matches .*cc-12.tar \(2 of 4 patterns match none\)"):
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
        "members of a tar whose name points outside it": 2,
        "with a caption or label that cannot be read": 3,
        "without a caption": 1,  # its label is the name of a class
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
    with pytest.raises(DataError, match="c.tar.gz: .tar.gz files are not read; unpack it: gunzip -k .*c.tar.gz"):
        open_source(tmp_path / "c.tar.gz", "text")


def test_a_huge_extension_header_is_not_read(tmp_path):
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(DataError, match="extension header of 8589934592 bytes"):
        open_source(tmp_path / "a.tar", "text")
