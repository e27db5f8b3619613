"""CONTRIBUTING.md: the files and functions that it names are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def has(file: Path, name: str) -> bool:
    """Whether a file defines a function, a class, or a method as `Class.method`."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not found:
            return False
        body = found[0].body
    return True


def test_the_walks_name_what_is_there():
    named = re.findall(r"`([\w/]+\.py)::([\w.]+)`", TEXT)
    assert len(named) >= 15
    assert [f"{path}::{name}" for path, name in named if not has(ROOT / path, name)] == []


def test_the_files_that_are_named_exist():
    paths = re.findall(r"`((?:mindalle_jax|tests|docs)/[\w/]+(?:\.\w+)?)(?:::[\w.]+)?`", TEXT)
    assert [path for path in paths if not (ROOT / path).exists() and "/a/" not in path] == []


def test_the_order_of_the_rooms_is_that_of_the_layout_test():
    from test_layout import ROOMS

    block = TEXT.split("imports run downwards in this list only:")[1].split("`tests/test_layout.py`")[0].split()
    assert block == ["cli", *("/".join(names) for names in ROOMS[1:])]


def test_the_targets_of_make_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", TEXT, re.MULTILINE)
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_a_name_that_is_gone_is_found(tmp_path):
    (tmp_path / "a.py").write_text("def f(): ...\nclass C:\n    def g(self): ...\n")
    assert has(tmp_path / "a.py", "f") and has(tmp_path / "a.py", "C.g")
    assert not has(tmp_path / "a.py", "g") and not has(tmp_path / "a.py", "C.f")
