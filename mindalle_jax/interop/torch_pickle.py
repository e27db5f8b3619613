"""Decodes the pickle inside a torch.save() file into plain data, without unpickling it.

A pickle is a program for a small stack machine. Unpickling runs it, with its imports, calls and attribute assignments.
The machine here reads the same opcodes, but imports and calls nothing. It builds dict, list, tuple, set, scalars and
two records: `StorageRef` (a range of bytes elsewhere in the file) and `TensorRef` (a strided view of one). Rules build
these for a few calls that torch.save always writes. Every other name in the file becomes an inert `Opaque`. So unknown
classes around the weights are ignored, and code hidden in the file is a name that nothing looks up. An object of
TorchScript becomes a `ScriptModule` with its attributes. The source text of its class is in the same file and is not
read.

A record is checked when it is built, so a TensorRef always lies inside its StorageRef. torch_containers.py, which knows
the file, checks that the StorageRef agrees with the file. The records and the dtypes are in torch_records.py.
"""

import pickletools
import re
import struct
from typing import Any, BinaryIO, NoReturn

import numpy as np

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.torch_records import (
    NEWER_DTYPES,
    STORAGE_DTYPES,
    Global,
    Opaque,
    PlainPickle,
    ScriptModule,
    StorageRef,
    TensorRef,
    describe,
)

# Far above the needs of real files (minDALL-E with optimizer state: under 1 MiB, 70k opcodes), and still harmless.
MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 500_000
MAX_DIMS = 16
MAX_INT_BITS = 128  # the legacy magic number has 77
# A pickle can use a text or tuple many times, for two bytes per use, while we copy, hash or compare it each time.
MAX_NAME_LENGTH = 500  # of a module or a class
MAX_KEY_LENGTH = 1000  # of text in a dict


def decode_pickle(stream: BinaryIO, where: str) -> PlainPickle:
    """Decodes one pickle and leaves `stream` right after it. `where` begins every message. Raises CheckpointError."""
    return _StackMachine(stream, where).run()


class _BoundedStream:
    """Reads at most MAX_PICKLE_BYTES, even if an opcode claims a longer argument."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.position = 0

    def read(self, size: int) -> bytes:
        if self.position + size > MAX_PICKLE_BYTES:
            raise ValueError(f"longer than {MAX_PICKLE_BYTES} bytes")
        data = self._stream.read(size)
        self.position += len(data)
        return data

    def readline(self) -> bytes:
        line = self._stream.readline(MAX_NAME_LENGTH)
        self.position += len(line)
        return line


_MARK = object()
_PUSH_ARGUMENT = frozenset(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINBYTES BINBYTES "
    "BINBYTES8 BYTEARRAY8 SHORT_BINSTRING BINSTRING".split()
)
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK, "EMPTY_TUPLE": ()}
_PUSH_NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_OTHER_OPCODES = frozenset(
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET SETITEM SETITEMS APPEND "
    "APPENDS ADDITEMS GLOBAL STACK_GLOBAL BINPERSID REDUCE NEWOBJ NEWOBJ_EX BUILD POP POP_MARK PROTO FRAME STOP".split()
)
# Opcodes that pickle protocols 2 to 5 write for the objects that torch.save accepts, also in Python 2, whose strings
# are read if they are ASCII. Left out are text opcodes of protocol 0, the extension registry and out-of-band buffers.
_OPCODES = {
    opcode.code.encode("latin-1"): opcode
    for opcode in pickletools.opcodes
    if opcode.name in _PUSH_ARGUMENT | _OTHER_OPCODES or opcode.name in _PUSH_CONSTANT or opcode.name in _PUSH_NEW
}


class _StackMachine:
    def __init__(self, stream: BinaryIO, where: str):
        self._stream: Any = _BoundedStream(stream)
        self._where = where
        self._opcode_at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._result = PlainPickle()

    def run(self) -> PlainPickle:
        for _ in range(MAX_OPCODES):
            name, argument = self._next_opcode()
            if name == "STOP":
                self._result.tree = self._pop()
                return self._result
            self._step(name, argument)
        self._fail(f"more than {MAX_OPCODES} opcodes")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._where}: pickle byte {self._opcode_at}: {reason}")

    def _next_opcode(self) -> tuple[str, Any]:
        self._opcode_at = self._stream.position
        try:
            code = self._stream.read(1)
            if not code:
                raise ValueError("it ends without STOP")
            if code not in _OPCODES:
                raise ValueError(f"byte {code!r} is not an opcode that torch.save writes")
            opcode = _OPCODES[code]
            if opcode.name == "GLOBAL":  # not by pickletools, which resolves backslash escapes and warns about them
                argument = f"{self._read_line()}.{self._read_line()}"
            else:
                argument = opcode.arg.reader(self._stream) if opcode.arg else None
            if opcode.name in ("SHORT_BINSTRING", "BINSTRING") and not str(argument).isascii():
                raise ValueError("a string of Python 2 that is not ASCII")
        except (ValueError, struct.error, OverflowError) as error:  # ValueError includes bad UTF-8
            self._fail(f"damaged, or not a checkpoint: {str(error)[:120]}")
        if isinstance(argument, int) and argument.bit_length() > MAX_INT_BITS:
            self._fail(f"an integer of {argument.bit_length()} bits")
        return opcode.name, argument

    def _read_line(self) -> str:
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise ValueError("a name without an end")
        return line[:-1].decode("utf-8")

    # Stack

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._fail("stack underflow")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_to_mark(self) -> list[Any]:
        for mark in range(len(self._stack) - 1, -1, -1):
            if self._stack[mark] is _MARK:
                items = self._stack[mark + 1 :]
                del self._stack[mark:]
                return items
        self._fail("no MARK on the stack")

    def _pop_tuple(self, length: int) -> tuple[Any, ...]:
        return tuple(reversed([self._pop() for _ in range(length)]))

    def _step(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name in _PUSH_ARGUMENT:
            push(argument)
        elif name in _PUSH_CONSTANT:
            push(_PUSH_CONSTANT[name])
        elif name in _PUSH_NEW:
            push(_PUSH_NEW[name]())
        else:
            match name:
                case "BINPUT" | "LONG_BINPUT":
                    self._memo[argument] = self._top()
                case "MEMOIZE":
                    self._memo[len(self._memo)] = self._top()
                case "BINGET" | "LONG_BINGET":
                    if argument not in self._memo:
                        self._fail(f"memo {argument} was never set")
                    push(self._memo[argument])
                case "TUPLE":
                    push(tuple(self._pop_to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    push(self._pop_tuple(int(name[-1])))
                case "FROZENSET":
                    push(frozenset(self._check_key(item) for item in self._pop_to_mark()))
                case "SETITEM":
                    self._set_items(list(self._pop_tuple(2)))
                case "SETITEMS":
                    self._set_items(self._pop_to_mark())
                case "APPEND":
                    self._append([self._pop()])
                case "APPENDS":
                    self._append(self._pop_to_mark())
                case "ADDITEMS":
                    self._add_items(self._pop_to_mark())
                case "GLOBAL":
                    push(Global(argument))
                case "STACK_GLOBAL":
                    push(self._stack_global(*self._pop_tuple(2)))
                case "BINPERSID":
                    push(self._storage(self._pop()))
                case "REDUCE":
                    push(self._reduce(*self._pop_tuple(2)))
                case "NEWOBJ":
                    push(self._new_object(self._pop_tuple(2)[0]))
                case "NEWOBJ_EX":
                    push(self._opaque(self._pop_tuple(3)[0]))
                case "BUILD":
                    self._build(self._pop())
                case "POP":
                    self._pop()
                case "POP_MARK":
                    self._pop_to_mark()
                case "PROTO" | "FRAME":
                    pass
                case _:
                    raise AssertionError(name)

    # Containers

    def _check_key(self, key: Any) -> Any:
        scalars = (str, bytes, int, float, bool, type(None))
        if type(key) in (str, bytes) and len(key) > MAX_KEY_LENGTH:
            self._fail(f"a key of {len(key)} characters")
        if type(key) in (*scalars, Global, Opaque):
            return key
        if type(key) is tuple and len(key) <= MAX_DIMS and all(type(item) in scalars for item in key):
            return key
        self._fail(f"{describe(key)} as a key")

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is Opaque:
            return
        if type(target) is not dict:
            self._fail(f"item assignment on {describe(target)}")
        if len(items) % 2:
            self._fail("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._check_key(key)] = value

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Opaque:
            self._fail(f"append to {describe(target)}")

    def _add_items(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is set:
            target.update(self._check_key(item) for item in items)
        elif type(target) is not Opaque:
            self._fail(f"items added to {describe(target)}")

    # Names and calls

    def _stack_global(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            self._fail("a global whose name is not text")
        if len(module) > MAX_NAME_LENGTH or len(name) > MAX_NAME_LENGTH:
            self._fail(f"a name of more than {MAX_NAME_LENGTH} characters")
        return Global(f"{module}.{name}")

    def _new_object(self, target: Any) -> ScriptModule | Opaque:
        if type(target) is Global and target.path.startswith("__torch__."):
            return ScriptModule()
        return self._opaque(target)

    def _build(self, state: Any) -> None:
        """Keeps the attributes of a TorchScript module. Drops all other states, such as the _metadata of a dict."""
        target = self._top()
        if type(target) is ScriptModule and type(state) is dict:
            target.attributes.update(state)

    def _opaque(self, target: Any) -> Opaque:
        if not isinstance(target, Global | Opaque):
            self._fail(f"a call of {describe(target)}")
        return Opaque(target.path)

    def _reduce(self, function: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:
            self._fail(f"call arguments that are {describe(arguments)}")
        if type(function) is not Global:
            return self._opaque(function)
        match function.path:
            case "collections.OrderedDict":
                items = arguments[0] if arguments else []  # Python 2 writes [[key, value], ...]
                if len(arguments) > 1 or type(items) is not list:
                    self._fail("an OrderedDict with arguments")
                if not all(type(item) is list and len(item) == 2 for item in items):
                    self._fail("an OrderedDict with an item that is no pair")
                return {self._check_key(key): value for key, value in items}
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return self._tensor(arguments, is_v3=False)
            case "torch._utils._rebuild_tensor_v3":
                return self._tensor(arguments, is_v3=True)
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                if not arguments or type(arguments[0]) is not TensorRef:
                    self._fail("a parameter without a tensor")
                return arguments[0]
        return self._opaque(function)

    # Storages and tensors

    def _check_count(self, value: Any, what: str) -> int:
        if type(value) is not int or not 0 <= value < 1 << 62:
            self._fail(f"{what} is {describe(value)}")
        return value

    def _check_counts(self, values: Any, what: str) -> tuple[int, ...]:
        if type(values) is not tuple or len(values) > MAX_DIMS:
            self._fail(f"tensor {what} is not a tuple of at most {MAX_DIMS}")
        return tuple(self._check_count(value, f"a tensor {what}") for value in values)

    def _storage(self, persistent_id: Any) -> StorageRef | Opaque:
        """Decodes ("storage", class, key, device, number of elements, optional (view key, first element, length))."""
        if type(persistent_id) is not tuple or len(persistent_id) < 2:
            self._fail(f"a persistent id that is {describe(persistent_id)}")
        if persistent_id[0] == "module":  # the source text of a module class, in files that hold a whole model
            return self._opaque(persistent_id[1])
        if persistent_id[0] != "storage" or len(persistent_id) not in (5, 6):
            self._fail("a persistent id that is not a storage")
        _, storage_class, key, _, numel, *view = persistent_id
        if type(key) is not str or not re.fullmatch(r"[0-9A-Za-z_]{1,64}", key):
            self._fail(f"a storage named {describe(key)}")
        dtype = self._storage_dtype(storage_class)
        numel = self._check_count(numel, "a storage length")
        first, length = self._view(view[0], numel) if view and view[0] is not None else (0, numel)
        size = dtype.itemsize
        storage = StorageRef(key, dtype, numel * size, first * size, (first + length) * size)
        if self._result.storages.setdefault(key, storage).record_bytes != storage.record_bytes:
            self._fail(f"storage {key} appears with two lengths")
        return storage

    def _storage_dtype(self, storage_class: Any) -> np.dtype:
        path = storage_class.path if type(storage_class) is Global else ""
        module, _, name = path.rpartition(".")
        if module not in ("torch", "torch.cuda", "torch.storage") or name not in STORAGE_DTYPES:
            self._fail(f"storage type {describe(storage_class)} has no numpy equivalent")
        return STORAGE_DTYPES[name]

    def _view(self, view: Any, numel: int) -> tuple[int, int]:
        if type(view) is not tuple or len(view) != 3:
            self._fail("a storage view that is not (key, first, length)")
        first, length = (self._check_count(value, "a storage view bound") for value in view[1:])
        if first + length > numel:
            self._fail(f"a storage view ends at element {first + length} of {numel}")
        return first, length

    def _tensor(self, arguments: tuple[Any, ...], is_v3: bool) -> TensorRef:
        """(storage, offset, size, stride, requires_grad, hooks, [v3: dtype,] metadata), where old files end early."""
        if len(arguments) < (7 if is_v3 else 4):
            self._fail("too few arguments for a tensor")
        storage, offset, shape, strides = arguments[:4]
        if type(storage) is not StorageRef:
            self._fail(f"a tensor whose storage is {describe(storage)}")
        if any(arguments[7:] if is_v3 else arguments[6:]):
            self._fail("a tensor saved as a lazy conjugate or negation: save tensor.resolve_conj().resolve_neg()")
        dtype = self._newer_dtype(arguments[6]) if is_v3 else storage.dtype
        offset = self._check_count(offset, "a tensor offset")
        shape, strides = self._check_counts(shape, "shape"), self._check_counts(strides, "stride")
        if len(shape) != len(strides):
            self._fail(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
        # Compares one past the last byte used. Python integers do not overflow, so the check cannot be tricked.
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        needed = 0 if 0 in shape else (last + 1) * dtype.itemsize
        available = storage.stop - storage.start
        if needed > available:
            self._fail(f"a tensor needs {needed} bytes of storage {storage.key}, which has {available}")
        self._result.tensors_per_storage[storage.key] += 1
        return TensorRef(storage, dtype, offset, shape, strides)

    def _newer_dtype(self, dtype: Any) -> np.dtype:
        if type(dtype) is not Global or dtype.path not in NEWER_DTYPES:
            self._fail(f"tensor type {describe(dtype)} has no numpy equivalent")
        return NEWER_DTYPES[dtype.path]
