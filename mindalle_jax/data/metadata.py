"""Samples of metadata files: metadata.jsonl, metadata.csv, and captions in the JSON format of COCO."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from mindalle_jax.data.records import Columns, decode_text, read_record
from mindalle_jax.data.samples import DatasetReport, Sample, Stored
from mindalle_jax.data.walk import is_image, note_unused, walk
from mindalle_jax.errors import DataError, one_line

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
DELIMITERS = ",;\t"
MAX_COCO_BYTES = 1 << 30
"""Size limit of a JSON file of COCO, which is read as a whole; that of COCO itself has 92 MB."""


def is_metadata(name: str) -> bool:
    """Whether a file has the name of a metadata file, in any folder."""
    return os.path.basename(name).lower() in NAMES


def find_coco(folder: Path) -> list[str]:
    """Returns the names of captions in COCO's format below a folder: a .json with "images" and "annotations"."""
    found = []
    for name in walk(folder):
        if name.lower().endswith(".json") and "/" not in name.removeprefix("annotations/"):
            with open(folder / name, "rb") as file:
                beginning = file.read(1 << 16)
            if b'"images"' in beginning or b'"annotations"' in beginning:
                found.append(name)
    return found


def metadata_samples(folder: Path, names: list[str], report: DatasetReport, columns: Columns) -> Iterator[Sample]:
    """Yields the images that metadata files list, sorted by name; paths in a file start at its own folder.

    An image on several lines is one sample with all captions of these lines. Raises DataError if a file cannot be read.
    """
    for name in names:
        same = [other for other in names if os.path.dirname(other) == os.path.dirname(name)]
        if len(same) > 1:
            raise DataError(f"{folder}: holds both {same[0]} and {same[1]}; move one to another folder")
    report.layout = f"images listed in {names[0]}" + (f" and {len(names) - 1} more such files" if names[1:] else "")
    files = walk(folder)
    index = _Index(folder, files)
    rows: dict[str, Sample] = {}
    for metadata in names:
        below = os.path.dirname(metadata)
        for place, row in _rows(folder / metadata, report, columns):
            found = columns.find(row) if columns.image else Columns().find(row)
            name = row.get(found.image) if found.image else None
            if not isinstance(name, str) or not name:
                report.drop("lines without file_name", place)
                continue
            try:
                captions, label = read_record(row, columns)
            except ValueError as error:
                text = "whose text is no text" if "caption" in str(error) else "whose label is neither number nor name"
                report.drop(f"lines {text}", place)
                continue
            if (file := index.find(below, name, report)) is None:
                continue
            if file in rows and label not in (None, rows[file].label):
                report.drop("lines with another label than an earlier one", place)
            elif file in rows:
                rows[file] = dataclasses.replace(rows[file], captions=[*rows[file].captions, *captions])
            else:
                rows[file] = Sample(file, index.stored(file), captions=captions, label=label)
    yield from _sorted(rows, files, names, report)


def coco_samples(folder: Path, names: list[str], report: DatasetReport) -> Iterator[Sample]:
    """Yields the images that JSON files of COCO list, with all their captions, sorted by name.

    Images lie anywhere below the folder. Raises DataError if a file cannot be read.
    """
    report.layout = f"images with captions in {', '.join(names)} (COCO)"
    files = walk(folder)
    index = _Index(folder, files)
    rows: dict[str, Sample] = {}
    for coco in names:
        captions: dict[Any, list[str]] = {}
        try:
            if (folder / coco).stat().st_size > MAX_COCO_BYTES:
                raise ValueError(f"over {MAX_COCO_BYTES} bytes")
            tree = json.loads(decode_text((folder / coco).read_bytes()))
            for annotation in tree["annotations"]:
                if isinstance(annotation.get("caption"), str):
                    captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
            entries = [(entry["id"], str(entry["file_name"])) for entry in tree["images"]]
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / coco}: cannot be read as captions of COCO: {one_line(error)}") from None
        for number, name in entries:
            if (file := index.find("", name, report)) is not None:
                rows[file] = Sample(file, index.stored(file), captions=captions.get(number, ()))
    yield from _sorted(rows, files, names, report)


def _sorted(rows: dict[str, Sample], files: Iterable[str], names: list[str], report: DatasetReport) -> Iterator[Sample]:
    """Yields the samples, and counts images that are not listed, and files that nothing reads."""
    for name in sorted(rows):
        yield rows[name]
    for name in sorted(files):
        if is_image(name) and name not in rows:
            report.drop(f"not listed in {names[0]}", name)
    note_unused(set(files) - set(names), f"{names[0]} has the captions", report)


class _Index:
    """The images of a folder, by path and by the ends of their paths."""

    def __init__(self, folder: Path, files: dict[str, int]):
        self.folder, self.files = folder, files
        self._by_name: dict[str, list[str]] = {}
        for name in filter(is_image, files):
            self._by_name.setdefault(os.path.basename(name), []).append(name)

    def stored(self, name: str) -> Stored:
        return Stored(str(self.folder / name), 0, self.files[name])

    def find(self, below: str, name: str, report: DatasetReport) -> str | None:
        """Returns the path below the folder that a line means. If there is none, counts the line and returns None.

        Paths of Windows and absolute paths, also of another machine, mean the one image in the folder that has the
        longest equal end: C:\\photos\\a\\1.jpg is a/1.jpg.
        """
        path = name.replace("\\", "/")
        if ".." in path.split("/") or "\0" in path:
            report.drop("lines whose file_name points outside the folder", name)
            return None
        if not is_image(path):
            report.drop("in a format other than JPEG, PNG and WebP", name)
            return None
        relative = os.path.normpath(f"{below}/{path}" if below else path)
        if relative in self.files:
            return relative
        parts = PureWindowsPath(path).parts
        same = self._by_name.get(parts[-1], [])
        ends = [_equal_end(candidate.split("/"), parts) for candidate in same]
        best = [candidate for candidate, end in zip(same, ends, strict=True) if end == max(ends)]
        if len(best) == 1:
            return best[0]
        report.drop("lines whose image is missing" if not best else "lines whose image is not unique", name)
        return None


def _equal_end(first: Iterable[str], second: Iterable[str]) -> int:
    """Returns the number of equal parts at the ends of two paths."""
    pairs = zip(reversed(list(first)), reversed(list(second)), strict=False)
    count = 0
    for left, right in pairs:
        if left != right:
            break
        count += 1
    return count


def _rows(metadata: Path, report: DatasetReport, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("line 3", fields) per line of a metadata file. Raises DataError if the file cannot be read."""
    try:
        text = decode_text(metadata.read_bytes())
        if metadata.suffix.lower() != ".jsonl":
            yield from _table_rows(metadata, text, report, columns)
            return
        for number, line in enumerate(text.split("\n"), 1):
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


def _table_rows(
    metadata: Path, text: str, report: DatasetReport, columns: Columns
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the lines of a .csv or .tsv. The separator is the sign that splits its first line into known columns."""
    first = text.partition("\n")[0].rstrip("\r")
    for delimiter in DELIMITERS:
        names = next(csv.reader([first], delimiter=delimiter), [])
        if (columns.image in names) if columns.image else Columns().find(names).image is not None:
            break
    else:
        raise DataError(
            f"{metadata}: its first line must name the columns, among them file_name and text; it is {first[:80]!r}"
        )
    columns.find(names)  # a chosen column that is not there
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    for row in table:
        if None in row:  # DictReader's key for the fields left over
            report.drop("lines with more fields than columns (quote captions)", f"line {table.line_num}")
        else:
            yield f"line {table.line_num}", row
