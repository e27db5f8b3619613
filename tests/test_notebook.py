"""The panel of notebooks: what its buttons do, and the notebook itself, run by a real kernel as it stands."""

import base64
import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from mindalle_jax import Dalle, Generation, ImageGPT, SamplingOptions
from mindalle_jax.data.images import crop_square
from mindalle_jax.errors import UsageError
from mindalle_jax.notebook import Studio, studio

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "sample_interactively.ipynb"


@pytest.fixture(scope="module")
def demo() -> Dalle:
    return Dalle.from_pretrained("demo")


@pytest.fixture
def panel(demo, tmp_path, monkeypatch) -> Studio:
    """A panel of the demo that samples three candidates, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    panel = studio(demo)
    panel.prompt.value, panel.candidates.value = "a red star", 3
    return panel


@pytest.fixture(scope="module")
def generation(demo) -> Generation:
    """What Generate of that panel gives."""
    return demo("a red star", num_candidates=3)


def press(panel: Studio, name: str = "generate") -> None:
    """Presses a button and waits until its run is finished."""
    getattr(panel, f"{name}_button").click()
    panel.wait()
    assert not panel.generate_button.disabled and panel.stop_button.disabled


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def upload(panel: Studio, content: bytes, name: str = "photo.png") -> None:
    """Chooses a file, as the browser does."""
    file = {"name": name, "type": "", "size": len(content), "content": content, "last_modified": datetime.now()}
    panel.upload.value = (file,)


def png(width: int, height: int) -> bytes:
    """A file with an image of noise."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, format="PNG")
    return file.getvalue()


# ---------------------------------------- the notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Iterator[tuple[nbformat.NotebookNode, Callable[[str], str]]]:
    """The notebook, executed from top to bottom, and run(code) -> what it prints, in the kernel that did it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}

    def run(code: str) -> str:
        cell = nbformat.v4.new_code_cell(code)
        notebook.cells.append(cell)
        client.execute_cell(cell, len(notebook.cells) - 1)
        return "".join(output.text for output in cell.outputs if output.output_type == "stream").strip()

    with client.setup_kernel(env=environment):
        for i, cell in enumerate(list(notebook.cells)):
            client.execute_cell(cell, i)
        yield notebook, run


def test_committed_without_outputs():
    """Outputs in the repository are megabytes in every clone, and an image of one person's folders."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


def test_the_kernel_runs_this_code(executed):
    """Another checkout that happens to be installed would pass for this one."""
    _, run = executed
    python, package = run("import sys, mindalle_jax; print(sys.executable); print(mindalle_jax.__file__)").splitlines()
    assert python == sys.executable
    assert Path(package).resolve().is_relative_to(ROOT)


def test_top_to_bottom(executed, demo):
    """Every cell succeeds, the panel is on display, and the plain call shows what it shows everywhere."""
    notebook, _ = executed
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert not [output for cell in outputs.values() for output in cell if output.output_type == "error"]
    assert "float32" in outputs["load"][0].data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in outputs["panel"][0].data
    expected = demo("a parrot, 3d style", num_candidates=4)
    shown = pixels(base64.b64decode(outputs["call"][-1].data["image/png"]))
    np.testing.assert_array_equal(shown, pixels(expected._repr_png_()))
    best = pixels(base64.b64decode(outputs["best"][-1].data["image/png"]))
    np.testing.assert_array_equal(best, np.asarray(expected[0]))


def test_generate_in_the_kernel(executed, demo):
    """With the settings as they are the panel shows the images of generate, and prints nothing beside them."""
    notebook, run = executed
    assert run("panel.candidates.value = 4; panel.generate_button.click(); panel.wait()") == ""
    expected = demo(run("print(panel.prompt.value)"), num_candidates=4)
    text = run("import base64; print(base64.b64encode(panel.sheet.value).decode())")
    np.testing.assert_array_equal(pixels(base64.b64decode(text)), np.asarray(expected.grid(scale=2)))
    source = next(cell.source for cell in notebook.cells if cell.id == "result")
    assert f"candidates, best first: {expected.order}" in run(source)


# ---------------------------------------- Generate and Stop


def test_defaults_are_those_of_the_options(demo):
    panel, defaults = studio(demo), SamplingOptions()
    assert panel.prompt.value == demo.tokenizer.known_words.examples[0]
    for name, value in panel._options().items():
        assert name == "progress" or value == getattr(defaults, name), name
    panel.guidance_scale.value, panel.batch_size.value, panel.ranker.value = 2, "4", "CLIP model"
    panel.top_k.value, panel.clip.value = "off", "ViT-B/32"
    changed = {"guidance_scale": 2, "batch_size": 4, "ranker": "ViT-B/32", "top_k": None}
    assert panel._options() == panel._options() | changed


def test_generate(panel, demo):
    """The panel samples what the controls say; fewer images are shown on request, without sampling again."""
    panel.seed.value, panel.ranker.value, panel.best.value = 7, "likelihood", 2
    panel.top_k.value, panel.top_p.value, panel.temperature.value = "16", 0.9, 0.8
    press(panel)
    assert panel.messages.value == ""
    assert panel.status.value.startswith("3 images, ")
    expected = demo("a red star", num_candidates=3, seed=7, ranker="likelihood", top_k=16, top_p=0.9, temperature=0.8)
    np.testing.assert_array_equal(panel.result.codes, expected.codes)
    np.testing.assert_array_equal(panel.result.scores, expected.scores)
    np.testing.assert_array_equal(pixels(panel.sheet.value), np.asarray(expected.grid(2, scale=2)))
    panel.best.value = 3
    np.testing.assert_array_equal(pixels(panel.sheet.value), np.asarray(expected.grid(scale=2)))


def test_previews_and_stop(panel):
    """Images appear while they are sampled, two rows of 16 codes at a time; Stop ends the run a row later."""
    seen = []
    panel.sheet.observe(
        lambda _: (seen.append((panel.result.codes >= 0).sum(axis=1).tolist()), panel.stop_button.click()), "value"
    )
    press(panel)
    assert seen == [[32] * 3, [48] * 3]
    assert panel.status.value.startswith("stopped, 0 of 3 images complete, ")
    assert (panel.progress_bar.value, panel.progress_bar.max) == (3 * 48, 3 * 256)
    panel.vary_top.keep_rows.value = 4
    press(panel, "vary")
    assert "the first 4 rows of image 1 are not all sampled; keep fewer rows of it" in panel.messages.value
    panel.vary_top.keep_rows.value = 3
    np.testing.assert_array_equal(panel._codes_to_vary(), panel.result.codes[0, :48])


def test_runs_do_not_overlap(panel, demo, monkeypatch):
    """Two quick clicks start one run, and other buttons do nothing until it ends. Without previews one image comes."""
    calls, seen, go_on, stream = [], [], threading.Event(), demo.stream
    panel.previews.value = False
    panel.sheet.observe(lambda _: seen.append(panel.result.codes.min() >= 0), "value")

    def slow_stream(*arguments, **options):
        calls.append(options["num_candidates"])
        assert go_on.wait(60)
        return stream(*arguments, **options)

    monkeypatch.setitem(vars(demo), "stream", slow_stream)
    for _ in range(2):
        panel.generate_button.click()
    assert panel.generate_button.disabled and panel.save_button.disabled and not panel.stop_button.disabled
    panel.vary_button.click()
    go_on.set()
    panel.wait()
    assert calls == [3] and seen == [True] and panel.messages.value == ""


def test_new_seed(panel):
    panel.new_seed_button.click()
    assert panel.seed.value != 0


# ---------------------------------------- warnings and errors


def test_known_words(panel):
    """The panel lists them, and says which words of a prompt are none. HTML in a prompt is shown, not obeyed."""
    (words,) = [child for child in panel.children if getattr(child, "titles", ()) == ("Words that this model knows",)]
    assert "This model samples emoji of animals" in words.children[0].value
    assert "parrot" in words.children[0].value and words.selected_index is None
    panel.prompt.value = "a red apple by <img src=x>"
    panel.sheet.observe(lambda _: panel.stop_button.click(), "value")
    press(panel)
    assert panel.messages.value.startswith('<div style="color: chocolate">Warning: demo does not know')
    assert "apple by &lt;img src=x&gt;" in panel.messages.value and "<img" not in panel.messages.value
    press(panel)
    assert panel.messages.value.count("<div") == 1  # again, and not twice


def test_warnings_are_shown_whatever_the_filters_say(panel):
    """Notebooks often begin with filterwarnings("ignore"). Warnings of other threads go where they went before."""
    with warnings.catch_warnings(record=True) as elsewhere:
        warnings.simplefilter("ignore")
        with panel._warnings_shown():
            warnings.warn("of the panel", stacklevel=1)
            thread = threading.Thread(target=lambda: warnings.warn("of another", stacklevel=1))
            thread.start()
            thread.join()
    assert panel.messages.value == '<div style="color: chocolate">Warning: of the panel</div>'
    assert [str(warning.message) for warning in elsewhere] == ["of another"]


def test_guidance_of_a_model_without_caption_dropout(panel, demo, monkeypatch):
    """The panel shows the warning. Sampled without guidance here: to compile that takes long."""
    stream = demo.stream

    def unguided_stream(*arguments, **options):
        stream(*arguments, **options)  # warns, and does not sample yet
        return stream(*arguments, **options | {"guidance_scale": 1})

    monkeypatch.setitem(vars(demo), "stream", unguided_stream)
    panel.guidance_scale.value = 2
    panel.sheet.observe(lambda _: panel.stop_button.click(), "value")
    press(panel)
    assert "Warning: guidance_scale 2 costs twice the time" in panel.messages.value


@pytest.mark.parametrize(
    ("control", "value", "message"),
    [
        ("prompt", " ", "the prompt is blank; type what to sample"),
        ("prompt", "star " * 600, "has 3,000 characters; the limit is 2,000"),
        ("top_k", "99999", "top_k must be an integer in [1, 1024] (the number of codes), or off (None); not 99999"),
        ("top_k", "<b>", "top-k must be a whole number, or off; not &#x27;&lt;b&gt;&#x27;"),
        ("batch_size", "0", "batch_size must be an integer in [1, 4096], not 0"),
        ("clip", " ", "name the CLIP model: a folder"),
        ("clip", "/no/<b>", "/no/&lt;b&gt;: no such file or folder"),
    ],
)
def test_errors_are_one_line(panel, generation, control, value, message):
    """And the images from before stay."""
    panel.result = generation
    panel.ranker.value = "CLIP model" if control == "clip" else "auto"
    getattr(panel, control).value = value
    press(panel)
    assert panel.messages.value.startswith('<div style="color: crimson">Error: ')
    assert message in panel.messages.value and panel.messages.value.count("<") == 2
    assert panel.result is generation and panel.status.value == ""


def test_an_unexpected_error_is_shown(panel, demo, monkeypatch):
    """An exception in a thread would be lost otherwise, and the buttons stay gray."""

    def broken_stream(*_, **__):
        raise RuntimeError("first line <b>\nsecond line")

    monkeypatch.setitem(vars(demo), "stream", broken_stream)
    press(panel)
    line = "RuntimeError: first line &lt;b&gt; second line"
    assert panel.messages.value == f'<div style="color: crimson">Error: {line}</div>'


def test_buttons_without_an_image_say_so(panel):
    for name, line in {"vary": "no image to vary", "complete": "choose an image", "save": "nothing to save"}.items():
        press(panel, name)
        assert line in panel.messages.value and getattr(panel, f"{name}_button").disabled


# ---------------------------------------- Vary, Complete, Save


def test_vary(panel, demo, generation):
    """The top of the image chosen stays, which a thumbnail shows. A seed that gave the same image is not used again."""
    panel.result = generation
    panel.rank.max, panel.rank.value, panel.vary_top.keep_rows.value, panel.seed.value = 3, 2, 5, 9
    chosen = generation.order[1]
    thumbnail = pixels(panel.vary_top.thumbnail.value)
    np.testing.assert_array_equal(thumbnail[:20], generation.images[chosen][:20])
    assert (thumbnail[20:] == 128).all()
    press(panel, "vary")
    expected = demo.variations("a red star", generation.codes[chosen], keep_rows=5, num_candidates=3, seed=9)
    np.testing.assert_array_equal(panel.result.codes, expected.codes)
    np.testing.assert_array_equal(pixels(panel.sheet.value), np.asarray(expected.grid(scale=2)))
    np.testing.assert_array_equal(panel._codes_to_vary(), generation.codes[chosen][:80])
    assert panel.seed.value != 9


def test_complete(panel, demo):
    """A file of another size is cropped and resized, and the panel says so."""
    upload(panel, png(90, 70))
    assert panel.upload_note.value == (
        "photo.png is 90 x 70 pixels; the square in its center is used, resized to 64 x 64"
    )
    panel.complete_top.keep_rows.value, bar = 10, []
    panel.progress_bar.observe(lambda change: bar.append(change["new"]), "value")
    press(panel, "complete")
    image = crop_square(Image.open(io.BytesIO(png(90, 70))), 64, None)
    expected = demo.complete("a red star", image, keep_rows=10, num_candidates=3)
    np.testing.assert_array_equal(panel.result.codes, expected.codes)
    assert bar == [3 * 16 * rows for rows in range(1, 7)] and panel.progress_bar.max == 3 * 16 * 6


@pytest.mark.parametrize("content", [b"", b"<svg/>", png(64, 64)[:2000]], ids=["empty", "svg", "truncated"])
def test_a_damaged_file_is_refused(panel, content):
    """The file chosen before is no longer used."""
    upload(panel, png(64, 64), "good.png")
    assert panel.upload_note.value == "good.png is 64 x 64 pixels" and not panel.complete_button.disabled
    upload(panel, content, "<i>.png")
    assert "Error: &lt;i&gt;.png: " in panel.messages.value and panel.messages.value.count("<") == 2
    assert panel.upload_note.value == "" and panel.complete_button.disabled


def test_save(panel, generation, tmp_path, monkeypatch):
    """The images shown are written to a numbered folder, the next ones to the next; a used folder is refused."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    panel.result, panel.best.value = generation, 2
    for folder in ("001", "002"):
        assert panel.folder.value == f"out/{folder}"
        panel.save_button.click()
        path = tmp_path / "out" / folder
        line = f"Done: 2 images, grid.png and meta.json are in {path}"
        assert panel.messages.value == f'<div style="color: seagreen">{line}</div>'
        assert len(list(path.glob("rank*.png"))) == 2
    panel.folder.value = "out/001"
    panel.save_button.click()
    assert "exists and is not empty" in panel.messages.value
    panel.folder.value = "~/mine"
    panel.save_button.click()
    assert (tmp_path / "home" / "mine" / "grid.png").is_file() and panel.folder.value == "out/003"


# ---------------------------------------- which models, and what is installed


def test_an_image_only_model_has_a_class_chooser(tiny_igpt_model_folder):
    """It has no prompt, no guidance and no CLIP model to choose. A class is what it samples."""
    model = ImageGPT.from_pretrained(tiny_igpt_model_folder)
    panel = studio(model)
    assert (panel.prompt.description, panel.prompt.max) == ("class", 4)
    assert "CLIP model" not in panel.ranker.options and panel.guidance_scale.layout.display == "none"
    panel.prompt.value, panel.candidates.value, panel.ranker.value = 3, 3, "likelihood"
    press(panel)
    expected = model.generate(3, num_candidates=3, ranker="likelihood")
    np.testing.assert_array_equal(panel.result.codes, expected.codes)
    np.testing.assert_array_equal(pixels(panel.sheet.value), np.asarray(expected.grid(scale=4)))
    np.testing.assert_array_equal(panel._codes_to_vary(), expected.codes[expected.order[0], :16])


def test_a_model_without_known_words(tiny_dalle, monkeypatch):
    """The published model is one, and large: on CPU it samples few candidates."""
    monkeypatch.setattr("mindalle_jax.notebook.SMALL", 0)
    panel = studio(tiny_dalle)
    assert panel.candidates.value == 4
    assert panel.prompt.value == "a painting of a cat with sunglasses in the frame"
    assert not any("Words" in title for child in panel.children for title in getattr(child, "titles", ()))
    assert panel.top_k.value == "80"  # all codes: it has fewer than 256


def test_anything_else_is_refused():
    with pytest.raises(UsageError, match=r"studio\(Dalle.from_pretrained\('demo'\)\), not 'demo'"):
        studio("demo")


def test_ipywidgets_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "mindalle_jax.notebook")
    with pytest.raises(ModuleNotFoundError, match="^mindalle_jax.notebook needs ipywidgets: pip install ipywidgets$"):
        import mindalle_jax.notebook  # noqa: F401
