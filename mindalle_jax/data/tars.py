"""Samples in tar files as webdataset writes them. Opening reads headers, captions and labels, and extracts nothing.

Members of one folder whose file names are the same up to the first dot are one sample: 000/17.jpg, 000/17.txt.
"""

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mindalle_jax.data.images import EXTENSIONS
from mindalle_jax.data.samples import MAX_TEXT_BYTES, DatasetReport, Sample, Stored
from mindalle_jax.errors import DataError, one_line
from mindalle_jax.storage.files import BoundedHeader

CAPTION_KEYS = ("caption", "text")
"""Fields of key.json that may hold the caption: a text, or a list of texts."""


def find_tars(name: str) -> list[str]:
    """Returns the tar files that a path stands for, sorted; none if it stands for something else.

    The path may be a .tar, a folder of them, or a pattern with {00..31}, {a,b}, *, ? or [ab]. Raises DataError if no
    .tar matches a part of the pattern.
    """
    path = Path(name)
    if path.is_dir():
        return sorted(str(entry) for entry in path.glob("*.tar") if entry.is_file())
    if path.exists():
        return [name] if name.endswith(".tar") else []
    if not re.search(r"[{*?\[]", name):
        return []
    patterns = _expand_braces(name)
    found = {pattern: [file for file in glob.glob(pattern) if file.endswith(".tar")] for pattern in patterns}
    if missing := [pattern for pattern in patterns if not found[pattern]]:
        raise DataError(f"{name}: no .tar matches {missing[0]} ({len(missing)} of {len(patterns)} patterns match none)")
    return sorted(set(itertools.chain(*found.values())))


def tar_samples(files: list[str], report: DatasetReport) -> Iterator[Sample]:
    """Yields the samples of each tar, in the order of its members. Raises DataError for a damaged or compressed tar."""
    for file in files:
        short = Path(file).name
        for key, parts in _index(file, report).items():
            images = [extension for extension in parts if f".{extension}" in EXTENSIONS]
            if not images:
                report.drop("members without an image", f"{short}/{key}.{next(iter(parts))}")
                continue
            try:
                captions, label = _texts(parts)
            except (ValueError, RecursionError):  # ValueError includes UnicodeDecodeError and JSONDecodeError
                report.drop("with a caption or label that cannot be read", f"{short}/{key}")
                continue
            yield Sample(f"{short}/{key}.{images[0]}", parts[images[0]], captions=captions, label=label)


def _index(file: str, report: DatasetReport) -> dict[str, dict[str, Stored]]:
    """Returns {key: {extension: place}} of the regular files of a tar; counts all other members."""
    index: dict[str, dict[str, Stored]] = {}
    short = Path(file).name
    try:
        # "r:" refuses compressed tars, which have no random access.
        with tarfile.open(file, "r:", tarinfo=BoundedHeader) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - tarfile would keep every header
                name = member.name.removeprefix("./")
                place = f"{short}/{name}"
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    report.drop("members of a tar that are no regular files", place)
                    continue
                if name.startswith("/") or ".." in name.split("/"):
                    report.drop("members of a tar whose name points outside it", place)
                    continue
                folder, slash, last = name.rpartition("/")
                stem, _, extension = last.partition(".")
                parts = index.setdefault(folder + slash + stem, {})
                if extension.lower() in parts:
                    report.drop("members of a tar with the same name", place)
                    continue
                parts[extension.lower()] = Stored(file, member.offset_data, member.size)
            # At a damaged header tarfile stops without an error. A complete tar ends with blocks of zeros.
            if Stored(file, tar.offset, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not an uncompressed tar, or damaged: {one_line(error)}; is it truncated, or compressed?"
        ) from None
    return index


def _texts(parts: dict[str, Stored]) -> tuple[list[str], int | None]:
    """Returns captions and label of a sample. Raises ValueError if one cannot be read."""
    captions: list[str] = []
    label = None
    if "txt" in parts:
        captions = _read_text(parts["txt"]).splitlines() or [""]
    if "json" in parts:
        fields = json.loads(_read_text(parts["json"]))
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        if not captions:
            text = next((fields[key] for key in CAPTION_KEYS if fields.get(key) is not None), [])
            captions = [text] if isinstance(text, str) else text
        if type(fields.get("label")) is int:
            label = fields["label"]
    if "cls" in parts:
        label = int(_read_text(parts["cls"]))
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("a caption is no text")
    return captions, label


def _read_text(stored: Stored) -> str:
    if stored.size_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"over {MAX_TEXT_BYTES} bytes")
    return stored.read().decode("utf-8-sig")


def _expand_braces(pattern: str) -> list[str]:
    """Expands a pattern: a-{00..02}.tar to a-00.tar, a-01.tar and a-02.tar; {a,b}.tar to a.tar and b.tar."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if first is not None:
        options = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        options = names.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for option in options for whole in _expand_braces(before + option + after)]
