"""The notebook: run by a real kernel as it stands, its buttons pressed, its picture compared with generate."""

import base64
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from mindalle_jax import ClipRanker, Dalle

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "sample_interactively.ipynb"

PROMPT = "a large striped green circle to the left of a small red heart on a grey background"

PRESS = """
import threading

generate_button.click()
for thread in threading.enumerate():
    if "(generate)" in thread.name:
        thread.join()
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Iterator[tuple[nbformat.NotebookNode, Callable[[str], str]]]:
    """The notebook, executed from top to bottom, and run(code) -> what it prints, in the kernel that did it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    own = {"MINDALLE_MODEL", "MINDALLE_RANKER"}
    environment = {name: value for name, value in os.environ.items() if name not in own} | {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
    }

    def run(code: str) -> str:
        cell = nbformat.v4.new_code_cell(code)
        notebook.cells.append(cell)
        client.execute_cell(cell, len(notebook.cells) - 1)
        return "".join(output.text for output in cell.outputs if output.output_type == "stream").strip()

    with client.setup_kernel(env=environment):
        for i, cell in enumerate(list(notebook.cells)):
            client.execute_cell(cell, i)
        yield notebook, run


@pytest.fixture(scope="module")
def demo() -> tuple[Dalle, ClipRanker]:
    return Dalle.from_pretrained("demo"), ClipRanker.from_pretrained("demo")


@pytest.fixture
def run(executed) -> Callable[[str], str]:
    return executed[1]


def shown(run: Callable[[str], str]) -> np.ndarray:
    """Pixels of the picture in the panel."""
    text = run("import base64; print(base64.b64encode(picture.value).decode())")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_committed_without_outputs():
    """Outputs in the repository are megabytes in every clone, and a picture of one person's folders."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


def test_the_kernel_runs_this_code(run):
    """Another checkout that happens to be installed would pass for this one."""
    python, package = run("import sys, mindalle_jax; print(sys.executable); print(mindalle_jax.__file__)").splitlines()
    assert python == sys.executable
    assert Path(package).resolve().is_relative_to(ROOT)


def test_top_to_bottom(executed, demo):
    """Every cell succeeds, the panel is on display, and in it the grid that generate makes of the same settings."""
    notebook, run = executed
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert not [output for cell in outputs.values() for output in cell if output.output_type == "error"]
    assert "float32" in outputs["load"][0].text
    assert "application/vnd.jupyter.widget-view+json" in outputs["panel"][0].data
    model, ranker = demo
    expected = model.generate(PROMPT, num_candidates=16, ranker=ranker)
    np.testing.assert_array_equal(shown(run), np.asarray(expected.grid()))
    assert str(expected.order) in outputs["numbers"][0].text
    variations = Image.open(io.BytesIO(base64.b64decode(outputs["variations"][-1].data["image/png"])))
    assert variations.height == 64 + 14 + 8  # a row of pictures, its captions, gaps above and below


def test_generate_button(run, demo):
    """It draws what the controls say; fewer are shown on request, without drawing again."""
    run("prompt.value, seed.value, candidates.value, best.value = 'a red star', 7, 6, 3; ranker.value = 'likelihood'")
    run("top_k.value, top_p.value, temperature.value = 16, 0.9, 0.8" + PRESS)
    assert run("print(messages.value, generate_button.disabled)") == "False"
    expected = demo[0].generate(
        "a red star", num_candidates=6, seed=7, top_k=16, top_p=0.9, temperature=0.8, ranker="likelihood"
    )
    np.testing.assert_array_equal(shown(run), np.asarray(expected.grid(best=3)))
    run("best.value = 5")
    np.testing.assert_array_equal(shown(run), np.asarray(expected.grid(best=5)))


def test_previews_and_stop(run):
    """Pictures appear while they are drawn, two rows of 16 codes at a time; Stop leaves what there is a row later."""
    run("prompt.value, candidates.value, seen = 'a red star', 3, []")
    run("picture.observe(lambda _: (seen.append((result.codes >= 0).sum(axis=1)), stop_button.click()), 'value')")
    run(PRESS + "picture.unobserve_all()")
    assert run("print(*seen)") == "[32 32 32] [48 48 48]"
    assert run("print(generate_button.disabled, stop_button.disabled)") == "False True"


def test_warnings_are_shown(run):
    run(f"prompt.value, candidates.value = {'red star ' * 40!r}, 1" + PRESS)
    assert "color: darkorange" in run("print(messages.value)") and "are used" in run("print(messages.value)")


def test_errors_are_one_line(run):
    """And the pictures from before stay."""
    run("prompt.value, before = ' ', result" + PRESS)
    assert run("print(messages.value)") == (
        '<div style="color: crimson">the prompt is blank; pass allow_empty=True to sample without text</div>'
    )
    assert run("print(result is before)") == "True"


def test_new_seed(run):
    assert run("seed.value = 0; new_seed.click(); print(seed.value)") != "0"


def test_save(run, tmp_path):
    """What is shown is written, once; a folder that holds something is refused."""
    run("prompt.value, candidates.value, best.value = 'a red star', 3, 2" + PRESS)
    save = f"folder.value = {str(tmp_path / 'new')!r}; save_button.click(); print(messages.value)"
    assert "color: green" in run(save)
    assert len(list((tmp_path / "new").glob("rank*.png"))) == 2
    message = run(save)
    assert "color: crimson" in message and "exists and is not empty" in message
