"""Samples of folders: images with caption files beside them, or one folder per class."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from mindalle_jax.data.records import Columns, decode_text, read_record
from mindalle_jax.data.samples import MAX_TEXT_BYTES, DatasetReport, DataTask, Sample, Stored
from mindalle_jax.data.walk import images, is_image, note_unused, walk
from mindalle_jax.errors import DataError

SIDECARS = (".txt", ".caption", ".captions", ".json")
"""Extensions of caption files, in any case: the file of a.jpg is a.txt or a.jpg.txt. The first one counts."""


def folder_samples(folder: Path, task: DataTask, report: DatasetReport, columns: Columns) -> Iterator[Sample]:
    """Yields every image below a folder. For the task "text" its captions are in the file beside it."""
    files = walk(folder)
    by_lower = {name.lower(): name for name in sorted(files, reverse=True)}
    used: set[str] = set()
    found = False
    for name in images(files, report):
        captions: list[str] | None = None
        text = _sidecar(name, by_lower) if task == "text" else None
        if text is not None:
            used.add(text)
            found = True
            captions = _read_captions(folder / text, report, name, columns)
            if captions is None:
                continue
        yield Sample(name, Stored(str(folder / name), 0, files[name]), captions=captions or ())
    report.layout = "images with caption files beside them" if found else "images"
    rest = [name for name in files if not is_image(name) and name not in used]
    if task != "text":
        note_unused(rest, f"the task {task} takes images alone", report)
        return
    texts = [name for name in rest if name.lower().endswith(SIDECARS[:3])]
    for text in sorted(texts):
        report.drop("captions without an image", text)
    note_unused(set(rest) - set(texts), "no caption file of an image", report)


def _sidecar(name: str, by_lower: dict[str, str]) -> str | None:
    """Returns the caption file of an image. by_lower: file names in lower case -> file names."""
    stems = (os.path.splitext(name)[0].lower(), name.lower())
    candidates = (stem + extension for extension in SIDECARS for stem in stems)
    return next((by_lower[candidate] for candidate in candidates if candidate in by_lower), None)


def class_names(folder: Path) -> list[str]:
    """Returns the names of the subfolders, sorted, which are the classes. Raises DataError if there are none."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: holds no subfolders; the task 'class' needs one folder of images per class")
    return names


def class_samples(folder: Path, report: DatasetReport) -> Iterator[Sample]:
    """Yields every image below a folder. Its label is the name of its topmost subfolder."""
    report.layout = "one folder of images per class"
    files = walk(folder)
    for name in images(files, report):
        top, slash, _ = name.partition("/")
        yield Sample(name, Stored(str(folder / name), 0, files[name]), label=top if slash else None)
    note_unused(files, "the task class takes images alone", report)


def _read_captions(path: Path, report: DatasetReport, name: str, columns: Columns) -> list[str] | None:
    """Returns the captions in a file: its lines, or those of its JSON. Counts the image of a bad one; returns None."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            report.drop(f"with a caption file over {MAX_TEXT_BYTES} bytes", name)
            return None
        text = decode_text(data)
    except (OSError, UnicodeDecodeError):
        report.drop("with a caption file that is not UTF-8 or cannot be read", name)
        return None
    if path.suffix.lower() != ".json":
        return text.splitlines() or [""]
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        return read_record(record, columns)[0]
    except (ValueError, RecursionError):
        report.drop("with a .json that holds no captions", name)
        return None
