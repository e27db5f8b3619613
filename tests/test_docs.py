"""README and docs/: links lead somewhere, commands parse, and modules that are named exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from mindalle_jax import cli

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
HERE = re.compile(rf"{re.escape(REPOSITORY)}/(?:blob|tree|raw)/main/")
"""An address of a file of this repository."""
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```.*?^```|    .*?)$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Headings as GitHub makes them anchors: lower case, no signs, hyphens for spaces. Names of the API reference."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))


def dead_links(page: Path) -> list[str]:
    """Targets inside the repository that do not exist."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if HERE.match(name):
            file = ROOT / HERE.sub("", name)
        elif re.match(r"https?:", target):
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    return dead


def commands(text: str) -> list[str]:
    """Lines of code that run `mindalle`; `\\` at the end of one continues it."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```(?:console|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^ {4}(.+)$", text, re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("mindalle ")]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page):
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        cli.verb_parser(words[1]).parse(words[2:])  # exits where it does not parse


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_modules_that_are_run_exist(page):
    for module in re.findall(r"python -m (scripts[\w.]+\w)", page.read_text(encoding="utf-8")):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_a_page_that_is_wrong_is_found(tmp_path):
    """A missing file, a missing heading, and an option that does not exist."""
    page = tmp_path / "a.md"
    page.write_text(
        f"# One, two\n[p]({REPOSITORY}/blob/main/README.md) [q]({REPOSITORY}/blob/main/no.md)\n"
        "[x](b.md) [y](#one-two) [z](#three) `[code](c.md)` [w](https://example.org)\n\n"
        "    mindalle sample 'a cat' \\\n      --sed 1\n    other\n"
    )
    assert dead_links(page) == [f"{REPOSITORY}/blob/main/no.md", "b.md", "#three"]
    (command,) = commands(page.read_text())
    with pytest.raises(SystemExit):
        cli.verb_parser("sample").parse(shlex.split(command)[2:])


def test_pages_of_the_site_link_to_the_repository_by_its_address():
    """A relative link out of docs/ leads nowhere in the site."""
    outside = [
        (page.name, target)
        for page in (ROOT / "docs").rglob("*.md")
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
        if not (page.parent / target.partition("#")[0]).resolve().is_relative_to(ROOT / "docs")
    ]
    assert outside == []


def test_one_address_of_the_repository():
    for name in ("mkdocs.yml", "CITATION.cff"):
        assert REPOSITORY in (ROOT / name).read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation():
    """A page that no menu has is never found."""
    listed = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")
    )
