"""Errors: each has its own exit code, and the documentation has them all."""

import re

import pytest
from commands import ROOT

from mindalle_jax import errors


def test_the_table_of_exit_codes_is_errors_py():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\w*) ?\| (.+) \|$", text, re.MULTILINE)
    classes = [errors.MindalleError, *errors.MindalleError.__subclasses__()]
    expected = {cls.exit_code: cls.__name__ for cls in classes} | {0: "", 130: ""}
    assert len(expected) == len(classes) + 2, "two errors have the same code"
    assert [(int(code), name) for code, name, _ in rows] == sorted(expected.items())


BUILT_IN = {
    errors.UsageError: ValueError,
    errors.ConfigError: ValueError,
    errors.CheckpointError: ValueError,
    errors.DownloadError: OSError,
    errors.OutputError: OSError,
    errors.NonFiniteError: ArithmeticError,
    errors.DeviceMemoryError: MemoryError,
    errors.DataError: ValueError,
}


def test_every_error_is_one_of_ours_and_one_of_pythons():
    """A program may catch MindalleError, or what it would catch anyway."""
    assert set(errors.MindalleError.__subclasses__()) == set(BUILT_IN)
    for error, built_in in BUILT_IN.items():
        assert issubclass(error, built_in)
        assert str(error("what was wrong")) == "what was wrong"  # OSError shows an errno where it is given two values


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n\n  two\tthree "), "one two three"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("x" * 400), "x" * 300),
        (FileNotFoundError(2, "No such file", "a.png"), "[Errno 2] No such file: 'a.png'"),
    ],
    ids=["lines", "empty", "blank", "long", "OSError"],
)
def test_errors_of_others_become_one_line(error, line):
    """An error of XLA has hundreds of lines, and some have no text at all."""
    assert errors.one_line(error) == line
