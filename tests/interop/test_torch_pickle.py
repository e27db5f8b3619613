"""interop/torch_pickle.py: plain data comes out, and nothing is called. Whole files: test_torch_archive.py."""

import io
import os
import pickle
from collections import OrderedDict

import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.torch_pickle import MAX_KEY_LENGTH, decode_pickle
from mindalle_jax.interop.torch_records import Opaque


def decode(data: bytes):
    return decode_pickle(io.BytesIO(data), "a.ckpt").tree


PLAIN = {"none": None, "scalars": [1, -1, 1 << 40, 0.5, True, "é"], "nested": {"a": (1, (2, 3)), 5: [], (1, "b"): {}}}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_data_is_what_pickle_reads(value, protocol):
    assert decode(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, frozenset({3})], ids=["bytes", "set", "frozenset"])
def test_what_old_protocols_write_as_calls_is_a_name(value):
    """Protocol 2 has no opcode for bytes, 2 and 3 none for sets."""
    assert decode(pickle.dumps(value, 4)) == value
    assert isinstance(decode(pickle.dumps(value, 2)), Opaque)


def test_an_ordered_dict_is_a_dict():
    assert decode(pickle.dumps(OrderedDict(a=1, b=2), 2)) == {"a": 1, "b": 2}


class Runs:
    def __reduce__(self):
        return os.mkdir, ("PWNED",)


def test_a_call_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = decode(pickle.dumps({"weights": 1, "other": Runs()}, 2))
    assert tree["weights"] == 1 and tree["other"] == Opaque(f"{os.mkdir.__module__}.mkdir")
    assert os.listdir(tmp_path) == []


def test_the_stream_is_left_after_the_pickle():
    """The layout before torch 1.6 has several in a row."""
    stream = io.BytesIO(pickle.dumps(1, 2) + pickle.dumps("two", 2))
    assert [decode_pickle(stream, "a.ckpt").tree for _ in range(2)] == [1, "two"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends without STOP"),
        (b"\x80\x02.", "stack underflow"),
        (b"\x80\x02I1\n.", "is not an opcode that torch.save writes"),
        (b"\x80\x02h\x05.", "memo 5 was never set"),
        (pickle.dumps({"k" * (MAX_KEY_LENGTH + 1): 1}, 2), "a key of 1001 characters"),
        (pickle.dumps(1 << 200, 2), "an integer of 201 bits"),
    ],
)
def test_what_is_refused_is_said_with_its_place(data, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        decode(data)
    assert str(caught.value).startswith("a.ckpt: pickle byte ")
