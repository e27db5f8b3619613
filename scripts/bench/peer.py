"""Finds what is missing to time a clone of the original repository. Imports neither torch nor jax."""

import ast
import importlib.util
from pathlib import Path

NETWORK = "dalle/models/stage2/transformer.py"
SAMPLING = "dalle/utils/sampling.py"


def missing(clone: Path) -> str | None:
    """One sentence that says which file is missing or what to install; None if nothing is missing."""
    modules = {"torch"}
    unread = [clone / NETWORK, clone / SAMPLING]
    read = set()
    while unread:
        file = unread.pop()
        if not file.is_file():
            return f"{file} is missing: {clone} is no clone of the original repository"
        read.add(file)
        absolute, siblings = imports(file)
        modules |= absolute
        unread += [sibling for sibling in siblings if sibling not in read]
    absent = sorted(name for name in modules if importlib.util.find_spec(name) is None)
    if not absent:
        return None
    names = " ".join(name.replace("_", "-") for name in absent)
    return f"the original's code imports {', '.join(absent)}, not installed here: pip install {names}"


def imports(file: Path) -> tuple[set[str], list[Path]]:
    """(top-level names of the packages that a module imports, files beside it that it imports)."""
    absolute, siblings = set(), []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            absolute.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            siblings += [folder / f"{name.replace('.', '/')}.py" for name in names]
    return absolute, siblings
