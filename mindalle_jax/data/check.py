"""Looks at a data set before training: its layout, what the tokenizer makes of its captions, and bad images.

`describe` reads no images, so a run says the same lines at its start. `check_images` reads all of them.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

from mindalle_jax.data.images import ImageError, ShapeError, decode_image
from mindalle_jax.data.samples import Sample, Source
from mindalle_jax.errors import one_line
from mindalle_jax.text.tokenizer import TextTokenizer, quote_prompt

MAX_CAPTIONS = 10_000
"""Captions that are tokenized at the start of a run, evenly over the data set; `mindalle check-data` takes all."""
SHOWN_CLASSES = 12
CELL, LABEL, SHEET_COLUMNS = 128, 30, 8
"""Pixels of an image on the sheet and of the two lines below it, and images side by side."""


def describe(source: Source, tokenizer: TextTokenizer | None = None, *, max_captions: int | None = None) -> list[str]:
    """Returns what is known of a data set without its images: one line per fact, "name: text".

    tokenizer: the model's; None says nothing of tokens. max_captions: how many captions are tokenized; None is all.
    """
    report = source.report
    lines = [f"layout: {report.layout}"] if report.layout else []
    lines.append(str(report))
    if source.task != "class":
        kinds = Counter(os.path.splitext(sample.id)[1].lower() for sample in source.samples)
        if any(kinds):
            lines.append("images: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()))
    if source.task == "text":
        lines += _describe_captions(source, tokenizer, max_captions)
    if source.task == "class":
        lines.append(_describe_classes(source))
    return lines


def _describe_captions(source: Source, tokenizer: TextTokenizer | None, max_captions: int | None) -> list[str]:
    counts = [len(sample.captions) for sample in source.samples]
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    lines = [f"captions: {sum(counts):,}, {each} per sample"]
    if tokenizer is None:
        return lines
    captions = [caption for sample in source.samples for caption in sample.captions]
    if max_captions is not None and len(captions) > max_captions:
        captions = captions[:: math.ceil(len(captions) / max_captions)]
    tokenized = tokenizer(captions)
    looked_at = "" if len(captions) == sum(counts) else " looked at"
    cut = [i for i, tokens in enumerate(tokenized.num_tokens) if tokens > tokenizer.context_length]
    unknown = [i for i, tokens in enumerate(tokenized.num_unknown) if tokens]
    for what, found in (
        (f"are cut: they have more than {tokenizer.context_length} tokens", cut),
        ("have characters or words that the tokenizer does not know", unknown),
    ):
        if found:
            share = f"{len(found):,} of {len(captions):,} captions{looked_at} ({len(found) / len(captions):.1%})"
            lines.append(f"warning: {share} {what}, such as {quote_prompt(captions[found[0]])}")
    return lines


def _describe_classes(source: Source) -> str:
    counts = Counter(sample.label for sample in source.samples)
    names = {label: str(label) if source.classes is None else source.classes[int(label or 0)] for label in counts}
    shown = [f"{names[label]} ({counts[label]:,})" for label in sorted(counts, key=str)][:SHOWN_CLASSES]
    total = len(counts) if source.classes is None else len(source.classes)
    rest = f", and {len(counts) - SHOWN_CLASSES} more" if len(counts) > SHOWN_CLASSES else ""
    empty = f"; {total - len(counts)} of them without an image" if total > len(counts) else ""
    return f"classes: {total}: {', '.join(shown)}{rest}{empty}"


class ImageCheck(NamedTuple):
    """The result of reading all images of a data set."""

    readable: int
    sizes: Counter[tuple[int, int]]
    """(width, height) in pixels -> number of images."""
    unreadable: dict[str, list[str]]
    """Reason -> names, of damaged images and of images outside the limits of sizes."""
    duplicates: list[tuple[str, str]]
    """(Name, name of an earlier image with the same bytes)."""

    def lines(self) -> list[str]:
        """Returns one line per fact, "name: text"."""
        lines = [f"readable: {self.readable:,} images"]
        if self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            lines[0] += f", {min(widths)} to {max(widths)} pixels wide and {min(heights)} to {max(heights)} high"
        for reason, names in self.unreadable.items():
            lines.append(f"warning: {len(names):,} images cannot be used: {reason} (first: {names[0]!r})")
        if self.duplicates:
            name, earlier = self.duplicates[0]
            count = f"{len(self.duplicates):,}"
            lines.append(f"warning: {count} images are equal to an earlier one (first: {name!r} = {earlier!r})")
        return lines


def check_images(source: Source, *, threads: int = 8, progress: bool = False) -> ImageCheck:
    """Reads all images of a source with several threads."""
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable: dict[str, list[str]] = {}
    first: dict[bytes, str] = {}
    duplicates = []
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(_read, source.samples)
        for name, digest, size, reason in tqdm(results, total=len(source), desc="images", disable=not progress):
            if reason:
                unreadable.setdefault(reason, []).append(name)
                continue
            sizes[size] += 1
            if digest in first:
                duplicates.append((name, first[digest]))
            else:
                first[digest] = name
    return ImageCheck(sum(sizes.values()), sizes, unreadable, duplicates)


def _read(sample: Sample) -> tuple[str, bytes, tuple[int, int], str]:
    """Returns name, digest of the bytes, size, and the reason why the image cannot be read, without its numbers."""
    assert sample.image is not None
    try:
        data = sample.image.read()
        return sample.id, hashlib.sha256(data).digest(), decode_image(data).size, ""
    except ShapeError as error:
        reason = one_line(error).partition("; ")[2] or one_line(error)
        return sample.id, b"", (0, 0), f"not damaged, but of a size that is not read: {reason}"
    except ImageError as error:
        return sample.id, b"", (0, 0), one_line(error).partition(": ")[0]
    except OSError as error:
        return sample.id, b"", (0, 0), f"cannot be opened: {error.strerror or one_line(error)}"


def contact_sheet(source: Source, count: int = 64) -> Image.Image:
    """Returns a sheet of images evenly over the data set, each with the beginning of its first caption, or its class.

    Images that cannot be read are grey.
    """
    samples = source.samples[:: math.ceil(len(source) / count)]
    rows = -(-len(samples) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * (CELL + 4) + 4, rows * (CELL + LABEL + 4) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        x, y = 4 + number % SHEET_COLUMNS * (CELL + 4), 4 + number // SHEET_COLUMNS * (CELL + LABEL + 4)
        assert sample.image is not None
        try:
            image = decode_image(sample.image.read())
            image.thumbnail((CELL, CELL))
        except (ImageError, OSError):
            image = Image.new("RGB", (CELL, CELL), "grey")
        sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
        for line, text in enumerate(wrapped_text(pen, _label_of(source, sample), CELL, 2)):
            pen.text((x, y + CELL + 1 + 14 * line), text, fill="black")
    return sheet


def _label_of(source: Source, sample: Sample) -> str:
    if sample.captions:
        return sample.captions[0]
    if isinstance(sample.label, int):
        return str(sample.label) if source.classes is None else source.classes[sample.label]
    return sample.id


def wrapped_text(pen: ImageDraw.ImageDraw, text: str, width: int, max_lines: int) -> Sequence[str]:
    """Returns the beginning of the text in lines of `width` pixels; characters that the font lacks become "?"."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    lines = [""]
    for character in text:
        if pen.textlength(lines[-1] + character) > width:
            if len(lines) == max_lines:
                break
            lines.append("")
        lines[-1] += character
    return lines
