"""README and docs/: links lead somewhere, commands parse, and modules that are named exist."""

import re
import shlex
from pathlib import Path

import pytest

from mindalle_jax import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```.*?^```|    .*?)$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, no signs, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Targets inside the repository that do not exist."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if re.match(r"https?:", target):
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    return dead


def commands(text: str) -> list[str]:
    """Lines of code that run `mindalle`; `\\` at the end of one continues it."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^ {4}(.+)$", text.replace("\\\n", " "), re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("mindalle ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        cli.verb_parser(words[1]).parse(words[2:])  # exits where it does not parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_run_exist(page):
    for module in re.findall(r"python -m (scripts[\w.]+\w)", page.read_text(encoding="utf-8")):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_a_page_that_is_wrong_is_found(tmp_path):
    """A missing file, a missing heading, and an option that does not exist."""
    page = tmp_path / "a.md"
    page.write_text(
        "# One, two\n[x](b.md) [y](#one-two) [z](#three) `[code](c.md)` [w](https://example.org)\n\n"
        "    mindalle sample 'a cat' \\\n      --sed 1\n    other\n"
    )
    assert dead_links(page) == ["b.md", "#three"]
    (command,) = commands(page.read_text())
    with pytest.raises(SystemExit):
        cli.verb_parser("sample").parse(shlex.split(command)[2:])
