"""Archives of a release, good and changed, and stand-ins for the disk and for progress bars."""

import io
import shutil
import tarfile
from pathlib import Path

from mindalle_jax.hub.unpack import FILES

CONTENT = {f"1.3B/{file}": f"content of {file}".encode() * 100 for file in FILES}
GOOD = [(name, data, {}) for name, data in CONTENT.items()]
FOLDERS = [("1.3B/", b"", {"type": tarfile.DIRTYPE}), ("1.3B/tokenizer", b"", {"type": tarfile.DIRTYPE})]


def tar_gz(entries, tar_format=tarfile.GNU_FORMAT) -> bytes:
    """entries: (name, data, fields of the TarInfo)"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tar_format) as tar:
        for name, data, fields in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def check_unpacked(folder):
    found = {f"1.3B/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == CONTENT


def left_behind(folder: Path) -> list[str]:
    """Everything below `folder` but the lock file, which stays by design."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".lock")


def free_disk(monkeypatch, free_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, free_bytes))


class Bars(list):
    """Stands for `progress`: records the bars, and interrupts when `done` reaches `interrupt_at` bytes."""

    interrupt_at = float("inf")

    def __call__(self, name, total_bytes, done_bytes=0):
        bar = Bar(self, name, total_bytes, done_bytes)
        self.append(bar)
        return bar


class Bar:
    def __init__(self, bars, name, total, n):
        self.bars, self.name, self.total, self.n = bars, name, total, n

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, amount):
        self.n += amount
        if self.n >= self.bars.interrupt_at:
            self.bars.interrupt_at = float("inf")
            raise KeyboardInterrupt
