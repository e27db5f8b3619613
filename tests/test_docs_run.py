"""Commands and Python code of README and docs/ run as they are written, by the wheel, outside the checkout.

Training is cut to two steps (docs_world.SHORT), and models of random weights stand in for what is downloaded.
"""

import re

import pytest
from docs_world import World, add_results, build_world, remove_outputs
from test_docs import NAMES, PAGES, commands

TEXTS = dict(zip(NAMES, (page.read_text(encoding="utf-8") for page in PAGES), strict=True))
IN_ORDER = ["README.md", "docs/index.md", "docs/sampling.md", "docs/ranking.md", "docs/api/options.md",
            "docs/training-from-python.md"]  # fmt: skip
"""Pages whose blocks run one after the other in one folder; each command of the other pages runs in a fresh one."""
NOT_RUN = {
    "--download-from": "the archive must have the published MD5; tests/hub/test_download.py has its own archive",
    "convert epoch=7.ckpt": "tests/interop/test_mindalle.py converts such checkpoints",
    "convert vqgan_imagenet": "tests/interop/test_mindalle.py converts such checkpoints",
    "convert ViT-B-32.pt": "tests/interop/test_clip.py converts such files",
    "training.vgg_weights": "VGG and LPIPS are not distributed; tests/training/vqgan have random ones",
    "--config vqgan-f16-16384": "the published VQGAN takes minutes per step; tests/training/vqgan train a small one",
    "--config my.yaml": "tests/training/test_scratch.py trains from scratch",
    "--extend": "tests/training/test_extend.py extends runs",
    "emoji-model": "the slow tests of the recipe run it: tests/scripts/emoji",
    "scenes-model": "the slow tests of the recipe run it: tests/scripts/scenes",
}
"""Part of a command -> why it is not run here."""
ALONE = [
    (page, command)
    for page, text in TEXTS.items()
    if page not in IN_ORDER
    for command in dict.fromkeys(commands(text))
    if not any(part in command for part in NOT_RUN)
]


@pytest.fixture(scope="session")
def world(tmp_path_factory, installed, tiny_config, tiny_clip_folder, write_folder) -> World:
    return build_world(tmp_path_factory.mktemp("docs"), installed, tiny_config, tiny_clip_folder, write_folder)


@pytest.fixture(scope="session")
def world_with_results(world) -> World:
    add_results(world)
    return world


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks of a page."""
    return re.findall(r"^```(python|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", ["README.md", *(pytest.param(page, marks=pytest.mark.slow) for page in IN_ORDER if page != "README.md")]
)
def test_a_page_runs(world, tmp_path, page):
    """Python first, since the commands of these pages use what it saves."""
    folder, found = world.copy(tmp_path), blocks(TEXTS[page])
    code = "\n".join(code for language, code in found if language == "python")
    lines = [line for language, code in found if language == "sh" for line in code.splitlines()]
    lines = [line for line in lines if line.startswith("mindalle ")]
    assert code or lines
    for line in lines:
        remove_outputs(line, folder)
    world.python(code, folder)
    for line in lines:
        world.command(line, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), ALONE, ids=[f"{page}: {command}" for page, command in ALONE])
def test_a_command_runs(world_with_results, tmp_path, page, command):
    folder = world_with_results.copy(tmp_path)
    remove_outputs(command, folder)
    world_with_results.command(command, folder)


def test_every_reason_is_of_a_command():
    written = [command for text in TEXTS.values() for command in commands(text)]
    assert [part for part in NOT_RUN if not any(part in command for command in written)] == []
    assert len(ALONE) > 30


def test_python_blocks_of_all_pages_are_run():
    """Or are in a page of which nothing is run, and then have no code."""
    assert [page for page, text in TEXTS.items() if "```python" in text and page not in IN_ORDER] == []
