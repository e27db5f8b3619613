"""The two layouts of a torch.save() file: a zip of records, and (before torch 1.6) pickles followed by records.

A container decodes the pickle of its file when it is made (`pickle`). `locate` returns the place of a storage in the
file. It refuses a storage that is outside of the file, or that has another size in the file.
"""

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import numpy as np

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.torch_pickle import MAX_PICKLE_BYTES, decode_pickle
from mindalle_jax.interop.torch_records import PlainPickle, StorageRef, describe

MAX_MEMBERS = 200_000  # of a zip
_READ_BYTES = 1 << 20  # fits the CPU cache, so the CRC pass does not go back to memory
LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # of a zip member: signature, flags, method, length of name, of padding
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class DamagedError(Exception):
    """The bytes of a file do not agree with its own description. The caller adds the file and the part."""


@dataclass(frozen=True)
class Extent:
    """A range of bytes in a file."""

    offset: int
    nbytes: int
    crc: int | None  # None if the file has no CRCs


def open_regular_file(path: str) -> BinaryIO:
    """Opens a file for reading. Raises CheckpointError if it is missing, not readable, or no regular file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path}: not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def what_it_is_instead(head: bytes) -> str:
    """Returns the end of a message that says what a file is, from its first bytes, if it is no torch checkpoint."""
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull`"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        return "looks like a web page, not a checkpoint: the download did not give the file"
    if head[8:9] == b"{":
        return "looks like a safetensors file, not a torch checkpoint"
    return f"is not a torch checkpoint (it starts with {head[:8]!r})"


def _read_exactly(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    file.seek(offset)
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise DamagedError("truncated")
    return data


def read_into(file: BinaryIO, extent: Extent, out: np.ndarray) -> None:
    """Fills `out`, uint8[extent.nbytes], directly from the file. Raises DamagedError for a wrong length or CRC.

    It does not use zipfile, which would copy the bytes twice, in small pieces.
    """
    file.seek(extent.offset)
    memory, crc = out.data, 0
    for start in range(0, extent.nbytes, _READ_BYTES):
        piece = memory[start : start + _READ_BYTES]
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise DamagedError("truncated")
        if extent.crc is not None:
            crc = zlib.crc32(piece, crc)
    if extent.crc is not None and crc != extent.crc:
        raise DamagedError("damaged: its CRC does not match")


class ZipContainer:
    """The zip layout. Only uncompressed members are read, so no member can be larger than the file."""

    def __init__(self, file: BinaryIO, path: str, size: int):
        self._file, self._path = file, path
        self._members = self._read_directory(size)
        # Without CRCs torch writes 0 for every member. One bit cannot turn a normal file into that.
        self._has_crcs = any(member.CRC for member in self._members.values())
        pickles = [name for name in self._members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            self._fail(f"{len(pickles)} members named data.pkl instead of one: not a file of torch.save")
        self._root = pickles[0].removesuffix("data.pkl")
        if self._root + "byteorder" in self._members and self._read_small("byteorder") != b"little":
            self._fail("was written on a big-endian machine, which is not supported")
        self.pickle: PlainPickle = decode_pickle(io.BytesIO(self._read_small("data.pkl")), f"{path}: data.pkl")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}")

    def _read_directory(self, size: int) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self._file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, OverflowError) as error:
            self._fail(f"truncated or damaged: {error}")
        if len(infos) > MAX_MEMBERS:
            self._fail(f"{len(infos)} zip members")
        members = {}
        for info in infos:
            if re.match(r"[^/]+/code/", info.filename):  # source of TorchScript, often compressed: never read
                continue
            if info.filename in members:
                self._fail(f"zip member {info.filename[:100]!r} appears twice")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                self._fail(f"zip member {info.filename[:100]!r} is compressed, which torch never does")
            if info.flag_bits & 1:
                self._fail(f"zip member {info.filename[:100]!r} is encrypted")
            if not 0 <= info.header_offset <= size - info.file_size:  # also offsets too large for a seek
                self._fail(f"truncated or damaged: zip member {info.filename[:100]!r} is outside of the file")
            members[info.filename] = info
        if sum(info.file_size for info in members.values()) > size:
            self._fail("truncated or damaged: its members are larger than the file")
        return members

    def _extent(self, info: zipfile.ZipInfo) -> Extent:
        """Returns the place of a member's data: after its local header, which repeats its name and has padding."""
        header = _read_exactly(self._file, info.header_offset, LOCAL_HEADER.size)
        signature, flags, method, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if signature != b"PK\x03\x04" or flags & 1 or method != zipfile.ZIP_STORED or name_bytes != len(name):
            raise DamagedError("damaged: its zip header does not match the directory")
        if _read_exactly(self._file, info.header_offset + len(header), name_bytes) != name:
            raise DamagedError("damaged: its zip header has another name than the directory")
        offset = info.header_offset + len(header) + name_bytes + extra_bytes
        return Extent(offset, info.file_size, info.CRC if self._has_crcs else None)

    def _read_small(self, name: str) -> bytes:
        info = self._members[self._root + name]
        if info.file_size > MAX_PICKLE_BYTES:
            self._fail(f"{name} of {info.file_size} bytes")
        out = np.empty(info.file_size, np.uint8)
        try:
            read_into(self._file, self._extent(info), out)
        except DamagedError as error:
            self._fail(f"{name}: {error}")
        return out.tobytes()

    def locate(self, storage: StorageRef) -> Extent:
        info = self._members.get(f"{self._root}data/{storage.key}")
        if info is None:
            raise DamagedError("missing from the file")
        if info.file_size != storage.record_bytes:
            raise DamagedError(f"has {info.file_size} bytes, the pickle says {storage.record_bytes}")
        return self._extent(info)


class LegacyContainer:
    """The layout before torch 1.6: pickles (magic, protocol, system, tree, keys), then length and data per key."""

    def __init__(self, file: BinaryIO, path: str, size: int):
        self._file, self._path = file, path
        file.seek(0)
        if decode_pickle(file, path).tree != _LEGACY_MAGIC:
            self._fail("is a bare pickle, not a file of torch.save")
        protocol = decode_pickle(file, path).tree
        if protocol != _LEGACY_PROTOCOL:
            self._fail(f"legacy protocol {describe(protocol)}, only {_LEGACY_PROTOCOL} is known")
        system = decode_pickle(file, path).tree
        if type(system) is not dict or system.get("little_endian") is not True:
            self._fail("was written on a big-endian machine, which is not supported")
        self.pickle: PlainPickle = decode_pickle(file, path)
        keys = decode_pickle(file, path).tree
        if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
            self._fail("its list of storages is damaged")
        self._extents = self._find_records(keys, size)

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}")

    def _find_records(self, keys: list[str], size: int) -> dict[str, Extent]:
        extents = {}
        position = self._file.tell()
        for key in keys:
            storage = self.pickle.storages.get(key)
            if storage is None:
                self._fail(f"storage {key[:80]!r} belongs to nothing in the pickle")
            try:
                (numel,) = struct.unpack("<q", _read_exactly(self._file, position, 8))
            except DamagedError:
                self._fail(f"truncated before storage {key}")
            if numel * storage.dtype.itemsize != storage.record_bytes:
                self._fail(f"storage {key} has {numel} elements, the pickle says {storage.record_bytes} bytes")
            extents[key] = Extent(position + 8, storage.record_bytes, crc=None)
            position += 8 + storage.record_bytes
            if position > size:
                self._fail(f"truncated in storage {key}")
        return extents

    def locate(self, storage: StorageRef) -> Extent:
        if storage.key not in self._extents:
            raise DamagedError("missing from the file")
        return self._extents[storage.key]
