"""Records that the pickle inside a torch.save() file is decoded into, beside plain data, and the dtypes they name.

torch_pickle.py builds the records and checks each of them; torch_archive.py turns a TensorRef into an array.
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
# Types younger than the storage classes: saved as bytes, with the type among the arguments of _rebuild_tensor_v3.
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
    """A name in the file, such as `torch.FloatStorage`. Only ever compared with names we know."""

    path: str


@dataclass(frozen=True)
class Opaque:
    """Stands for the result of calling an unknown Global. Holds nothing but that name."""

    path: str


@dataclass(eq=False)  # it may hold itself, and a comparison would not end
class ScriptModule:
    """An object of TorchScript: the attributes that the file gives it, parameters and inner modules among others."""

    attributes: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageRef:
    """The bytes [start, stop) of the data record `key`, which must be `record_bytes` long.

    The range is the whole record except in files of torch < 0.4, which could save a view of a storage as a storage.
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
    """The decoded tree, every storage it named by key, and how many tensors were cut from each."""

    tree: Any = None
    storages: dict[str, StorageRef] = field(default_factory=dict)
    tensors_per_storage: Counter[str] = field(default_factory=Counter)


def describe(value: Any) -> str:
    """A short text for error messages, one line.

    Containers give only their type: the repr of tuples that share members, ten times each, has no useful end.
    """
    if isinstance(value, str | bytes):
        return repr(value[:60])
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Global | Opaque):
        return f"the Python object {value.path[:80]!r}"
    return f"a {type(value).__name__}"
