"""The rooms of the package: imports run downwards, no circles, no long files, and each module has its tests.

Imports are read from the source with ast, so those inside functions and under TYPE_CHECKING count too: they tell what a
file needs to be understood.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mindalle_jax"
MAX_LINES = 450

ROOMS = [
    ("cli", "__main__"),
    ("notebook",),
    ("serve", "evaluation", "bulk", "plan"),
    ("training",),
    ("pipeline", "image_gpt"),
    ("base_model",),
    ("ranking",),
    ("sampling",),
    ("hub",),
    ("interop",),
    ("data",),
    ("storage",),
    ("runtime",),
    ("text",),
    ("models",),
    ("config",),
    ("errors",),
]
"""Folders and files of the package, a line a level: each imports from its own level and from those below."""

WITHOUT_MIRROR: set[str] = set()
"""Modules that no test file of the same name stands for. It may only become shorter."""
LONG_FILES: set[str] = set()
"""Files of more than MAX_LINES lines. It may only become shorter."""


def modules(root: Path, package: str = PACKAGE) -> dict[str, Path]:
    """Dotted name -> file, of every module below `root`/`package`; a folder's __init__.py has the folder's name."""
    files = sorted((root / package).rglob("*.py"))
    names = (".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return dict(zip(names, files, strict=True))


def imports(name: str, file: Path, known: dict[str, Path], package: str = PACKAGE) -> Iterator[str]:
    """The modules of the package that a file imports. `import package` for its public names is none."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, attribute in targets:
            if f"{base}.{attribute}" in known:
                yield f"{base}.{attribute}"
            elif base.split(".")[0] == package and base != package:
                yield base


def graph(root: Path, package: str = PACKAGE) -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    known = modules(root, package)
    return {name: set(imports(name, file, known, package)) for name, file in known.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of modules that import each other; empty where there is none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
        return []
    except graphlib.CycleError as error:
        return error.args[1]


def upward_imports(edges: dict[str, set[str]], rooms: list[tuple[str, ...]]) -> list[str]:
    """What imports a room of a higher level, or lies in no room, in words."""
    level = {room: number for number, names in enumerate(rooms) for room in names}
    wrong = []
    for name, targets in edges.items():
        if "." not in name:  # the package itself, whose public names come from anywhere
            continue
        room = name.split(".")[1]
        if room not in level:
            wrong.append(f"{name} is in no room of the list")
            continue
        for target in sorted(targets):
            if level.get(target.split(".")[1], -1) < level[room]:
                wrong.append(f"{name} imports {target}")
    return wrong


def mirror(file: Path) -> Path:
    """The test file of a module: a/b.py has a/test_b.py, and a/__init__.py has a/test_a.py.

    At the top __init__.py has test_init.py, and __main__.py has test_main.py.
    """
    name = file.parent.name if file.name == "__init__.py" else file.stem
    return file.with_name(f"test_{(name or file.stem).strip('_')}.py")


def without_mirror(root: Path, package: str = PACKAGE) -> set[str]:
    """Modules with something in them and without a test file of their name below tests/."""
    files = {file.relative_to(root / package) for file in modules(root, package).values() if file.stat().st_size}
    return {file.as_posix() for file in files if not (root / "tests" / mirror(file)).is_file()}


def test_no_module_imports_itself_by_a_detour():
    assert circle(graph(ROOT)) == []


def test_imports_run_downwards():
    assert upward_imports(graph(ROOT), ROOMS) == []


def test_no_file_is_long():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in modules(ROOT).values()}
    long = {file.relative_to(ROOT / PACKAGE).as_posix() for file, count in lines.items() if count > MAX_LINES}
    assert long == LONG_FILES


def test_every_module_has_a_test_file_of_its_name():
    assert without_mirror(ROOT) == WITHOUT_MIRROR


# The tests of these tests


@pytest.fixture
def tree(tmp_path):
    """tree({file: source}) -> folder with a package `p` of these files."""

    def write(files: dict[str, str]) -> Path:
        for name, source in files.items():
            path = tmp_path / "p" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(source, encoding="utf-8")
        return tmp_path

    return write


IMPORTS = {
    "plain": "import p.low.b",
    "from the module": "from p.low.b import x",
    "from the room": "from p.low import b",
    "relative": "from ..low import b",
    "in a function": "def f():\n    from p.low.b import x",
    "under TYPE_CHECKING": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.low.b import x",
}


@pytest.mark.parametrize("source", IMPORTS.values(), ids=IMPORTS)
def test_an_upward_import_is_found(tree, source):
    edges = graph(tree({"high/a.py": source, "low/b.py": ""}), "p")
    assert edges["p.high.a"] == {"p.low.b"}
    assert upward_imports(edges, [("high",), ("low",)]) == []
    assert upward_imports(edges, [("low",), ("high",)]) == ["p.high.a imports p.low.b"]
    assert upward_imports(edges, [("low", "high")]) == []
    assert upward_imports(edges, [("low",)]) == [
        "p.high is in no room of the list",
        "p.high.a is in no room of the list",
    ]


@pytest.mark.parametrize("source", IMPORTS.values(), ids=IMPORTS)
def test_a_circle_is_found(tree, source):
    edges = graph(tree({"high/a.py": source, "low/b.py": "def f():\n    from p.low import c", "low/c.py": ""}), "p")
    assert circle(edges) == []
    edges = graph(tree({"low/c.py": "from p.high import a"}), "p")
    assert set(circle(edges)) == {"p.high.a", "p.low.b", "p.low.c"}


def test_public_names_are_no_import_of_a_room(tree):
    """`import p` for its version, and p/__init__.py, which takes names from everywhere."""
    root = tree({"__init__.py": "from p.a import x", "a.py": "import p\nfrom p import x", "b.py": "from p import a"})
    edges = graph(root, "p")
    assert edges == {"p": {"p.a"}, "p.a": set(), "p.b": {"p.a"}}
    assert upward_imports(edges, [("b",), ("a",)]) == [] == circle(edges)


def test_a_missing_mirror_is_found(tree):
    root = tree({"room/__init__.py": "x = 1", "room/a.py": "", "room/b.py": "x = 1", "c.py": "x = 1", "d/e.py": "x"})
    tree({"__init__.py": "x = 1", "__main__.py": "x = 1"})
    assert without_mirror(root, "p") == {
        "room/__init__.py",
        "room/b.py",
        "c.py",
        "d/e.py",
        "__init__.py",
        "__main__.py",
    }
    for name in ("room/test_room.py", "test_c.py", "test_init.py", "test_main.py"):
        (root / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tests" / name).touch()
    assert without_mirror(root, "p") == {"room/b.py", "d/e.py"}
