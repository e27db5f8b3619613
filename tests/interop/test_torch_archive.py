"""torch_archive.py: equal to torch.load bit for bit, and unmoved by damaged or hostile files.

The oracle is torch. Everything that can be said about hostile bytes is tested without it, on files written by hand.
"""

import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mindalle_jax.errors import CheckpointError, OutputError
from mindalle_jax.interop import torch_archive
from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")


def load(path) -> dict[str, np.ndarray]:
    with TorchArchive(path) as archive:
        return {key: archive.read(ref) for key, ref in archive.state_dict().items()}


# Files by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def integers(values) -> bytes:
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def storage_pickle(storage="torch\nFloatStorage", key=None, numel=None, view=b"") -> bytes:
    """The opcodes of one storage; `key` and `numel` are opcodes too, so that a test can put anything there."""
    key, numel = text("0") if key is None else key, integer(4) if numel is None else numel
    return b"(" + text("storage") + b"c" + storage.encode() + b"\n" + key + text("cpu") + numel + view + b"tQ"


def tensor_pickle(size=(4,), stride=(1,), offset=0, storage=None, rebuild="_rebuild_tensor_v2", extra=b"") -> bytes:
    return (
        b"ctorch._utils\n" + rebuild.encode() + b"\n(" + (storage_pickle() if storage is None else storage)
        + integer(offset) + integers(size) + integers(stride) + b"\x89ccollections\nOrderedDict\n)R" + extra + b"tR"
    )  # fmt: skip


def state_dict_pickle(*values: bytes) -> bytes:
    """{"state_dict": {"w0": values[0], ...}}, each value given as opcodes."""
    items = b"".join(text(f"w{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}" + text("state_dict") + b"}(" + items + b"us."


def script_module(state: bytes) -> bytes:
    """An object of TorchScript whose attributes are given as opcodes."""
    return b"c__torch__.models\nM\n)\x81" + state + b"b"


FOUR_FLOATS = np.arange(4, dtype="<f4").tobytes()


def zip_bytes(data_pkl: bytes, records=None, root="archive", compression=zipfile.ZIP_STORED, extra_members=()) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", data_pkl)
        for key, record in ({"0": FOUR_FLOATS} if records is None else records).items():
            archive.writestr(f"{root}/data/{key}", record)
        for name, data in extra_members:
            archive.writestr(f"{root}/{name}", data)
    return out.getvalue()


def legacy_bytes(tree: bytes, records=None, magic=0x1950A86A20F9469CFC6C, protocol=1001, little_endian=True) -> bytes:
    """`records` gives (number of elements, bytes) by key."""
    records = {"0": (4, FOUR_FLOATS)} if records is None else records
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2}}
    head = b"".join(pickle.dumps(part, 2) for part in (magic, protocol, system))
    data = b"".join(struct.pack("<q", numel) + record for numel, record in records.values())
    return head + tree + pickle.dumps(list(records), 2) + data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def without_crcs(data: bytes) -> bytes:
    """The file that torch.serialization.set_crc32_options(False) would have made: every CRC is 0."""
    out = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        position = archive.start_dir
        for info in archive.infolist():
            out[position + 16 : position + 20] = out[info.header_offset + 14 : info.header_offset + 18] = bytes(4)
            position += 46 + len(info.filename) + len(info.extra)
    return bytes(out)


# What torch saves is what is read

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}
NEWER = ("uint16", "uint32", "uint64", "float8")  # than torch's storage classes, of which there are no more
LAYOUTS = [(is_zip, protocol) for is_zip in (True, False) for protocol in (2, 4)]
layouts = pytest.mark.parametrize(("is_zip", "protocol"), LAYOUTS, ids=["zip-2", "zip-4", "legacy-2", "legacy-4"])


def save(torch, obj, path, is_zip, protocol):
    torch.save(obj, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)


def random_bits(torch, dtype_name: str, count: int, seed: int):
    """A tensor of any bit patterns, NaNs with payload included (bool: 0 and 1 only)."""
    dtype = np.dtype(DTYPES[dtype_name])
    data = np.random.default_rng(seed).integers(0, 2 if dtype.kind == "b" else 256, count * dtype.itemsize, np.uint8)
    return torch.frombuffer(bytearray(data.tobytes()), dtype=getattr(torch, dtype_name))


def bits(torch, tensor) -> bytes:
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage().tolist())


def assert_same(torch, arrays: dict[str, np.ndarray], tensors):
    assert list(arrays) == list(tensors)
    for key, array in arrays.items():
        tensor = tensors[key]
        assert array.shape == tuple(tensor.shape), key
        assert array.dtype == DTYPES[str(tensor.dtype).removeprefix("torch.")], key
        assert array.tobytes() == bits(torch, tensor), key
        assert array.flags.c_contiguous and array.flags.owndata and array.flags.writeable, key


@layouts
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_every_dtype_and_view_is_bit_equal_to_torch_load(torch, tmp_path, dtype_name, is_zip, protocol):
    base = random_bits(torch, dtype_name, 60, seed=0)
    grid = random_bits(torch, dtype_name, 60, seed=1).reshape(3, 4, 5)
    tensors = OrderedDict(
        whole=random_bits(torch, dtype_name, 24, seed=2).reshape(2, 3, 4),
        scalar=random_bits(torch, dtype_name, 1, seed=3).reshape(()),
        empty=torch.empty((0, 3), dtype=getattr(torch, dtype_name)),
        empty_slice=base[7:7],
        transposed=random_bits(torch, dtype_name, 12, seed=4).reshape(3, 4).t(),
        permuted=grid.permute(2, 0, 1),
        strided=grid[:, 1::2, ::3],
        tail=base[50:],
        shared_head=base[:10],
        shared_middle=base[5:15].reshape(2, 5),
        expanded=random_bits(torch, dtype_name, 3, seed=5).reshape(3, 1).expand(3, 4),
        overlapping=base[:12].as_strided((4, 3), (2, 1), 1),
        same_again=base,
    )
    save(torch, {"state_dict": tensors}, tmp_path / "a.ckpt", is_zip, protocol)
    arrays = load(tmp_path / "a.ckpt")
    assert_same(torch, arrays, tensors)
    if is_zip or not dtype_name.startswith(NEWER):  # torch writes these into legacy files but fails to load them
        assert_same(torch, arrays, torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"])


@layouts
def test_a_module_and_its_parameters_are_read(torch, tmp_path, is_zip, protocol):
    """Parameters, tied ones, buffers, and the _metadata attribute that state_dict() carries."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3, bias=False))
    module[2].weight = torch.nn.Parameter(module[0].weight.detach().t())
    parameters = dict(module.named_parameters())
    parameters["tied"] = parameters["0.weight"]
    parameters["marked"] = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    parameters["marked"].note = "an attribute of a Parameter"
    for name, state in {"state": module.state_dict(), "parameters": parameters}.items():
        save(torch, state, tmp_path / name, is_zip, protocol)
        assert_same(torch, load(tmp_path / name), state)


@layouts
def test_training_state_and_unknown_classes_beside_the_weights_are_ignored(torch, tmp_path, is_zip, protocol):
    """A Lightning checkpoint names classes that this machine does not have. None is needed to get at the weights."""
    vanished = types.ModuleType("vanished_package")
    sys.modules["vanished_package"] = vanished
    try:
        for name, bases in {"Callback": (), "Mapping": (dict,), "Items": (list,), "Names": (set,)}.items():
            setattr(vanished, name, type(name, bases, {"__module__": "vanished_package"}))
        callback, mapping = vanished.Callback(), vanished.Mapping(a=1)  # type: ignore[attr-defined]
        callback.best = torch.ones(3)  # a storage that nothing but the unknown object uses
        mapping.note = (1, 2.5, None, True, b"bytes", 1 << 100)
        weights = OrderedDict(w=torch.arange(6.0).reshape(2, 3))
        checkpoint = {
            "epoch": 3,
            "callbacks": {vanished.Callback: callback},  # type: ignore[attr-defined]
            "hyper_parameters": mapping,
            "lists": [vanished.Items([1, 2]), vanished.Names({"x"}), {1, 2}, frozenset({3}), complex(1, 2)],  # type: ignore[attr-defined]
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "betas": (0.9, 0.95)}],
            "counter": Counter("aab"),
            "path": Path("runs/1"),
            "dtype": torch.float16,
            "state_dict": weights,
        }
        save(torch, checkpoint, tmp_path / "a.ckpt", is_zip, protocol)
    finally:
        del sys.modules["vanished_package"]
    assert_same(torch, load(tmp_path / "a.ckpt"), weights)
    with TorchArchive(tmp_path / "a.ckpt") as archive:
        assert archive.tree["epoch"] == 3
        assert archive.read(archive.tree["optimizer_states"][0]["state"][0]["exp_avg"]).shape == (2, 3)


def test_nested_dicts_get_dotted_keys(torch, tmp_path):
    torch.save({"encoder": {"conv": {"weight": torch.ones(2)}}, "bias": torch.zeros(1)}, tmp_path / "a.pt")
    assert list(load(tmp_path / "a.pt")) == ["encoder.conv.weight", "bias"]


def test_a_lazy_conjugate_is_refused(torch, tmp_path):
    """torch saves the bits before conjugation and a flag beside them. Reading those bits would be silently wrong."""
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="lazy conjugate"):
        load(tmp_path / "a.pt")


def test_torch_files_without_crcs_are_read(torch, tmp_path):
    tensors = {"w": torch.arange(100.0)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(torch, load(tmp_path / "a.pt"), tensors)


# Reading, without torch


def test_a_tensor_written_by_hand_is_read_from_both_layouts(tmp_path):
    pickled = state_dict_pickle(tensor_pickle(size=(2, 2), stride=(1, 2)))
    for data in (zip_bytes(pickled), legacy_bytes(pickled)):
        assert load(write(tmp_path / "a.ckpt", data))["w0"].tolist() == [[0, 2], [1, 3]]


def test_a_storage_that_is_a_view_of_a_legacy_storage_starts_at_its_offset(tmp_path):
    """torch < 0.4 saved (view key, first element, length) with a storage, and counted tensor offsets from there."""
    view = b"(" + text("v") + integer(3) + integer(4) + b"t"
    tensor = tensor_pickle(size=(2,), offset=1, storage=storage_pickle(numel=integer(10), view=view))
    path = write(
        tmp_path / "a.ckpt", legacy_bytes(state_dict_pickle(tensor), {"0": (10, np.arange(10, dtype="<f4").tobytes())})
    )
    assert load(path)["w0"].tolist() == [4, 5]


def test_the_stride_of_a_dimension_of_one_may_be_any_number(tmp_path):
    pickled = state_dict_pickle(tensor_pickle(size=(4, 1), stride=(1, 1 << 61)))
    assert load(write(tmp_path / "a.ckpt", zip_bytes(pickled)))["w0"].shape == (4, 1)


def test_a_storage_that_several_tensors_share_is_read_once(tmp_path, monkeypatch):
    other = tensor_pickle(storage=storage_pickle(key=text("1")))
    pickled = state_dict_pickle(tensor_pickle(), tensor_pickle(size=(2,)), tensor_pickle(size=(1,), offset=3), other)
    path = write(tmp_path / "a.ckpt", zip_bytes(pickled, {"0": FOUR_FLOATS, "1": FOUR_FLOATS}))
    reads = []
    read_into = torch_archive.read_into
    with TorchArchive(path) as archive:
        monkeypatch.setattr(torch_archive, "read_into", lambda *args: (reads.append(1), read_into(*args)))
        refs = archive.state_dict()
        first, second = archive.read(refs["w0"]), archive.read(refs["w1"])
        first[:] = 9  # must not reach the tensors read after it
        assert (second.tolist(), archive.read(refs["w2"]).tolist(), len(reads)) == ([0, 1], [3], 1)
        archive.read(refs["w3"])
        assert len(reads) == 2


def test_reading_200_mb_takes_the_memory_of_one_tensor(tmp_path):
    shape, tensor_bytes = (5, 1 << 20), 20 << 20
    specs = [(f"w{i}", np.dtype(np.float32), shape) for i in range(10)]
    tracemalloc.start()
    try:
        write_torch_archive(tmp_path / "a.ckpt", specs, lambda name: np.full(shape, int(name[1:]), np.float32))
        assert tracemalloc.get_traced_memory()[1] < 1.1 * tensor_bytes
        tracemalloc.reset_peak()
        with TorchArchive(tmp_path / "a.ckpt") as archive:
            for i, ref in enumerate(archive.state_dict().values()):
                assert archive.read(ref)[-1, -1] == i
        assert tracemalloc.get_traced_memory()[1] < 1.1 * tensor_bytes
    finally:
        tracemalloc.stop()


# Files that are not what they should be


def legacy(*values: bytes, **options) -> bytes:
    return legacy_bytes(state_dict_pickle(*values), **options)


def zipped(*values: bytes, **options) -> bytes:
    return zip_bytes(state_dict_pickle(*values), **options)


class Call:
    """Pickles as a call of `function`, which unpickling would make."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def payload(protocol=2, function=os.system, argument="touch PWNED") -> bytes:
    """Opcodes that run `function(argument)` when unpickled, to stand for one value."""
    pickled = pickle.dumps(Call(function, argument), protocol)
    return pickled[2:-1] if protocol == 2 else pickled[11:-1]  # without PROTO, FRAME and STOP


# Tuples that each hold the one before ten times: 10 ** 12 leaves in 600 bytes, never to be walked or shown.
LAUGHS = b"(" + b"K\x01" * 10 + b"tq\x00" + b"".join(
    b"0(h" + (bytes([i]) + b"h") * 9 + bytes([i]) + b"tq" + bytes([i + 1]) for i in range(12)
)  # fmt: skip
LAUGHING_DICTS = b"}q\x00" + b"".join(
    b"0}q" + bytes([i + 1]) + b"(" + b"".join(text(str(k)) + b"h" + bytes([i]) for k in range(10)) + b"u"
    for i in range(12)
)  # fmt: skip
LAUGHING_SCRIPT_MODULES = b"\x80\x02c__torch__\nM\n)\x81q\x00" + b"".join(
    b"0c__torch__\nM\n)\x81q" + bytes([i + 1]) + b"}(" + b"".join(text(str(k)) + b"h" + bytes([i]) for k in range(10))
    + b"ub" for i in range(12)
) + b"."  # fmt: skip


def duplicate_member() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("a/data.pkl", "b/data.pkl"):
            archive.writestr(name, state_dict_pickle(tensor_pickle()))
    return out.getvalue().replace(b"b/data.pkl", b"a/data.pkl")


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def encrypted(data: bytes) -> bytes:
    return flipped(data, data.index(b"PK\x01\x02") + 8)


def member_at(offset: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict_pickle(tensor_pickle()))
        archive.infolist()[0].header_offset = offset
    return out.getvalue()


def wrong_local_name(data: bytes) -> bytes:
    return data.replace(b"archive/data/0", b"archive/data/1", 1)


GOOD = zipped(tensor_pickle())
BIG = 1 << 40
HOSTILE = {
    # Not a checkpoint at all
    "empty": (b"", "is empty"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "looks like a web page"),
    "web page with blanks": (b"\xef\xbb\xbf\n <HTML><body>", "looks like a web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "safetensors": (struct.pack("<Q", 40) + b'{"w":{}}', "safetensors"),
    "noise": (random.Random(0).randbytes(4096), "is not a torch checkpoint"),
    "bare pickle": (pickle.dumps({"w": 1}, 2), "bare pickle"),
    "bare pickle with call": (pickle.dumps(Call(os.system, "touch PWNED"), 2), "bare pickle"),
    "zip of something else": (zip_bytes(b"", root="a").replace(b"data.pkl", b"data.xml"), "0 members named data.pkl"),
    "two roots": (zipped(extra_members=[("x/data.pkl", b"")]).replace(b"e/x/", b"e_x/"), "2 members named data.pkl"),
    "big-endian zip": (zipped(tensor_pickle(), extra_members=[("byteorder", b"big")]), "big-endian"),
    "big-endian legacy": (legacy(tensor_pickle(), little_endian=False), "big-endian"),
    "legacy protocol": (legacy(tensor_pickle(), protocol=1000), "legacy protocol 1000"),
    # Truncated or damaged
    "half a zip": (GOOD[: len(GOOD) // 2], "truncated or damaged"),
    "zip without its last byte": (GOOD[:-1], "truncated or damaged"),
    "half a legacy file": (legacy(tensor_pickle())[:-9], "truncated in storage 0"),
    "legacy without data": (legacy(tensor_pickle())[:-20], "truncated before storage 0"),
    "legacy pickle cut": (legacy(tensor_pickle())[:200], "ends without STOP|damaged"),
    "flipped data": (flipped(GOOD, GOOD.index(FOUR_FLOATS)), "storage 0: damaged: its CRC"),
    "flipped pickle": (flipped(GOOD, GOOD.index(b"state_dict")), "data.pkl: damaged: its CRC"),
    "duplicate member": (duplicate_member(), "appears twice"),
    "compressed": (zipped(tensor_pickle(), compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "zip bomb": (zip_bytes(b"N.", {"0": bytes(50 << 20)}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "encrypted": (encrypted(GOOD), "is encrypted"),
    "member past the end": (member_at(100_000), "is outside of the file"),
    "member past any end": (member_at(1 << 63), "is outside of the file"),
    "local header with another name": (wrong_local_name(GOOD), "another name"),
    # Code
    "call at the root": (zip_bytes(b"\x80\x02" + payload() + b"."), "the Python object '.*system'"),
    "call as a weight": (zipped(payload()), "w0: the Python object '.*system', not a tensor"),
    "call of eval": (zipped(payload(4, eval, "open('PWNED', 'w')")), "the Python object 'builtins.eval'"),
    "legacy call": (legacy(payload(), records={}), "the Python object '.*system'"),
    "getattr chain": (
        zip_bytes(b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x08builtins\x8c\x04eval\x93\x8c\x08__call__\x86R)R."),
        "the Python object 'builtins.getattr'",
    ),
    "new object": (zipped(b"cos\nsystem\n" + text("touch PWNED") + b"\x85\x81"), "the Python object 'os.system'"),
    "script class, not an instance": (zip_bytes(b"\x80\x02c__torch__\nM\n."), "the Python object '__torch__.M'"),
    "script class that is called": (zip_bytes(b"\x80\x02c__torch__\nM\n)R."), "the Python object '__torch__.M'"),
    "script module that is called": (zip_bytes(script_module(b"}") + b")R."), "a call of a ScriptModule"),
    "item of a script module": (zip_bytes(script_module(b"}") + b"K\x00K\x01s."), "item assignment on a ScriptModule"),
    "script module as a key": (zip_bytes(b"\x80\x02}" + script_module(b"}") + b"Ns."), "a ScriptModule as a key"),
    "script module among the weights": (zipped(tensor_pickle(), script_module(b"}")), "w1: a ScriptModule, not a"),
    "script module without tensors": (zip_bytes(script_module(b"}" + text("a") + payload() + b"s") + b"."), "no tens"),
    "script module of a tuple": (zip_bytes(script_module(tensor_pickle() + b"\x85") + b"."), "holds no tensors"),
    "script module in itself": (
        zip_bytes(b"\x80\x02c__torch__\nM\n)\x81q\x00}" + text("a") + b"h\x00sb."),
        "nested deeper than 64",
    ),
    "laughing script modules": (zip_bytes(LAUGHING_SCRIPT_MODULES), "more than 200000 entries"),
    "compressed weights beside code": (
        zipped(tensor_pickle(), compression=zipfile.ZIP_DEFLATED, extra_members=[("code/a.py", b"")]),
        "is compressed",
    ),
    "class, not an instance": (zipped(b"cos\nsystem\n"), "the Python object 'os.system'"),
    "call of a number": (zipped(b"K\x01)R"), "a call of 1"),
    "call as a parameter": (zipped(b"ctorch._utils\n_rebuild_parameter\n(" + payload() + b"tR"), "without a tensor"),
    "line break in a name": (zipped(b"X\x05\0\0\0a\nb\nc" + text("d") + b"\x93"), r"'a\\nb\\nc.d'"),
    "INST": (zipped(b"(" + text("touch PWNED") + b"ios\nsystem\n"), "byte b'i' is not an opcode"),
    "OBJ": (zipped(b"(cos\nsystem\n" + text("touch PWNED") + b"o"), "byte b'o' is not an opcode"),
    "extension registry": (zipped(b"\x82\x01"), "is not an opcode"),
    "text persistent id": (zipped(b"Pfoo\n"), "is not an opcode"),
    # Assignments to what is not a dict or a list
    "item of a tensor": (zipped(tensor_pickle() + b"K\x00K\x01s"), "item assignment on a TensorRef"),
    "item of a storage": (zipped(storage_pickle() + b"K\x00K\x01s"), "item assignment on a StorageRef"),
    "append to a tensor": (zipped(tensor_pickle() + b"K\x00a"), "append to a TensorRef"),
    "added to a tensor": (zipped(tensor_pickle() + b"(K\x00\x90"), "items added to a TensorRef"),
    # Tensors that do not fit their storage
    "short record": (zipped(tensor_pickle(), records={"0": bytes(8)}), "has 8 bytes, the pickle says 16"),
    "long record": (zipped(tensor_pickle(), records={"0": bytes(20)}), "has 20 bytes, the pickle says 16"),
    "legacy record of another length": (legacy(tensor_pickle(), records={"0": (3, bytes(12))}), "has 3 elements"),
    "negative legacy length": (legacy(tensor_pickle(), records={"0": (-4, bytes(16))}), "has -4 elements"),
    "record of 4 TB": (zipped(tensor_pickle((BIG,), storage=storage_pickle(numel=integer(BIG)))), "in a file of"),
    "part of a record of 4 TB": (zipped(tensor_pickle(storage=storage_pickle(numel=integer(BIG)))), "the pickle says"),
    "offset": (zipped(tensor_pickle(offset=1)), "needs 20 bytes of storage 0, which has 16"),
    "negative offset": (zipped(tensor_pickle(offset=-1)), "a tensor offset is -1"),
    "negative stride": (zipped(tensor_pickle(offset=3, stride=(-1,))), "a tensor stride is -1"),
    "negative size": (zipped(tensor_pickle(size=(-4,))), "a tensor shape is -4"),
    "sizes that overflow": (zipped(tensor_pickle((1 << 31, 1 << 31, 4), (0, 0, 1))), "in a file of"),
    "empty, sizes that overflow": (zipped(tensor_pickle((1 << 61, 1 << 61, 0), (0, 0, 1))), "in a file of"),
    "strides that overflow": (zipped(tensor_pickle((2, 2), (1 << 61, 1 << 61))), "needs .* bytes of storage 0"),
    "integer of 65 bits": (zipped(tensor_pickle(size=(1 << 64,))), "a tensor shape is 18446744073709551616"),
    "stride 0 bomb": (zipped(tensor_pickle((1 << 20, 1 << 20), (0, 0))), "in a file of"),
    "17 dimensions": (zipped(tensor_pickle((1,) * 17, (1,) * 17)), "at most 16"),
    "sizes without strides": (zipped(tensor_pickle((4,), ())), "1 dimensions with 0 strides"),
    "view out of range": (
        zipped(tensor_pickle(storage=storage_pickle(view=b"(" + text("v") + integer(2) + integer(3) + b"t"))),
        "ends at element 5 of 4",
    ),
    "missing record": (zipped(tensor_pickle(), records={}), "storage 0: missing from the file"),
    "missing legacy record": (legacy(tensor_pickle(), records={}), "storage 0: missing from the file"),
    "legacy record too many": (legacy(records={"9": (1, bytes(4))}), "'9' belongs to nothing"),
    "storage of two lengths": (
        zipped(tensor_pickle(), tensor_pickle((1,), (1,), 0, storage_pickle(numel=integer(1)))),
        "storage 0 appears with two lengths",
    ),
    "storage key with a path": (zipped(tensor_pickle(storage=storage_pickle(key=text("../../etc/passwd")))), "passwd"),
    "unknown storage": (zipped(tensor_pickle(storage=storage_pickle("torch\nEvilStorage"))), "no numpy equivalent"),
    "quantized": (zipped(tensor_pickle(storage=storage_pickle("torch\nQInt8Storage"))), "torch.QInt8Storage'"),
    "storage of another module": (zipped(tensor_pickle(storage=storage_pickle("os\nFloatStorage"))), "os.FloatSt"),
    "unknown dtype": (
        zipped(tensor_pickle(rebuild="_rebuild_tensor_v3", extra=b"ctorch\nqint8\n")),
        "'torch.qint8' has no numpy equivalent",
    ),
    "tensor of a number": (zipped(tensor_pickle(storage=b"K\x01")), "a tensor whose storage is 1"),
    # Structures
    "deep tuple": (zip_bytes(b"\x80\x02)" + b"\x85" * 2_000_000 + b"."), "more than 500000 opcodes"),
    "deep list": (zip_bytes(b"\x80\x02" + b"]" * 300_000 + b"a" * 199_990 + b"."), "holds a list"),
    "deep dicts": (zipped((b"}" + text("a")) * 100 + b"}" + b"s" * 100), "nested deeper than 64"),
    "laughing tuples": (zipped(LAUGHS), "w0: a tuple, not a tensor"),
    "laughing dicts": (zipped(LAUGHING_DICTS), "more than 200000 entries"),
    "laughing storage key": (zipped(tensor_pickle(storage=storage_pickle(key=LAUGHS))), "a storage named a tuple"),
    "laughing storage length": (zipped(tensor_pickle(storage=storage_pickle(numel=LAUGHS))), "length is a tuple"),
    "laughing dict key": (zipped(b"}" + LAUGHS + b"K\x01s"), "a tuple as a key"),
    "laughing legacy protocol": (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02" + LAUGHS + b".",
        "legacy protocol a tuple",
    ),
    "dict in itself": (zipped(b"}q\x00" + text("a") + b"h\x00s"), "nested deeper than 64"),
    "list as a key": (zipped(b"}]K\x01s"), "a list as a key"),
    "tuple of 17 as a key": (zipped(b"}(" + b"N" * 17 + b"tNs"), "a tuple as a key"),
    "long key": (zipped(b"}" + text("k" * 1001) + b"Ns"), "a key of 1001 characters"),
    "long dotted key": (zipped((b"}" + text("k" * 400)) * 3 + b"}" + b"s" * 3), "a key of more than 1000 characters"),
    "long name": (zipped(text("a" * 501) + text("b") + b"\x93"), "a name of more than 500 characters"),
    "key without a value": (zipped(b"}(K\x01u"), "a key without a value"),
    "keys that meet": (
        zip_bytes(b"\x80\x02}" + text("a.b") + tensor_pickle() + b"s" + text("a") + b"}" + text("b") + b"}ss."),
        "a.b: appears twice",
    ),
    "number among the weights": (zipped(tensor_pickle(), b"K\x07"), "w1: 7, not a tensor"),
    "list among the weights": (zipped(b"]" + tensor_pickle() + b"a"), "w0: a list, not a tensor"),
    "no tensors": (zipped(), "holds no tensors"),
    "a tensor alone": (zip_bytes(b"\x80\x02" + tensor_pickle() + b"."), "holds a TensorRef where"),
    "surrogates in a key": (zip_bytes(b"\x80\x02}X\x03\0\0\0\xed\xa0\x80" + tensor_pickle() + b"s."), "as a key"),
    "line break in a key": (zip_bytes(b"\x80\x02}" + text("a\nb") + tensor_pickle() + b"s."), r"'a\\nb' as a key"),
    # Pickles
    "memo never set": (zipped(b"h\x07"), "memo 7 was never set"),
    "underflow": (zip_bytes(b"\x80\x02R."), "stack underflow"),
    "no mark": (zip_bytes(b"\x80\x02t."), "no MARK"),
    "no STOP": (zip_bytes(b"\x80\x02}"), "ends without STOP"),
    "empty pickle": (zip_bytes(b""), "ends without STOP"),
    "bad UTF-8": (zipped(b"X\x01\0\0\0\xff"), "damaged"),
    "endless name": (zipped(b"c" + b"a" * 100_000 + b"\nb\n"), "damaged"),
    "integer of 60 MB": (zipped(b"\x8b" + struct.pack("<i", 60_000_000) + b"\x7f" * 60_000_000), "an integer of"),
    "text of 4 EB": (legacy_bytes(b"\x80\x02\x8d" + struct.pack("<Q", 1 << 62)), "longer than 67108864 bytes"),
    "pickle of 65 MB": (zip_bytes(b"\x80\x02" + b"N0" * (65 << 19) + b"."), "data.pkl of 68157443 bytes"),
}  # fmt: skip

WATCHED_EVENTS = ("import", "exec", "compile", "os.", "subprocess.", "pickle.", "socket.", "shutil.", "ctypes.")
audit_log: list[str] | None = None


def audit(event: str, arguments: tuple) -> None:
    if audit_log is not None and (event.startswith(WATCHED_EVENTS) or event == "open"):
        audit_log.append(f"{event} {arguments[0] if event == 'open' else arguments}")


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """Runs a function and returns what it imported, executed or opened. (An audit hook cannot be taken back.)"""
    sys.addaudithook(audit)
    load(write(tmp_path_factory.mktemp("warm") / "a.ckpt", GOOD))  # so that Python has what it imports on first use

    def run(function) -> list[str]:
        global audit_log
        audit_log = []
        try:
            function()
            return audit_log
        finally:
            audit_log = None

    return run


@contextmanager
def memory_limit(extra_bytes: int):
    """Fails allocations beyond what this process has and `extra_bytes` more, where the system can do that."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_a_reason_and_run_nothing(case, tmp_path, monkeypatch, audited):
    data, reason = HOSTILE[case]
    path = write(tmp_path / "a.ckpt", data)
    monkeypatch.chdir(tmp_path)
    caught = []

    def attempt():
        try:
            load(path)
        except CheckpointError as error:
            caught.append(str(error))

    start = time.perf_counter()
    with memory_limit(256 << 20):
        events = audited(attempt)
    assert time.perf_counter() - start < 20  # the slowest, 500000 opcodes, takes 2
    assert events in ([], [f"open {path}"])
    assert os.listdir(tmp_path) == ["a.ckpt"]
    (message,) = caught
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < len(str(path)) + 300
    with pytest.raises(CheckpointError, match=reason):
        raise CheckpointError(message)


@pytest.mark.parametrize("make", [zip_bytes, legacy_bytes])
def test_code_beside_the_weights_is_inert(make, tmp_path, monkeypatch, audited):
    pickled = (
        b"\x80\x02}(" + text("callbacks") + payload() + text("state_dict") + b"}" + text("w") + tensor_pickle() + b"su."
    )
    path = write(tmp_path / "a.ckpt", make(pickled))
    monkeypatch.chdir(tmp_path)
    assert audited(lambda: load(path)) == [f"open {path}"]
    assert load(path)["w"].tolist() == [0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_script_module_is_its_tensors_and_the_code_beside_is_not_looked_at(tmp_path, monkeypatch, audited):
    """Attributes of other kinds are ignored, inner modules are walked, and the source text may be a compressed bomb."""
    inner = script_module(b"}(" + text("weight") + tensor_pickle() + text("padding") + text("same") + b"u")
    attributes = text("training") + b"\x88" + text("hook") + payload() + text("bias") + tensor_pickle((1,))
    pickled = b"\x80\x02" + script_module(b"}(" + attributes + text("conv") + inner + text("none") + b"Nu") + b"."
    out = io.BytesIO(zip_bytes(pickled, extra_members=[("constants.pkl", payload())]))
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/code/__torch__.py", bytes(50 << 20))
    path = write(tmp_path / "a.pt", out.getvalue())
    monkeypatch.chdir(tmp_path)
    with memory_limit(32 << 20):
        assert audited(lambda: load(path)) == [f"open {path}"]
    assert {key: array.tolist() for key, array in load(path).items()} == {"bias": [0], "conv.weight": [0, 1, 2, 3]}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_payloads_of_these_tests_do_run_when_unpickled(tmp_path, monkeypatch):
    """Or their silence above would say nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + payload() + b".")
    assert os.listdir(tmp_path) == ["PWNED"]


def test_paths_that_cannot_be_read_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"": "not a regular file", "pipe": "not a regular file", "none": "No such file"}.items():
        with pytest.raises(CheckpointError, match=reason):
            TorchArchive(tmp_path / name)


def test_a_file_that_shrinks_while_open_is_refused(tmp_path):
    tensor = tensor_pickle((1 << 20,), storage=storage_pickle(numel=integer(1 << 20)))
    with TorchArchive(write(tmp_path / "a.ckpt", zipped(tensor, records={"0": bytes(4 << 20)}))) as archive:
        (ref,) = archive.state_dict().values()
        os.truncate(tmp_path / "a.ckpt", 2 << 20)
        with pytest.raises(CheckpointError, match="storage 0: truncated"):
            archive.read(ref)


def test_files_without_crcs_are_read_and_a_single_zero_crc_is_not_enough(tmp_path):
    """Zeroing the CRC of one record must not switch its check off."""
    assert load(write(tmp_path / "a.ckpt", without_crcs(GOOD)))["w0"].tolist() == [0, 1, 2, 3]
    directory_entry = GOOD.rindex(b"archive/data/0") - 46
    one_zero = GOOD[: directory_entry + 16] + bytes(4) + GOOD[directory_entry + 20 :]
    with pytest.raises(CheckpointError, match="CRC"):
        load(write(tmp_path / "a.ckpt", one_zero))


# Damage at random, reproducibly


def written_bytes(path: Path) -> bytes:
    """A small file of write_torch_archive."""
    arrays: dict[str, np.ndarray] = {f"layer{i}.weight": np.arange(7 + i, dtype=np.float32) for i in range(3)}
    arrays["half"] = np.arange(5).astype(ml_dtypes.bfloat16)
    write_torch_archive(path, [(k, a.dtype, a.shape) for k, a in arrays.items()], arrays.__getitem__)
    return path.read_bytes()


def torch_bytes(torch, path: Path, is_zip: bool, protocol: int) -> bytes:
    weights = OrderedDict(
        (f"l{i}.w", torch.arange(12.0).reshape(4, 3).t() if i % 2 else torch.ones(5)) for i in range(4)
    )
    weights["half"] = torch.ones(3, dtype=torch.bfloat16)
    weights["newer"] = torch.ones(3).to(torch.float8_e4m3fn)
    callbacks = {torch.nn.Linear: {"best": torch.tensor(1.0)}}
    checkpoint = {"epoch": 1, "state_dict": weights, "callbacks": callbacks, "hyper": {"a": [1, (2, 3)], "b": {1, 2}}}
    save(torch, checkpoint, path, is_zip, protocol)
    return path.read_bytes()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to eight changes: a byte, a bit, bytes cut out, put in or copied, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(out) or 1)
        match rng.choices(range(6), (40, 15, 15, 15, 10, 5))[0]:
            case 0:
                out[at : at + 1] = rng.randbytes(1)
            case 1:
                out[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in out[at : at + 1])
            case 2:
                del out[at : at + rng.randrange(1, 20)]
            case 3:
                out[at:at] = rng.randbytes(rng.randrange(1, 8))
            case 4:
                source = rng.randrange(len(out) or 1)
                out[at:at] = out[source : source + rng.randrange(1, 40)]
            case 5:
                del out[at:]
    return bytes(out)


def with_mutated_pickle(rng: random.Random, data: bytes) -> bytes:
    """Only data.pkl changed and the zip made anew, with its CRC, so that the change reaches the stack machine."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            member = source.read(name)
            target.writestr(name, mutated(rng, member) if name.endswith("data.pkl") else member)
    return out.getvalue()


def fuzz(path: Path, seeds: list[bytes], count: int) -> Counter[str]:
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(count):
        seed = rng.choice(seeds)
        is_zip = seed.startswith(b"PK")
        data = with_mutated_pickle(rng, seed) if is_zip and rng.random() < 0.6 else mutated(rng, seed)
        start = time.perf_counter()
        try:
            load(write(path, data))
            outcomes["read"] += 1
        except CheckpointError as error:
            outcomes["refused"] += 1
            assert str(error).isprintable()
        assert time.perf_counter() - start < 10
    return outcomes


def test_5000_mutations_of_files_written_without_torch_raise_nothing_else(tmp_path):
    shared = [tensor_pickle(), tensor_pickle((2, 2), (1, 2)), tensor_pickle((1,), (1,), 3)]
    script = zip_bytes(b"\x80\x02" + script_module(b"}(" + text("w") + shared[0] + text("b") + shared[1] + b"u") + b".")
    seeds = [written_bytes(tmp_path / "seed"), zipped(*shared), legacy(*shared), legacy(payload(), *shared), script]
    outcomes = fuzz(tmp_path / "a.ckpt", seeds, 5000)
    assert outcomes["read"] > 100 and outcomes["refused"] > 2500


def test_5000_mutations_of_torch_files_raise_nothing_else(torch, tmp_path):
    seeds = [torch_bytes(torch, tmp_path / "seed", is_zip, protocol) for is_zip, protocol in LAYOUTS]
    outcomes = fuzz(tmp_path / "a.ckpt", seeds, 5000)
    assert outcomes["read"] > 100 and outcomes["refused"] > 2500


def assert_every_flip_is_refused_or_harmless(path: Path, data: bytes):
    """One bit of each byte in turn: what is read is the undamaged content, or nothing is."""
    expected = {key: array.tobytes() for key, array in load(write(path, data)).items()}
    for position in range(len(data)):
        try:
            arrays = load(write(path, flipped(data, position, position % 8)))
        except CheckpointError:
            continue
        assert {key: array.tobytes() for key, array in arrays.items()} == expected, position


def test_a_flipped_bit_anywhere_in_a_zip_is_refused_or_harmless(tmp_path):
    assert_every_flip_is_refused_or_harmless(tmp_path / "a.ckpt", written_bytes(tmp_path / "seed"))


def test_a_flipped_bit_anywhere_in_a_torch_zip_is_refused_or_harmless(torch, tmp_path):
    data = torch_bytes(torch, tmp_path / "seed", is_zip=True, protocol=2)
    assert_every_flip_is_refused_or_harmless(tmp_path / "a.ckpt", data)


def test_every_flipped_bit_of_a_record_is_refused(tmp_path):
    start = GOOD.index(FOUR_FLOATS)
    for position in range(start, start + len(FOUR_FLOATS)):
        for bit in range(8):
            with pytest.raises(CheckpointError, match="CRC"):
                load(write(tmp_path / "a.ckpt", flipped(GOOD, position, bit)))


# Writing

WRITABLE = {name: np.dtype(dtype) for name, dtype in DTYPES.items() if not name.startswith(NEWER)}


def samples() -> dict[str, np.ndarray]:
    """Every type that can be written, of random bits, in shapes from a scalar to an empty one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for i, (name, dtype) in enumerate(WRITABLE.items()):
        shape = ((3, 5), (), (0,), (7,), (2, 0, 4), (2, 3, 4))[i % 6]
        data = rng.integers(0, 2 if dtype.kind == "b" else 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        arrays[f"{name}.wëight"] = data.view(dtype).reshape(shape)
    return arrays


def write_samples(path: Path) -> dict[str, np.ndarray]:
    arrays = samples()
    write_torch_archive(path, [(key, a.dtype, a.shape) for key, a in arrays.items()], arrays.__getitem__)
    return arrays


@pytest.mark.parametrize("mmap", [False, True])
def test_written_files_are_bit_equal_in_torch(torch, tmp_path, mmap):
    arrays = write_samples(tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=mmap)
    assert list(loaded) == ["state_dict"] and type(loaded["state_dict"]) is OrderedDict
    assert_same(torch, {key: array.copy() for key, array in arrays.items()}, loaded["state_dict"])
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in loaded["state_dict"].values())


def test_written_files_are_bit_equal_in_our_reader(tmp_path):
    arrays = write_samples(tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    assert list(loaded) == list(arrays)
    for key, array in arrays.items():
        assert (loaded[key].dtype, loaded[key].shape) == (array.dtype, array.shape)
        assert loaded[key].tobytes() == array.tobytes()


def test_written_files_are_plain_zips_with_aligned_records_and_right_crcs(tmp_path):
    write_samples(tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == b"little" and archive.read("archive/version") == b"3\n"
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            with archive.open(info) as member:
                assert member._orig_compress_start % 64 == 0  # type: ignore[attr-defined]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    assert written_bytes(tmp_path / "a") == written_bytes(tmp_path / "b")


def test_tensors_are_asked_for_in_order_one_at_a_time(tmp_path):
    """Each is in the file before the next is asked for."""
    sizes = []

    def read(name):
        sizes.append((name, os.path.getsize(tmp_path / "a.ckpt")))
        return np.zeros(1 << 20, np.uint8)

    write_torch_archive(tmp_path / "a.ckpt", [(f"w{i}", np.dtype(np.uint8), (1 << 20,)) for i in range(3)], read)
    assert [(name, size >> 20) for name, size in sizes] == [("w0", 0), ("w1", 1), ("w2", 2)]


def test_arrays_that_are_not_contiguous_are_written_in_their_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_torch_archive(tmp_path / "a.ckpt", [("w", array.dtype, array.shape)], lambda _: array)
    assert load(tmp_path / "a.ckpt")["w"].tolist() == array.tolist()


def test_an_existing_file_is_refused_and_left_alone(tmp_path):
    path = write(tmp_path / "a.ckpt", b"precious")
    with pytest.raises(OutputError, match="exists"):
        write_torch_archive(path, [], lambda _: pytest.fail("asked for a tensor"))
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("specs", "error", "reason"),
    [
        ([("w", np.dtype("U1"), (1,))], CheckpointError, "w: cannot write <U1, only float64, float32"),
        ([("w", np.dtype(">f4"), (1,))], CheckpointError, "cannot write >f4"),
        ([("w", np.dtype("f4"), (1,)), ("w", np.dtype("f4"), (1,))], CheckpointError, "same name"),
        ([("w", np.dtype("f4"), (2,))], CheckpointError, "w: float32.1,. instead of float32.2,."),
        ([("w", np.dtype("f2"), (1,))], CheckpointError, "w: float32.1,. instead of float16.1,."),
    ],
)
def test_tensors_that_cannot_be_written_are_named(tmp_path, specs, error, reason):
    with pytest.raises(error, match=reason):
        write_torch_archive(tmp_path / "a.ckpt", specs, lambda _: np.zeros(1, np.float32))


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        write_torch_archive(tmp_path / "none" / "a.ckpt", [], lambda _: pytest.fail("asked for a tensor"))


def test_a_full_disk_is_reported(tmp_path):
    """A limit on the file size stands for it."""
    program = """
import resource, signal, numpy as np
from mindalle_jax.interop.torch_archive import write_torch_archive
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
write_torch_archive("a.ckpt", [("w", np.dtype("u1"), (2 << 20,))], lambda _: np.zeros(2 << 20, np.uint8))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "OutputError: a.ckpt: File too large" in done.stderr


# Python 2


def short(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def long(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text


@pytest.mark.parametrize("opcode", [short, long])
def test_both_kinds_of_strings_of_python_2(tmp_path, opcode):
    (tmp_path / "a.pth").write_bytes(legacy_bytes(b"\x80\x02}" + opcode(b"w") + tensor_pickle() + b"s."))
    with TorchArchive(tmp_path / "a.pth") as archive:
        assert list(archive.state_dict()) == ["w"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (short(b"\xe9"), "a string of Python 2 that is not ASCII"),
        (long(b"caf\xc3\xa9"), "a string of Python 2 that is not ASCII"),
        (b"T" + struct.pack("<i", -1) + b"x", "damaged, or not a checkpoint"),
        (b"T" + struct.pack("<i", 1 << 30) + b"x", "damaged, or not a checkpoint"),
        (b"U\x05ab", "pickle byte"),
    ],
)
def test_other_strings_of_python_2_are_refused(tmp_path, key, message):
    (tmp_path / "a.pth").write_bytes(legacy_bytes(b"\x80\x02}" + key + tensor_pickle() + b"s."))
    with pytest.raises(CheckpointError, match=message):
        TorchArchive(tmp_path / "a.pth")
