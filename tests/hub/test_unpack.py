"""hub/unpack.py: a good archive becomes a folder, any other leaves nothing behind."""

import gzip
import os
import tarfile

import pytest
from archives import CONTENT, FOLDERS, GOOD, check_unpacked, flipped, free_disk, left_behind, tar_gz

from mindalle_jax.errors import CheckpointError, OutputError
from mindalle_jax.hub import unpack as unpack_module
from mindalle_jax.hub.unpack import FILES, unpack


def one(**fields):
    """The good archive with its first member changed."""
    name, data, _ = GOOD[0]
    return tar_gz([(fields.pop("name", name), fields.pop("data", data), fields), *GOOD[1:]])


def header(tar_type=tarfile.REGTYPE, name="1.3B/config.yaml", size=0) -> bytes:
    """One 512-byte header; its checksum is right whatever it says."""
    member = tarfile.TarInfo(name)
    member.type, member.size = tar_type, size
    return member.tobuf(tarfile.GNU_FORMAT)


def pax_sparse() -> bytes:
    """A file said to be 1 TB of holes."""
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.3B/config.yaml"}
    pax["GNU.sparse.realsize"] = str(10**12)
    map_block = b"0\n".ljust(512, b"\0")
    return tar_gz([("1.3B/x", map_block, {"pax_headers": pax}), *GOOD[1:]], tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    "archive",
    [
        tar_gz(FOLDERS + GOOD),
        tar_gz(GOOD[::-1], tarfile.PAX_FORMAT),
        tar_gz(GOOD, tarfile.USTAR_FORMAT),
        tar_gz(
            [("./", b"", {"type": tarfile.DIRTYPE})] + [("./" + name, data, kw) for name, data, kw in FOLDERS + GOOD]
        ),
        one(type=tarfile.AREGTYPE),
        gzip.compress(gzip.decompress(tar_gz(GOOD))[:700]) + gzip.compress(gzip.decompress(tar_gz(GOOD))[700:]),
    ],
    ids=["gnu", "pax", "ustar", "dot-slash", "old-type", "two-gzip-members"],
)
def test_good_archives(tmp_path, archive, bars):
    (tmp_path / "a.tar.gz").write_bytes(archive)
    unpack(tmp_path / "a.tar.gz", tmp_path / "new" / "model", root="1.3B")
    check_unpacked(tmp_path / "new" / "model")
    assert left_behind(tmp_path / "new")[0] == "model" and len(left_behind(tmp_path / "new")) == 1 + 1 + len(FILES)
    assert bars[0].n == bars[0].total == len(archive)


def test_modes_in_the_archive_do_not_count(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(one(mode=0o4777))
    umask = os.umask(0o027)
    try:
        unpack(tmp_path / "a.tar.gz", tmp_path / "model", root="1.3B")
    finally:
        os.umask(umask)
    modes = {p.name: oct(p.stat().st_mode & 0o7777) for p in (tmp_path / "model", tmp_path / "model" / "config.yaml")}
    assert modes == {"model": "0o750", "config.yaml": "0o640"}


HOSTILE = {
    "upward": (one(name="1.3B/../../evil"), r"unexpected member '1\.3B/\.\./\.\./evil'; allowed: 1\.3B/config\.yaml, "),
    "upward-to-a-good-name": (one(name="1.3B/tokenizer/../config.yaml"), "unexpected member"),
    "absolute": (one(name="/etc/evil"), "unexpected member '/etc/evil'"),
    "absolute-good-name": (one(name="/1.3B/config.yaml"), "unexpected member '/1.3B"),
    "twice-dot-slash": (one(name="././1.3B/config.yaml"), "unexpected member"),
    "no-root": (one(name="config.yaml"), "unexpected member 'config.yaml'"),
    "other-root": (one(name="2.0B/config.yaml"), "unexpected member '2.0B"),
    "unknown": (tar_gz([*GOOD, ("1.3B/run.sh", b"x", {})]), "unexpected member '1.3B/run.sh'"),
    "unknown-folder": (tar_gz([("1.3B/.git", b"", {"type": tarfile.DIRTYPE})]), "unexpected member '1.3B/.git'"),
    "escape-codes": (one(name="1.3B/\x1b[2Jx"), r"unexpected member '1\.3B/\\x1b\[2Jx'"),
    "newline": (one(name="1.3B/config.yaml\n"), r"unexpected member '1\.3B/config\.yaml\\n'"),
    "case": (one(name="1.3b/CONFIG.yaml"), "unexpected member"),
    "long-name": (one(name="1.3B/" + "x" * 5000), "unexpected member '1.3B/x{60,80};"),
    "symlink": (one(type=tarfile.SYMTYPE, linkname="/etc/passwd", data=b""), r"config\.yaml is not a regular file"),
    "symlinked-root": (
        tar_gz([("1.3B", b"", {"type": tarfile.SYMTYPE, "linkname": "/tmp"}), *GOOD]),
        "unexpected member",
    ),
    "hardlink": (one(type=tarfile.LNKTYPE, linkname="../../x", data=b""), "not a regular file .tar type b'1'"),
    "fifo": (one(type=tarfile.FIFOTYPE, data=b""), "not a regular file .tar type b'6'"),
    "character-device": (one(type=tarfile.CHRTYPE, data=b""), "not a regular file .tar type b'3'"),
    "block-device": (one(type=tarfile.BLKTYPE, data=b""), "not a regular file .tar type b'4'"),
    "contiguous": (one(type=tarfile.CONTTYPE), "not a regular file .tar type b'7'"),
    "unknown-type": (one(type=b"Z"), "not a regular file .tar type b'Z'"),
    "folder-for-a-file": (one(type=tarfile.DIRTYPE, data=b""), "not a regular file .tar type b'5'"),
    "sparse": (one(type=tarfile.GNUTYPE_SPARSE), "not a regular file"),
    "pax-sparse": (pax_sparse(), "config.yaml is not a regular file"),
    "twice": (tar_gz(GOOD + GOOD), r"1\.3B/config\.yaml appears twice"),
    "twice-under-two-names": (tar_gz([*GOOD, ("./" + GOOD[0][0], b"", {})]), "config.yaml appears twice"),
    "many-folders": (tar_gz(FOLDERS * 40), "more than 64 members"),
    "size-without-data": (gzip.compress(header(size=10_000_000)), "damaged: unexpected end of data"),
    "size-of-terabytes": (gzip.compress(header(size=10**13)), r"would unpack to 10000\.0 GB or more"),
    "negative-size": (gzip.compress(header(size=-512) + bytes(2048)), "would unpack to|invalid header|damaged"),
    "huge-pax-header": (
        gzip.compress(header(b"x", size=10**10) + bytes(4096)),
        "extension header of 10000000000 bytes",
    ),
    "huge-long-name": (gzip.compress(header(b"L", size=10**10) + bytes(4096)), "extension header of 10000000000 bytes"),
    "chain-of-headers": (gzip.compress((header(b"g", size=512) + b"6 a=b\n".ljust(512, b"\0")) * 5000), "damaged: "),
    "data-after-the-end": (tar_gz(GOOD) + gzip.compress(bytes(3 << 20)), "more data after the end"),
    "html": (b"<html>not found</html>", "not a tar.gz, or damaged: Not a gzipped file"),
    "empty": (b"", "not a tar.gz, or damaged: empty file"),
    "gzip-of-nothing": (gzip.compress(b""), "not a tar.gz, or damaged: empty file"),
    "gzip-of-text": (gzip.compress(b"hello" * 1000), "not a tar.gz, or damaged: "),
    "plain-tar": (gzip.decompress(tar_gz(GOOD)), "Not a gzipped file"),
    "truncated": (tar_gz(GOOD)[:200], "not a tar.gz, or damaged: Compressed file ended before the end-of-stream"),
    "truncated-tar": (gzip.compress(gzip.decompress(tar_gz(GOOD))[:700]), "damaged: unexpected end of data"),
    "last-byte-missing": (tar_gz(GOOD)[:-1], "Compressed file ended before the end-of-stream"),
    "wrong-crc": (flipped(tar_gz(GOOD), -8), "damaged: CRC check failed"),
    "damaged-start": (tar_gz(GOOD)[:10] + b"\xff" * 100, "damaged: zlib error: Error -3 while decompressing"),
    "damaged-middle": (
        gzip.compress(header(size=3 << 20) + bytes(2 << 20)) + gzip.compress(b"")[:10] + b"\xff" * 100,
        "damaged: Error -3 while decompressing data",
    ),
    "flipped-bit": (flipped(tar_gz(GOOD), 150), "damaged: "),
    "missing-files": (
        tar_gz(GOOD[2:]),
        r"not in the archive: 1\.3B/config\.yaml, 1\.3B/tokenizer/bpe-16k-vocab\.json$",
    ),
    "nothing": (tar_gz([]), r"not in the archive: 1\.3B/config\.yaml, .*stage2_last\.ckpt$"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_leave_nothing_behind(tmp_path, case):
    archive, message = HOSTILE[case]
    (tmp_path / "a.tar.gz").write_bytes(archive)
    (tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError, match=message) as error:
        unpack(tmp_path / "a.tar.gz", tmp_path / "in" / "model", root="1.3B")
    assert str(error.value).startswith(f"{tmp_path / 'a.tar.gz'}: ") and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "in"] and os.listdir(tmp_path / "in") == []


def test_budget_counts_all_members(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack_module, "MAX_UNPACKED_BYTES", sum(map(len, CONTENT.values())) - 1)
    (tmp_path / "a.tar.gz").write_bytes(tar_gz(GOOD))
    with pytest.raises(CheckpointError, match=r"stage2_last\.ckpt would unpack to 0\.0 GB or more"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "model", root="1.3B")
    assert left_behind(tmp_path) == ["a.tar.gz"]


def test_interrupted_unpacking_leaves_nothing(tmp_path, bars):
    (tmp_path / "a.tar.gz").write_bytes(tar_gz(GOOD))
    bars.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "a.tar.gz", tmp_path / "model", root="1.3B")
    assert left_behind(tmp_path) == ["a.tar.gz"]


def test_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(tar_gz(GOOD))
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("model", "link"):
        with pytest.raises(OutputError, match=f"{name} exists already; remove it or choose another folder"):
            unpack(tmp_path / "a.tar.gz", tmp_path / name, root="1.3B")
    assert left_behind(tmp_path) == ["a.tar.gz", "link", "model"]


def test_full_disk_is_noticed_before_unpacking_a_member(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(tar_gz(GOOD))
    free_disk(monkeypatch, 10)
    with pytest.raises(OutputError, match=r"unpacking 1\.3B/config\.yaml needs 0\.0 GB under .* 0\.0 GB are free"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "model", root="1.3B")
    assert left_behind(tmp_path) == ["a.tar.gz"]


def test_archive_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="a.tar.gz: .*No such file"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "model", root="1.3B")
    assert left_behind(tmp_path) == []
