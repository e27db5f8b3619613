"""The files of a folder: which there are, which of its subfolders are splits, and which files nothing reads."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from mindalle_jax.data.images import EXTENSIONS
from mindalle_jax.data.samples import DatasetReport
from mindalle_jax.errors import DataError

Split = Literal["train", "valid"]
SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Split -> names of its folder, or of the first part of its file names, in any case."""
OTHER_FORMATS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg")
"""Formats of images that are not read. Such files are counted in the report, so that their owner knows."""


def walk(folder: Path) -> dict[str, int]:
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


def is_image(name: str) -> bool:
    """Whether a file has the extension of an image that is read."""
    return name.lower().endswith(EXTENSIONS)


def images(files: Iterable[str], report: DatasetReport) -> Iterator[str]:
    """Yields the names of images, sorted; counts images in other formats."""
    for name in sorted(files):
        if is_image(name):
            yield name
        elif name.lower().endswith(OTHER_FORMATS):
            report.drop("in a format other than JPEG, PNG and WebP", name)


def note_unused(files: Iterable[str], reason: str, report: DatasetReport) -> None:
    """Counts files that nothing reads, by extension. Images in other formats are counted elsewhere."""
    kinds = Counter(os.path.splitext(name)[1].lower() or "other" for name in files)
    for kind, count in sorted(kinds.items()):
        if kind not in OTHER_FORMATS and kind not in EXTENSIONS:
            report.unused[kind, reason] = count


def split_of(name: str) -> str | None:
    """Returns "train", "valid" or "test" for the name of such a folder or file, such as train-00000-of-00001."""
    first = name.lower().split("-")[0].split("_")[0].split(".")[0]
    return next((split for split, names in SPLITS.items() if first in names), None)


def split_folder(folder: Path, split: Split) -> Path:
    """Returns the subfolder with a split, if all subfolders are splits and no image or table lies beside them.

    Otherwise returns the folder itself. So the folders of classes, of which one may be called train, stay classes.
    Raises DataError if the split is not there.
    """
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    subfolders = sorted(entry.name for entry in entries if entry.is_dir())
    exact = {name: next((s for s, names in SPLITS.items() if name.lower() in names), None) for name in subfolders}
    beside = [entry.name for entry in entries if entry.is_file()]
    if not subfolders or None in exact.values() or any(map(is_image, beside)):
        return folder
    if any(name.lower().endswith((".jsonl", ".csv", ".tsv", ".parquet", ".tar")) for name in beside):
        return folder
    found = [name for name in subfolders if exact[name] == split]
    if len(found) != 1:
        raise DataError(
            f"{folder}: holds the splits {', '.join(subfolders)}, and no {split}; name one of these folders"
        )
    return folder / found[0]
