"""interop/torch_records.py: dtypes of torch by name, and texts for error messages that always end."""

import numpy as np
import pytest

from mindalle_jax.interop.torch_records import NEWER_DTYPES, STORAGE_DTYPES, Global, Opaque, ScriptModule, describe


def test_every_dtype_is_little_endian_and_known_once():
    for dtypes in (STORAGE_DTYPES, NEWER_DTYPES):
        assert all(dtype.newbyteorder("<") == dtype for dtype in dtypes.values())
    names = [name for name in STORAGE_DTYPES if name != "UntypedStorage"]
    assert len({STORAGE_DTYPES[name] for name in names} | set(NEWER_DTYPES.values())) == len(names) + len(NEWER_DTYPES)
    assert STORAGE_DTYPES["BFloat16Storage"].itemsize == 2 and STORAGE_DTYPES["UntypedStorage"] == np.uint8


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 1000, repr("a" * 60)),
        (b"x", "b'x'"),
        (3, "3"),
        (Global("os.system"), "the Python object 'os.system'"),
        (Opaque("a.b"), "the Python object 'a.b'"),
        ({"a": 1}, "a dict"),
        (None, "a NoneType"),
    ],
)
def test_descriptions_are_short(value, text):
    assert describe(value) == text


def test_an_object_that_holds_itself_is_described_and_compared():
    """Comparing by content would not end."""
    module = ScriptModule()
    module.attributes["itself"] = module
    assert describe(module) == "a ScriptModule" and module == module and module != ScriptModule()
