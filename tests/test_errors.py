"""Errors: each has its own exit code, and the documentation has them all."""

import importlib.metadata
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


@pytest.mark.parametrize(
    ("name", "names", "end"),
    [
        ("smaple", ["sample", "show"], "; did you mean sample?"),
        ("VIT-b/32", ["ViT-B/32", "ViT-L/14"], "; did you mean ViT-B/32?"),
        ("--num", ["--out", "--num-candidates"], "; did you mean --num-candidates?"),
        ("--n", ["--num-candidates"], ""),
        ("zebra", ["sample", "show"], ""),
        ("", ["sample"], ""),
    ],
)
def test_the_nearest_name_is_offered(name, names, end):
    assert errors.did_you_mean(name, names) == end


def test_a_hint_names_what_has_to_be_installed(monkeypatch):
    """The package itself is there, and is on no index; the version bounds are quoted for a shell."""
    hint = errors.install_hint("train")
    assert hint.startswith("pip install 'optax>=") and "'orbax-checkpoint<1,>=0.12'" in hint
    assert errors.install_hint("datasets") == "pip install 'datasets>=4'"

    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert errors.install_hint("train") == "pip install 'mindalle-jax[train]'"


def test_a_warning_is_of_the_line_outside_the_package():
    with pytest.warns(UserWarning, match="look here") as warned:
        errors.warn("look here")
    assert warned[0].filename == __file__
