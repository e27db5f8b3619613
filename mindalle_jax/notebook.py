"""A panel for Jupyter: a prompt, the settings, and images that appear while they are sampled. Needs ipywidgets.

    from mindalle_jax.notebook import studio

    panel = studio(model)
    panel           # as the last line of a cell: shows the panel
    panel.result    # the Generation that it shows

A button starts a thread, so that the kernel stays free to hear Stop.
"""

import contextlib
import dataclasses
import html
import io
import itertools
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindalle_jax.base_model import SMALL
from mindalle_jax.data.images import crop_square, decode_image
from mindalle_jax.errors import MindalleError, UsageError, one_line
from mindalle_jax.image_gpt import ImageGPT
from mindalle_jax.pipeline import Dalle
from mindalle_jax.sampling.options import Progress, SamplingKeywords, SamplingOptions
from mindalle_jax.sampling.result import NOT_SAMPLED, SHOWN_PIXELS, Generation
from mindalle_jax.storage.weights import count_parameters
from mindalle_jax.text.known_words import KnownWords

try:
    import ipywidgets as widgets
except ModuleNotFoundError:
    raise ModuleNotFoundError("mindalle_jax.notebook needs ipywidgets: pip install ipywidgets") from None

EXAMPLE_PROMPT = "a painting of a cat with sunglasses in the frame"
"""For a model that names no examples."""
CANDIDATES_ON_CPU = 4
"""Default for a large model on CPU, where each image takes long."""
SAVE_FOLDER = Path("out")
"""Results go to numbered folders in it."""
COLORS = {"Done": "seagreen", "Warning": "chocolate", "Error": "crimson"}
"""First word of a line under the buttons -> its color, readable on white and on black."""

DOCS = {field.name: field.metadata["doc"].replace(" (None)", "") for field in dataclasses.fields(SamplingOptions)}
STYLE = {"description_width": "7em"}
WRAPPED = {"flex_flow": "row wrap"}
NARROW = {"style": STYLE, "layout": {"width": "25em"}}

_one_panel_samples = threading.Lock()
"""Held by the panel that samples: warnings are caught for the whole process, and two panels would mix theirs up."""


def studio(model: Dalle | ImageGPT) -> "Studio":
    """Makes a panel for a notebook: a prompt, the options, and images that appear while they are sampled.

    Args:
        model: a loaded model.

    Returns:
        The panel. As the last line of a cell it is shown.

    Raises:
        UsageError: model is something else.
    """
    if not isinstance(model, (Dalle, ImageGPT)):
        raise UsageError(f"studio takes a loaded model, studio(Dalle.from_pretrained('demo')), not {model!r:.60}")
    return Studio(model)


class Studio(widgets.VBox):
    """The panel that `studio` makes. Nothing is sampled before a button is pressed.

    Its controls are attributes: `panel.seed.value = 7; panel.generate_button.click(); panel.wait()`.

    Attributes:
        model: the model that samples.
        result: the Generation that the panel shows. It is unfinished while it is sampled, and None before the first.
    """

    def __init__(self, model: Dalle | ImageGPT):
        """Makes the panel of a loaded model.

        Args:
            model: the model that samples.
        """
        self.model = model
        self.result: Generation | None = None
        self._running, self._stop, self._thread = threading.Lock(), threading.Event(), None
        self._uploaded: np.ndarray | None = None  # uint8[H, W, 3]

        prompt = self._make_prompt()
        tabs = self._make_tabs()
        self.generate_button = widgets.Button(description="Generate", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress_bar, self.status = widgets.IntProgress(), widgets.Label()
        self.messages = widgets.HTML()
        self.sheet = widgets.Image(layout={"max_width": "100%", "align_self": "flex-start", "display": "none"})
        buttons = widgets.HBox([self.generate_button, self.stop_button, self.progress_bar, self.status], layout=WRAPPED)
        super().__init__([*prompt, tabs, buttons, self.messages, self.sheet])

        self.new_seed_button.on_click(lambda _: self._change_seed())
        self.generate_button.on_click(lambda _: self._start(lambda: None))
        self.vary_button.on_click(lambda _: self._start(self._codes_to_vary))
        self.complete_button.on_click(lambda _: self._start(self._codes_to_complete))
        self.stop_button.on_click(lambda _: self._stop.set())
        self.save_button.on_click(lambda _: self._save())
        self.upload.observe(lambda _: self._take_upload(), "value")
        self.best.observe(lambda _: self._show(), "value")
        self.rank.observe(lambda _: self._refresh(), "value")
        self._refresh()

    def wait(self) -> None:
        """Waits until the run that a button has started is finished."""
        if self._thread is not None:
            self._thread.join()

    # ---------------------------------------- controls

    def _make_prompt(self) -> list[Any]:
        """The text box with the words that the model knows, or the class chooser of an image-only model."""
        wide: dict[str, Any] = {"style": STYLE, "layout": {"width": "auto"}}
        if isinstance(self.model, ImageGPT):
            classes = self.model.num_classes
            chooser = classes and widgets.BoundedIntText(max=classes - 1, description="class", **NARROW)
            self.prompt = chooser or None
            return [self.prompt] if self.prompt else []
        known_words = self.model.tokenizer.known_words
        examples = () if known_words is None else known_words.examples
        self.prompt = widgets.Text(examples[0] if examples else EXAMPLE_PROMPT, description="prompt", **wide)
        if known_words is None:
            return [self.prompt]
        return [self.prompt, widgets.Accordion([_word_list(known_words)], titles=("Words that this model knows",))]

    def _make_settings(self) -> Any:
        """One control per option, with the default of SamplingOptions."""
        default, stage2 = SamplingOptions(), self.model.config.stage2
        few = self.model.backend == "cpu" and count_parameters(self.model.config, "stage2") > SMALL
        count = CANDIDATES_ON_CPU if few else default.num_candidates
        self.seed = widgets.BoundedIntText(default.seed, max=2**32 - 1, description="seed", **NARROW)
        self.new_seed_button = widgets.Button(description="New seed", layout={"width": "7em"})
        self.candidates = widgets.IntSlider(count, min=1, max=128, description="candidates", **NARROW)
        self.best = widgets.IntSlider(default.num_candidates, min=1, max=128, description="show best", **NARROW)
        rankers = ["auto", "likelihood", "off"] + ([] if isinstance(self.model, ImageGPT) else ["CLIP model"])
        self.ranker = widgets.Dropdown(options=rankers, description="ranker", **NARROW)
        self.clip = widgets.Text(placeholder="folder, ViT-B/32, OWNER/NAME", description="CLIP model", **NARROW)
        self.top_k = widgets.Text(
            str(min(int(default.top_k or 0), stage2.vocab_size_img)), placeholder="off", description="top-k", **NARROW
        )
        self.top_p = widgets.FloatSlider(1, min=0.01, max=1, step=0.01, description="top-p", **NARROW)
        self.temperature = widgets.FloatSlider(
            default.temperature, max=2, step=0.05, description="temperature", **NARROW
        )
        self.guidance_scale = widgets.FloatSlider(
            default.guidance_scale, min=1, max=10, step=0.25, description="guidance", **NARROW
        )
        self.batch_size = widgets.Text(placeholder="auto", description="batch size", **NARROW)
        self.previews = widgets.Checkbox(True, description="show previews", indent=False)
        self.candidates.tooltip = DOCS["num_candidates"]
        for name in ("seed", "ranker", "top_k", "top_p", "temperature", "guidance_scale", "batch_size"):
            getattr(self, name).tooltip = DOCS[name]
        self.guidance_scale.layout.display = "none" if isinstance(self.model, ImageGPT) else None
        self.clip.layout.display = "none"
        self.ranker.observe(lambda _: self._refresh(), "value")
        columns = [
            [widgets.HBox([self.seed, self.new_seed_button]), self.candidates, self.best, self.ranker, self.clip],
            [self.top_k, self.top_p, self.temperature, self.guidance_scale],
            [self.batch_size, self.previews],
        ]
        return widgets.HBox([widgets.VBox(column) for column in columns], layout=WRAPPED)

    def _make_tabs(self) -> Any:
        """Makes the tabs: the settings, and what can be done with a result or with an uploaded image."""
        side = self.model.code_size
        self.rank = widgets.IntSlider(1, min=1, max=1, description="image", **NARROW)
        self.vary_button = widgets.Button(description="Vary")
        self.vary_top = _TopOfImage(side, side // 4, [self.rank], self.vary_button)
        self.upload = widgets.FileUpload(accept=".png,.jpg,.jpeg,.webp", description="Choose a file")
        self.upload_note = widgets.HTML()
        self.complete_button = widgets.Button(description="Complete")
        self.complete_top = _TopOfImage(side, side // 2, [self.upload, self.upload_note], self.complete_button)
        self.folder = widgets.Text(str(_free_folder()), description="folder", style=STYLE)
        self.save_button = widgets.Button(description="Save")
        vary = "Keeps the top of an image (1 is the best), and samples the rest anew with the prompt and the settings."
        complete = "Keeps the top of an image of your own, and samples the rest with the prompt and the settings."
        return widgets.Tab(
            [
                self._make_settings(),
                widgets.VBox([widgets.Label(vary), self.vary_top]),
                widgets.VBox([widgets.Label(complete), self.complete_top]),
                widgets.VBox(
                    [widgets.Label("Writes the images shown."), widgets.HBox([self.folder, self.save_button])]
                ),
            ],
            titles=("Settings", "Vary image", "Complete image", "Save images"),
        )

    # ---------------------------------------- sampling

    def _start(self, prompt_codes: Callable[[], np.ndarray | None]) -> None:
        """Samples in a thread, unless this panel samples already.

        prompt_codes: gives the codes int32[m] that every image begins with. It runs in the thread, where its errors are
        shown.
        """
        if not self._running.acquire(blocking=False):
            return
        self._stop.clear()
        self._refresh()
        self._thread = threading.Thread(target=self._run, args=(prompt_codes,), name="studio")
        self._thread.start()

    def _run(self, prompt_codes: Callable[[], np.ndarray | None]) -> None:
        try:
            with self._errors_shown(), _one_panel_samples, self._warnings_shown():
                self._sample(prompt_codes())
        finally:
            self._running.release()
            self._refresh()

    def _sample(self, prompt_codes: np.ndarray | None) -> None:
        subject: Any = None if self.prompt is None else self.prompt.value
        if isinstance(subject, str) and not subject.strip():
            raise UsageError("the prompt is blank; type what to sample")
        options: Any = self._options()
        started, side = time.monotonic(), self.model.code_size
        given = 0 if prompt_codes is None else len(prompt_codes)
        self.progress_bar.value, self.progress_bar.max = 0, self.candidates.value * (side * side - given)
        self.status.value = "starting; the first time takes longer, because programs are compiled"

        def advance(done: Progress) -> bool:
            total = done.codes_total - given
            self.progress_bar.value = done.candidates.start * total + len(done.candidates) * (done.codes - given)
            self.status.value = f"{100 * self.progress_bar.value // self.progress_bar.max} % of the codes"
            return self._stop.is_set()

        every = 2 * side if self.previews.value else None
        stream: Any = self.model.stream
        summary = ""
        try:
            for generation in stream(subject, every=every, prompt_codes=prompt_codes, callback=advance, **options):
                self.result = generation
                self._show()
            done, count = int((generation.codes.min(axis=1) >= 0).sum()), len(generation)
            images = _images(done) if done == count else f"stopped, {done} of {_images(count)} complete"
            summary = f"{images}, {time.monotonic() - started:.1f} s"
        finally:
            self.status.value = summary

    def _options(self) -> SamplingKeywords:
        """Returns the options from the controls. Raises UsageError for a text that is no number."""
        ranker = self.ranker.value
        if ranker == "CLIP model":
            ranker = self.clip.value.strip()
            if not ranker:
                raise UsageError("name the CLIP model: a folder, OpenAI's name such as ViT-B/32, or OWNER/NAME")
        return {
            "num_candidates": self.candidates.value,
            "seed": self.seed.value,
            "top_k": _number(self.top_k),
            "top_p": None if self.top_p.value == 1 else self.top_p.value,
            "temperature": self.temperature.value,
            "guidance_scale": self.guidance_scale.value,
            "batch_size": _number(self.batch_size),
            "ranker": ranker,
            "progress": False,
        }

    def _codes_to_vary(self) -> np.ndarray:
        """The top of the image chosen; the seed becomes another if it would give the same image again."""
        if self.result is None:
            raise UsageError("there is no image to vary yet; press Generate first")
        keep_rows, rank = self.vary_top.keep_rows.value, self.rank.value
        codes = self.result.codes[self.result.order[rank - 1]][: keep_rows * self.model.code_size]
        if codes.min() < 0:
            raise UsageError(f"the first {keep_rows} rows of image {rank} are not all sampled; keep fewer rows of it")
        if self.seed.value == self.result.meta["seed"]:
            self._change_seed()
        return codes

    def _codes_to_complete(self) -> np.ndarray:
        if self._uploaded is None:
            raise UsageError("choose an image to complete first")
        return self.model.prompt_codes(self._uploaded, self.complete_top.keep_rows.value)

    # ---------------------------------------- the other buttons

    def _change_seed(self) -> None:
        self.seed.value = secrets.randbits(32)

    def _take_upload(self) -> None:
        """Reads the file that was chosen, and says how it was cut to the size of the model."""
        self._uploaded, self.upload_note.value = None, ""
        with self._errors_shown():
            for file in self.upload.value:
                size = self.model.image_size
                try:
                    image = decode_image(bytes(file["content"]))
                except MindalleError as error:
                    raise UsageError(f"{file['name']}: {error}") from None
                self._uploaded = crop_square(image, size, None)
                note = f"{file['name']} is {image.width} x {image.height} pixels"
                if image.size != (size, size):
                    note += f"; the square in its center is used, resized to {size} x {size}"
                self.upload_note.value = html.escape(note)
        self._refresh()

    def _save(self) -> None:
        with self._errors_shown():
            if self.result is None:
                raise UsageError("there is nothing to save yet; press Generate first")
            if not self.folder.value.strip():
                raise UsageError("name a folder for the images")
            folder = Path(os.path.expanduser(self.folder.value.strip())).absolute()
            paths = self.result.save(folder, best=self.best.value)
            self._say("Done", f"{_images(len(paths))}, grid.png and meta.json are in {folder}")
            self.folder.value = str(_free_folder())

    # ---------------------------------------- what is seen

    def _show(self) -> None:
        """Shows the images of the result, and offers them to Vary."""
        if self.result is None:
            return
        self.sheet.value = _png(self.result.grid(self.best.value, scale=max(1, SHOWN_PIXELS // self.model.image_size)))
        self.sheet.layout.display = None
        self._refresh()

    def _refresh(self) -> None:
        """Enables and fills the controls by the state: sampling or not, result, upload, ranker."""
        running = self._running.locked()
        self.generate_button.disabled, self.stop_button.disabled = running, not running
        self.vary_button.disabled = self.save_button.disabled = running or self.result is None
        self.complete_button.disabled = running or self._uploaded is None
        self.clip.layout.display = None if self.ranker.value == "CLIP model" else "none"
        self.complete_top.show(self._uploaded)
        if self.result is not None and not running:
            self.rank.max = min(self.best.value, len(self.result))
            self.vary_top.show(self.result.images[self.result.order[self.rank.value - 1]])

    def _say(self, kind: str, text: object) -> None:
        """Adds a line under the buttons."""
        line = html.escape(" ".join(str(text).split()))
        self.messages.value += f'<div style="color: {COLORS[kind]}">{kind}: {line}</div>'

    @contextlib.contextmanager
    def _errors_shown(self) -> Iterator[None]:
        """Shows errors as a line under the buttons, and removes earlier ones."""
        self.messages.value = ""
        try:
            yield
        except MindalleError as error:
            self._say("Error", one_line(error))
        except Exception as error:  # a thread has nobody else to tell
            self._say("Error", f"{type(error).__name__}: {one_line(error)}")

    @contextlib.contextmanager
    def _warnings_shown(self) -> Iterator[None]:
        """Shows warnings of this thread as lines under the buttons."""
        thread, elsewhere = threading.get_ident(), warnings.showwarning

        def showwarning(message: Any, *where: Any, **more: Any) -> None:
            if threading.get_ident() == thread:
                self._say("Warning", message)
            else:
                elsewhere(message, *where, **more)

        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = showwarning
            yield


class _TopOfImage(widgets.HBox):
    """How many rows of codes of an image to keep, and a thumbnail in which the rest is gray."""

    def __init__(self, code_size: int, keep_rows: int, above: list[Any], button: Any):
        """keep_rows: at first. above, button: controls that stand above and below the slider."""
        self._code_size, self._image = code_size, None
        self.keep_rows = widgets.IntSlider(keep_rows, min=1, max=code_size - 1, description="keep rows", **NARROW)
        self.thumbnail = widgets.Image(layout={"height": f"{SHOWN_PIXELS}px", "margin": "2px 2em", "display": "none"})
        super().__init__([widgets.VBox([*above, self.keep_rows, button]), self.thumbnail])
        self.keep_rows.observe(lambda _: self.show(self._image), "value")

    def show(self, image: np.ndarray | None) -> None:
        """Shows uint8[H, W, 3], or nothing."""
        self._image = image
        self.thumbnail.layout.display = "none" if image is None else None
        if image is not None:
            kept = image.copy()
            kept[self.keep_rows.value * len(image) // self._code_size :] = NOT_SAMPLED
            self.thumbnail.value = _png(Image.fromarray(kept))


def _word_list(known_words: KnownWords) -> Any:
    examples = "".join(f"<li>{html.escape(example)}</li>" for example in known_words.examples)
    words = html.escape(" ".join(sorted(known_words.words)))
    about = f"This model {html.escape(known_words.about)}. " if known_words.about else ""
    return widgets.HTML(
        f'<div style="max-height: 20em; overflow: auto">{about}It knows these {len(known_words.words):,} words:'
        f"<p>{words}</p>" + (f"Examples:<ul>{examples}</ul>" if examples else "") + "</div>"
    )


def _number(box: Any) -> int | None:
    """The integer in a box; None where it is empty or holds the word that an empty one shows."""
    text = box.value.strip()
    if text in ("", box.placeholder):
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{box.description} must be a whole number, or {box.placeholder}; not {text!r}") from None


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _free_folder() -> Path:
    """The first numbered folder that does not exist."""
    return next(path for i in itertools.count(1) if not (path := SAVE_FOLDER / f"{i:03d}").exists())


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
