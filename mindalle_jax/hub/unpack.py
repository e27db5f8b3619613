"""Unpacks a published tar.gz without trusting it: only regular files with known names, checked to the last byte."""

import gzip
import io
import os
import secrets
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from mindalle_jax.errors import CheckpointError, MindalleError, OutputError
from mindalle_jax.storage.files import (
    MAX_EXTENSION_BYTES,
    BoundedHeader,
    check_free_disk,
    disk_errors,
    reason,
    write_all,
)

FILES = (
    "config.yaml",
    "tokenizer/bpe-16k-vocab.json",
    "tokenizer/bpe-16k-merges.txt",
    "stage1_last.ckpt",
    "stage2_last.ckpt",
)
"""The files of a release. An unpacked release has all of them and no other file."""
CHUNK_BYTES = 1 << 20
MAX_UNPACKED_BYTES = 16 << 30
MAX_MEMBERS = 64
LARGER_CACHE = "set MINDALLE_CACHE to a folder on a larger disk"
"""Advice for a full cache."""


def unpack(archive: Path, folder: Path, *, root: str) -> None:
    """Copies the FILES below `root`/ of a tar.gz to `folder`, which must not exist. It appears only when complete.

    Only regular files with exactly these names are written. Links, devices, other names, duplicates and more than
    MAX_UNPACKED_BYTES are refused. Raises CheckpointError if the archive is damaged, refused or incomplete, and
    OutputError if `folder` exists or cannot be written.
    """
    if os.path.lexists(folder):
        raise OutputError(f"{folder} exists already; remove it or choose another folder")
    temporary = folder.with_name(f".{folder.name}.unpack-{secrets.token_hex(4)}")
    try:
        with disk_errors(temporary):
            (temporary / "tokenizer").mkdir(parents=True)
        # gzip.open, because tarfile's own "r|gz" ignores the checksum at the end of a gzip file.
        with open(archive, "rb") as raw, gzip.open(raw) as stream:
            _copy_members(archive, raw, stream, temporary, root)
        with disk_errors(folder):
            os.rename(temporary, folder)
    except MindalleError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise CheckpointError(f"{archive}: not a tar.gz, or damaged: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # After the rename it does not exist.


def progress(name: str, total_bytes: int, done_bytes: int = 0) -> tqdm:
    """Returns a progress bar, which shows only on a terminal. total_bytes: negative if it is unknown."""
    total = None if total_bytes < 0 else total_bytes
    return tqdm(desc=name, total=total, initial=done_bytes, unit="B", unit_scale=True, disable=None)


def _copy_members(archive: Path, raw: BinaryIO, stream: gzip.GzipFile, folder: Path, root: str) -> None:
    """Writes the members to `folder`; `raw` is the file below `stream`, for the progress in compressed bytes."""
    wanted = {f"{root}/{file}": folder / file for file in FILES}
    seen, total_bytes = set(), 0
    size = os.fstat(raw.fileno()).st_size
    with (
        tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK_BYTES, tarinfo=BoundedHeader) as tar,
        progress(f"unpacking {archive.name}", size) as bar,
    ):
        for count, member in enumerate(tar):
            name = member.name.removeprefix("./")
            total_bytes += member.size
            if count >= MAX_MEMBERS:
                raise CheckpointError(f"{archive}: more than {MAX_MEMBERS} members")
            if member.isdir() and name in (".", root, f"{root}/tokenizer"):
                continue
            if name not in wanted:
                raise CheckpointError(f"{archive}: unexpected member {member.name!r:.80}; allowed: {', '.join(wanted)}")
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise CheckpointError(f"{archive}: {name} is not a regular file (tar type {member.type!r})")
            if name in seen:
                raise CheckpointError(f"{archive}: {name} appears twice")
            if member.size < 0 or total_bytes > MAX_UNPACKED_BYTES:
                raise CheckpointError(f"{archive}: {name} would unpack to {total_bytes / 1e9:.1f} GB or more")
            seen.add(name)
            check_free_disk(folder, member.size, f"unpacking {name}", LARGER_CACHE)
            with _create(wanted[name]) as file:
                source = tar.extractfile(member)  # Never None for a regular file; raises if the data is truncated.
                while source and (block := source.read(CHUNK_BYTES)):
                    write_all(file, block)
                    bar.update(raw.tell() - bar.n)
                with disk_errors(wanted[name]):
                    os.fsync(file.fileno())
        if len(stream.read(MAX_EXTENSION_BYTES + 1)) > MAX_EXTENSION_BYTES:  # Reading to the end checks the CRC.
            raise CheckpointError(f"{archive}: more data after the end of the archive")
    if missing := [name for name in wanted if name not in seen]:
        raise CheckpointError(f"{archive}: not in the archive: {', '.join(missing)}")


def _create(path: Path) -> io.FileIO:
    """Makes a new file, never through a link. It is unbuffered, so close() has nothing left to write."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)  # not on Windows
    with disk_errors(path):
        return io.FileIO(path, "w", opener=lambda name, _: os.open(name, flags, 0o666))
