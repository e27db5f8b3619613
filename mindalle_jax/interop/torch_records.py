"""The records that the pickle in a torch.save() file is decoded into, beside plain data, and the dtypes that they name.

torch_pickle.py builds and checks the records. torch_archive.py turns a TensorRef into an array.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

# Storage classes of torch.save. numpy has no quantized or 32-bit complex type; those are refused by name.
STORAGE_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "UntypedStorage": np.dtype("u1"),
}
# Types newer than the storage classes. They are saved as bytes, and _rebuild_tensor_v3 has the type as an argument.
NEWER_DTYPES = {
    "torch.uint16": np.dtype("<u2"),
    "torch.uint32": np.dtype("<u4"),
    "torch.uint64": np.dtype("<u8"),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "torch.float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True)
class Global:
    """A name in the file, such as `torch.FloatStorage`. It is only compared with known names."""

    path: str


@dataclass(frozen=True)
class Opaque:
    """Stands for the result of calling an unknown Global, which is never called. Holds only the name."""

    path: str


@dataclass(eq=False)  # it may contain itself, and then a comparison would not end
class ScriptModule:
    """An object of TorchScript, with the attributes in the file: parameters, inner modules and others."""

    attributes: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageRef:
    """The bytes [start, stop) of the data record `key`, which must be `record_bytes` long.

    The range is the complete record, except in files of torch < 0.4. Those may save a view of a storage as a storage.
    """

    key: str
    dtype: np.dtype
    record_bytes: int
    start: int
    stop: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor in the file: `offset` and `strides` count elements of `dtype`, from the start of the storage."""

    storage: StorageRef
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class PlainPickle:
    """The decoded tree, every storage that it names, by key, and the number of tensors in each storage."""

    tree: Any = None
    storages: dict[str, StorageRef] = field(default_factory=dict)
    tensors_per_storage: Counter[str] = field(default_factory=Counter)


def describe(value: Any) -> str:
    """Returns a short text for error messages, in one line.

    A container gives only its type. The repr of nested tuples that share members may be endless in practice.
    """
    if isinstance(value, str | bytes):
        return repr(value[:60])
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Global | Opaque):
        return f"the Python object {value.path[:80]!r}"
    return f"a {type(value).__name__}"
