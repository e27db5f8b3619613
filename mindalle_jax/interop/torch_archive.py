"""Reads and writes torch.save() files without torch and without unpickling.

    with TorchArchive("last.ckpt") as archive:
        for key, ref in archive.state_dict().items():
            weights = archive.read(ref)  # numpy, bit-exact, one tensor in memory at a time

A torch file is a pickle that describes tensors, plus their bytes as data records. Two layouts exist, and
torch_containers.py reads both. The zip layout (torch >= 1.6) has a member `<root>/data.pkl`, and per record one member
`<root>/data/<key>`, uncompressed. An archive of TorchScript has this layout too; its source text is not read. The
legacy layout is five pickles followed by the records. One parser (torch_pickle.py) both checks and reads a file. There
is no separate scan that a file could mislead.

Zip members have a CRC, so a flipped bit is refused. Legacy files, and files saved under
`torch.serialization.set_crc32_options(False)`, have none. In those, damage to the numbers is not detected.
"""

import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from mindalle_jax.errors import CheckpointError, MindalleError, OutputError
from mindalle_jax.interop.torch_containers import (
    LOCAL_HEADER,
    DamagedError,
    LegacyContainer,
    ZipContainer,
    open_regular_file,
    read_into,
    what_it_is_instead,
)
from mindalle_jax.interop.torch_pickle import MAX_KEY_LENGTH
from mindalle_jax.interop.torch_records import STORAGE_DTYPES, ScriptModule, TensorRef, describe
from mindalle_jax.storage.files import SYNC_BYTES, to_disk

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Names under which trainings save the weights, beside the optimizer and more; the first that is there counts."""
PREFIXES = ("module.", "_forward_module.", "_orig_mod.", "model.")
"""Beginnings of all keys of a module that DistributedDataParallel, AveragedModel, Fabric, torch.compile or another
module has wrapped."""
MAX_NESTING = 64  # of a state dict
MAX_ENTRIES = 200_000  # of a state dict, because dicts that share members can have very many entries
# A tensor may be larger than its bytes in the file (stride 0 repeats them), but a small file must not fill the memory.
MAX_EXPANSION = 4
MIN_EXPANDED_BYTES = 1 << 20

_ALIGNMENT = 64  # of data records, as torch does, for its mmap=True


def _unwrapped(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Returns the tensors by the keys of the module that was wrapped, see PREFIXES."""
    for _ in range(8):
        # The number of averaged states, which torch.optim.swa_utils.AveragedModel has beside its module.
        others = [key for key in tensors if key != "n_averaged"]
        prefix = next((one for one in PREFIXES if others and all(key.startswith(one) for key in others)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): tensors[key] for key in others}
    return tensors


class TorchArchive:
    """An open torch.save() file. `tree` is its content as plain data with TensorRef leaves (see torch_pickle.py).

    Every failure raises CheckpointError, with one line that names the file and the reason.
    """

    tree: Any

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._file = open_regular_file(self.path)
        # The bytes of the storage that was read last, kept while other tensors may still need them.
        self._shared_key: str | None = None
        self._shared_bytes: np.ndarray | None = None
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            head = self._file.read(512)
            if head.startswith(b"PK\x03\x04"):
                self._container = ZipContainer(self._file, self.path, self._size)
            elif head.startswith(b"\x80"):
                self._container = LegacyContainer(self._file, self.path, self._size)
            else:
                raise CheckpointError(f"{self.path}: {what_it_is_instead(head)}")
        except OSError as error:
            self._file.close()
            raise CheckpointError(f"{self.path}: {error.strerror or error}") from None
        except BaseException:
            self._file.close()
            raise
        self.tree = self._container.pickle.tree

    def __enter__(self) -> "TorchArchive":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._shared_key = self._shared_bytes = None
        self._file.close()

    def state_dict(self) -> dict[str, TensorRef]:
        """Returns the tensors by dotted key: of the dict that holds the weights if the file has one (WRAPPERS), else of
        the top level.

        Other data beside it, which a training framework saved, is ignored. Inside it, anything but a tensor raises
        CheckpointError. For a TorchScript module its parameters, buffers and other tensors are returned, and all other
        attributes are ignored. Beginnings that all keys have because a module was wrapped (PREFIXES) are left out.
        """
        root = self._weights()
        if type(root) not in (dict, ScriptModule):
            raise CheckpointError(f"{self.path}: holds {describe(root)} where a dict of tensors should be")
        tensors: dict[str, TensorRef] = {}
        for entries, (key, value) in enumerate(self._flatten(root)):
            if entries >= MAX_ENTRIES:
                raise CheckpointError(f"{self.path}: more than {MAX_ENTRIES} entries")
            if key in tensors:
                raise CheckpointError(f"{self.path}: {key[:120]}: appears twice")
            if type(value) is TensorRef:
                tensors[key] = value
            elif type(root) is dict and type(value) is not dict:
                raise CheckpointError(f"{self.path}: {key[:120]}: {describe(value)}, not a tensor{self._shape(root)}")
        if not tensors:
            raise CheckpointError(f"{self.path}: holds no tensors{self._shape(root)}")
        return _unwrapped(tensors)

    def _weights(self) -> Any:
        """Returns the part of the tree that holds the weights: below at most three WRAPPERS."""
        root = self.tree
        for _ in range(3):
            if type(root) is not dict:
                break
            # Among tensors "model" is a module of that name, whose keys are model.x.
            names = WRAPPERS[:1] if any(type(value) is TensorRef for value in root.values()) else WRAPPERS
            found = {name: root[name] for name in names if name in root}
            inner = next((part for name, part in found.items() if name == WRAPPERS[0] or type(part) is dict), None)
            if inner is None:
                break
            root = inner
        return root

    def _shape(self, root: Any) -> str:
        """Returns the end of a message, which describes the file if it is a dict of several things."""
        names = [name for name in self.tree if type(name) is str] if type(self.tree) is dict else []
        if root is not self.tree or not names or any(type(value) is TensorRef for value in self.tree.values()):
            return ""
        shown = ", ".join(name[:40] for name in names[:8] if name.isprintable()) + (", ..." if names[8:] else "")
        return f"; the file is a dict with {shown}, and the weights are looked for in {', '.join(WRAPPERS)}"

    def _flatten(self, node: Any, prefix: str = "", depth: int = 1) -> Iterable[tuple[str, Any]]:
        """Yields every entry below `node` with its dotted key, also inner dicts (of a ScriptModule: inner modules)."""
        if depth > MAX_NESTING:
            raise CheckpointError(f"{self.path}: {prefix[:120]}: nested deeper than {MAX_NESTING}")
        for name, value in (node.attributes if type(node) is ScriptModule else node).items():
            if type(name) not in (str, int) or not str(name).isprintable():
                raise CheckpointError(f"{self.path}: {prefix[:120]}{describe(name)} as a key")
            key = f"{prefix}{name}"
            if len(key) > MAX_KEY_LENGTH:
                raise CheckpointError(f"{self.path}: {key[:120]}...: a key of more than {MAX_KEY_LENGTH} characters")
            yield key, value
            if type(value) is type(node):
                yield from self._flatten(value, f"{key}.", depth + 1)

    def read(self, ref: TensorRef) -> np.ndarray:
        """Reads a tensor bit by bit; returns a contiguous array of `ref.dtype` and `ref.shape` that owns its data.

        Raises CheckpointError if the record is missing, damaged, or much larger than the file.
        """
        # max(d, 1): numpy rejects an empty array if its other dimensions overflow, so they count here too.
        nbytes = math.prod(max(size, 1) for size in ref.shape) * ref.dtype.itemsize
        if nbytes > max(MAX_EXPANSION * self._size, MIN_EXPANDED_BYTES):
            raise CheckpointError(f"{self.path}: a tensor of {nbytes} bytes in a file of {self._size}")
        try:
            return self._read(ref)
        except (OSError, DamagedError) as error:
            raise CheckpointError(f"{self.path}: storage {ref.storage.key}: {error}") from None

    def _read(self, ref: TensorRef) -> np.ndarray:
        key = ref.storage.key
        extent = self._container.locate(ref.storage)  # checks that the file has these bytes, before memory is allocated
        if key != self._shared_key:
            self._shared_key = self._shared_bytes = None
        is_shared = self._container.pickle.tensors_per_storage[key] > 1
        if not is_shared and _is_whole(ref):
            out = np.empty(ref.shape, ref.dtype)
            read_into(self._file, extent, _as_bytes(out))
            return out
        record = self._shared_bytes
        if record is None:
            record = np.empty(extent.nbytes, np.uint8)
            read_into(self._file, extent, record)
            if is_shared:
                self._shared_key, self._shared_bytes = key, record
        return _cut(record, ref)


def _is_whole(ref: TensorRef) -> bool:
    """Returns whether the bytes of the tensor, in order, are the complete record. Then its offset is 0."""
    nbytes = math.prod(ref.shape) * ref.dtype.itemsize
    return nbytes == ref.storage.record_bytes and ref.strides == contiguous_strides(ref.shape)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns strides in elements, as torch counts them: (2, 3, 4) -> (12, 4, 1), and (2, 0, 4) -> (4, 4, 1)."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Returns a view uint8[nbytes] of a contiguous array."""
    return array.reshape(-1).view(np.uint8)


def _cut(record: np.ndarray, ref: TensorRef) -> np.ndarray:
    """Returns a copy of the tensor inside its record. It is in range: its extent was checked when `ref` was made."""
    if 0 in ref.shape:
        return np.empty(ref.shape, ref.dtype)
    itemsize = ref.dtype.itemsize
    # The stride of a dimension of 1 is never used. It may be any number, also one that overflows.
    strides = tuple(stride * itemsize if size > 1 else 0 for size, stride in zip(ref.shape, ref.strides, strict=True))
    start = ref.storage.start + ref.offset * itemsize
    return np.array(np.ndarray(ref.shape, ref.dtype, record.data, start, strides), order="C")


# Writing

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "UntypedStorage"}


def write_torch_archive(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes {"state_dict": {name: tensor}} as a file for torch.load(), which may use weights_only and mmap.

    tensors: (name, dtype, shape) of each tensor. read: is called with each name once, in order, so only one tensor is
    in memory. Raises CheckpointError for dtypes that torch does not have, and OutputError if the file exists or cannot
    be written. An incomplete file stays; the caller knows whether its name is a temporary one.
    """
    path, specs = os.fspath(path), [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in tensors]
    for name, dtype, _ in specs:
        if dtype not in _STORAGE_NAMES:
            supported = ", ".join(str(known) for known in _STORAGE_NAMES)
            raise CheckpointError(f"{path}: {name}: cannot write {dtype}, only {supported}")
    if len({name for name, _, _ in specs}) != len(specs):
        raise CheckpointError(f"{path}: two tensors have the same name")
    try:
        with open(path, "xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                _add_member(archive, file, "data.pkl", _encode_pickle(specs))
                _add_member(archive, file, "byteorder", b"little")
                for key, (name, dtype, shape) in enumerate(specs):
                    before, where = file.tell(), f"{path}: {name}"
                    # No variable holds the tensor, else it would stay in memory while read() makes the next one.
                    _add_member(archive, file, f"data/{key}", _checked_bytes(read(name), where, dtype, shape))
                    if before // SYNC_BYTES != file.tell() // SYNC_BYTES:
                        to_disk(file)
                _add_member(archive, file, "version", b"3\n")
            to_disk(file)
    except OSError as error:
        if isinstance(error, MindalleError):  # from read()
            raise
        raise OutputError(f"{path}: {error.strerror or error}") from error


def _checked_bytes(array: np.ndarray, where: str, dtype: np.dtype, shape: tuple[int, ...]) -> memoryview:
    if array.dtype != dtype or array.shape != shape:
        raise CheckpointError(f"{where}: {array.dtype}{array.shape} instead of {dtype}{shape}")
    return _as_bytes(np.ascontiguousarray(array)).data


def _add_member(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: bytes | memoryview) -> None:
    """Stores `data`, aligned by a padding field in the local header: id "FB", its length, then the padding."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = memoryview(data).nbytes
    is_zip64 = info.file_size > zipfile.ZIP64_LIMIT // 2  # zipfile would do so by itself from about 0.95 of the limit
    zip64_field_bytes = 20 if is_zip64 else 0
    header_bytes = LOCAL_HEADER.size + len(info.filename) + 4 + zip64_field_bytes
    padding = -(file.tell() + header_bytes) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=is_zip64) as member:
        member.write(data)


def _encode_pickle(specs: list[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """Encodes {"state_dict": OrderedDict(name -> tensor)} as torch.save does, in protocol 2, opcode by opcode."""
    ordered_dict = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02}", _encode_text("state_dict"), ordered_dict, b"("]
    for key, (name, dtype, shape) in enumerate(specs):
        storage = [
            b"(" + _encode_text("storage") + f"ctorch\n{_STORAGE_NAMES[dtype]}\n".encode(),
            _encode_text(str(key)) + _encode_text("cpu") + _encode_int(math.prod(shape)) + b"tQ",
        ]
        layout = [_encode_int(0), _encode_ints(shape), _encode_ints(contiguous_strides(shape))]
        requires_grad, backward_hooks = b"\x89", ordered_dict
        parts += [_encode_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", *storage, *layout]
        parts += [requires_grad, backward_hooks, b"tR"]
    return b"".join([*parts, b"us."])


def _encode_text(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _encode_int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _encode_ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_encode_int(value) for value in values) + b"t"
