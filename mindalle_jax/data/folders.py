"""Samples of folders: images with captions or classes, a metadata file, or a data set that `datasets` saved."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mindalle_jax.data.images import EXTENSIONS
from mindalle_jax.data.samples import MAX_TEXT_BYTES, DatasetReport, DataTask, Sample, Stored
from mindalle_jax.errors import DataError, install_hint, one_line

METADATA = ("metadata.jsonl", "metadata.csv")
OTHER_FORMATS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg")
"""Formats of images that are not read. Such files are counted in the report, so that their owner knows."""


def folder_samples(folder: Path, task: DataTask, report: DatasetReport) -> Iterator[Sample]:
    """Yields every image below a folder. For the task "text" the lines of name.txt are its captions."""
    files = _walk(folder)
    texts = {name for name in files if name.endswith(".txt")}
    used = set()
    for name in _images(files, report):
        captions: list[str] | None = None
        text = os.path.splitext(name)[0] + ".txt"
        if task == "text" and text in texts:
            used.add(text)
            captions = _read_captions(folder / text, report, name)
            if captions is None:
                continue
        yield Sample(name, Stored(str(folder / name), 0, files[name]), captions=captions or ())
    if task == "text":
        for text in sorted(texts - used):
            report.drop("captions without an image", text)


def class_names(folder: Path, known: list[str] | None) -> list[str]:
    """Returns the names of the classes of a folder that has one subfolder per class, sorted. A label is a position.

    known: the names of the training data's classes, for validation data. They are returned instead. Raises DataError
    if the folder has a class that is not among them, or has no subfolders.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: holds no subfolders; the task 'class' needs one folder of images per class")
    if known is None:
        return names
    if unknown := [name for name in names if name not in known]:
        raise DataError(
            f"{folder}: has classes that the training data does not have: {', '.join(unknown[:5])}; "
            f"the training data has {len(known)}: {', '.join(known[:5])}, ..."
        )
    return known


def class_samples(folder: Path, classes: list[str], report: DatasetReport) -> Iterator[Sample]:
    """Yields every image below a folder. Its label is the position of its topmost subfolder in `classes`."""
    labels = {name: label for label, name in enumerate(classes)}
    files = _walk(folder)
    for name in _images(files, report):
        top, slash, _ = name.partition("/")
        label = labels[top] if slash else None
        yield Sample(name, Stored(str(folder / name), 0, files[name]), label=label)


def find_metadata(folder: Path) -> Path | None:
    """Returns metadata.jsonl or metadata.csv of a folder, or None. Raises DataError if it has both."""
    found = [folder / name for name in METADATA if (folder / name).exists()]
    if len(found) > 1:
        raise DataError(f"{folder}: holds both {METADATA[0]} and {METADATA[1]}; move one to another folder")
    return found[0] if found else None


def metadata_samples(metadata: Path, report: DatasetReport) -> Iterator[Sample]:
    """Yields the images that a metadata file lists, sorted by name.

    Its fields are file_name, text (in a .jsonl also a list of captions) and label. An image on several lines is one
    sample with all captions of these lines. Raises DataError if the file cannot be read.
    """
    rows: dict[str, Sample] = {}
    for place, row in _rows(metadata, report):
        name, text, label = row.get("file_name"), row.get("text"), row.get("label")
        if isinstance(label, str):  # a .csv has only text
            label = int(label) if label.strip().isdecimal() else label or None
        captions = [text] if isinstance(text, str) else [] if text is None else text
        if not isinstance(name, str) or not name:
            report.drop("lines without file_name", place)
        elif not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            report.drop("lines whose text is no text", place)
        elif label is not None and type(label) is not int:
            report.drop("lines whose label is no number", place)
        elif name in rows:
            known = rows[name]
            if label not in (None, known.label):
                report.drop("lines with another label than an earlier one", place)
            else:
                rows[name] = dataclasses.replace(known, captions=[*known.captions, *captions])
        elif (image := _find(metadata.parent, name, report)) is not None:
            rows[name] = Sample(name, image, captions=captions, label=label)
    for name in sorted(rows):
        yield rows[name]


class Row(NamedTuple):
    """The image in one row of a data set of the library `datasets`."""

    dataset: Any
    number: int

    def read(self) -> bytes:
        """Returns the encoded image. Raises OSError."""
        image = self.dataset[self.number]["image"]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def saved_samples(folder: Path) -> tuple[Iterator[Sample], list[str] | None]:
    """Reads a folder that `Dataset.save_to_disk` wrote; returns its rows as samples, and the names of its classes.

    The columns are image, text or caption, and label. The names are None if the labels have none. Raises DataError if
    the library is missing, the folder cannot be opened, or it has no column of images.
    """
    if (folder / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        raise DataError(f"{folder}: holds several splits; name the folder of one: {', '.join(splits)}")
    try:
        import datasets  # in the extra [datasets]
    except ImportError:
        raise DataError(f"{folder}: saved by the library datasets: {install_hint('datasets')}") from None
    try:
        dataset: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises errors of many kinds
        raise DataError(f"{folder}: cannot be opened by the library datasets: {one_line(error)}") from None
    features = dataset.features
    if not isinstance(features.get("image"), datasets.Image):
        raise DataError(f"{folder}: has no column 'image' of images, only {', '.join(features)}")

    def column(*names: str) -> list[Any] | None:
        return next((dataset[name][:] for name in names if name in features), None)

    texts, labels = column("text", "caption"), column("label")
    images = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))

    def samples() -> Iterator[Sample]:
        for number in range(len(dataset)):
            text = None if texts is None else texts[number]
            captions = [text] if isinstance(text, str) else text or ()
            label = None if labels is None else labels[number]
            # The library's own digest replaces the sizes of the images, for which all of them would have to be read.
            yield Sample(f"{dataset._fingerprint}/{number}", Row(images, number), captions=captions, label=label)

    return samples(), getattr(features.get("label"), "names", None)


def _walk(folder: Path) -> dict[str, int]:
    """Returns {path below the folder, with slashes: size in bytes} of all regular files that are not hidden.

    Links are followed. No folder is entered twice, so a circle of links does no harm.
    """
    files: dict[str, int] = {}
    waiting, seen = [""], set()
    while waiting:
        below = waiting.pop()
        here = os.stat(folder / below)
        if (here.st_dev, here.st_ino) in seen:
            continue
        seen.add((here.st_dev, here.st_ino))
        for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
            name = f"{below}/{entry.name}".lstrip("/")
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append(name)
            elif entry.is_file():
                files[name] = entry.stat().st_size
    return files


def _images(files: dict[str, int], report: DatasetReport) -> Iterator[str]:
    """Yields the names of images, sorted; counts images in other formats."""
    for name in sorted(files):
        extension = os.path.splitext(name)[1].lower()
        if extension in EXTENSIONS:
            yield name
        elif extension in OTHER_FORMATS:
            report.drop("in a format other than JPEG, PNG and WebP", name)


def _read_captions(path: Path, report: DatasetReport, name: str) -> list[str] | None:
    """Returns the lines of a caption file. If it is no text, counts its image and returns None."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            report.drop(f"with a caption file over {MAX_TEXT_BYTES} bytes", name)
            return None
        return data.decode("utf-8-sig").splitlines() or [""]
    except (OSError, UnicodeDecodeError):
        report.drop("with a caption file that is not UTF-8 or cannot be read", name)
        return None


def _rows(metadata: Path, report: DatasetReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("line 3", fields) per line of a metadata file. Raises DataError if the file cannot be read."""
    try:
        with open(metadata, encoding="utf-8-sig", newline="") as file:
            if metadata.suffix == ".csv":
                table = csv.DictReader(file)
                if "file_name" not in (table.fieldnames or ()):
                    raise DataError(f"{metadata}: its first line must name the columns, among them file_name and text")
                for row in table:
                    if None in row:  # DictReader's key for the fields left over
                        report.drop("lines with more fields than columns (quote captions)", f"line {table.line_num}")
                    else:
                        yield f"line {table.line_num}", row
                return
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line) if line.strip() else None
                except (ValueError, RecursionError):
                    row = "not JSON"
                if isinstance(row, dict):
                    yield f"line {number}", row
                elif row is not None:
                    report.drop("lines that are no JSON object", f"line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{metadata}: cannot be read: {one_line(error)}") from None


def _find(folder: Path, name: str, report: DatasetReport) -> Stored | None:
    """Returns the image that a line of a metadata file names. If it cannot be used, counts the line; returns None."""
    if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        report.drop("lines whose file_name points outside the folder", name)
        return None
    if not name.lower().endswith(EXTENSIONS):
        report.drop("in a format other than JPEG, PNG and WebP", name)
        return None
    try:
        size_bytes = os.stat(folder / name).st_size
    except (OSError, UnicodeEncodeError):
        report.drop("lines whose image is missing", name)
        return None
    return Stored(str(folder / name), 0, size_bytes)
