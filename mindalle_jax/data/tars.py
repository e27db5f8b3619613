"""Samples in tar files as webdataset writes them. Opening reads headers, captions and labels, and extracts nothing.

Members of one folder whose file names are the same up to the first dot are one sample: 000/17.jpg, 000/17.txt.
"""

import glob
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mindalle_jax.data.images import EXTENSIONS
from mindalle_jax.data.records import Columns, decode_text, label_of, read_record
from mindalle_jax.data.samples import MAX_TEXT_BYTES, DatasetReport, Sample, Stored
from mindalle_jax.errors import DataError, one_line
from mindalle_jax.storage.files import BoundedHeader

TEXTS = (".txt", ".caption", ".json", ".cls")
"""Extensions of members with captions and labels."""


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


def tar_samples(files: list[str], report: DatasetReport, columns: Columns) -> Iterator[Sample]:
    """Yields the samples of each tar, in the order of its members. Raises DataError for a damaged or compressed tar."""
    report.layout = "tar files as webdataset writes them"
    unused: Counter[str] = Counter()
    for file in files:
        short = Path(file).name
        for key, parts in _index(file, report).items():
            images = sorted((part for part in parts if _last(part) in EXTENSIONS), key=lambda part: part.count("."))
            unused.update(_last(part) for part in parts if _last(part) not in (*EXTENSIONS, *TEXTS))
            for other in images[1:]:
                report.drop("further images of a key", f"{short}/{key}.{other}")
            if not images:
                report.drop("members without an image", f"{short}/{key}.{next(iter(parts))}")
                continue
            try:
                captions, label = _texts(parts, columns)
            except (ValueError, RecursionError):  # ValueError includes UnicodeDecodeError and JSONDecodeError
                report.drop("with a caption or label that cannot be read", f"{short}/{key}")
                continue
            yield Sample(f"{short}/{key}.{images[0]}", parts[images[0]], captions=captions, label=label)
    report.unused.update({(kind, "neither image, caption nor label"): count for kind, count in unused.items()})


def _last(part: str) -> str:
    """Returns the extension that says what a part is: .jpg for "jpg" and for "small.jpg", as webdataset takes it."""
    return f".{part.rpartition('.')[2]}"


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


def _texts(parts: dict[str, Stored], columns: Columns) -> tuple[list[str], int | str | None]:
    """Returns captions and label of a sample. Raises ValueError if one cannot be read."""
    captions: list[str] = []
    label: int | str | None = None
    by_end = {_last(part): stored for part, stored in reversed(parts.items())}
    text = by_end.get(".txt") or by_end.get(".caption")
    if text is not None:
        captions = _read_text(text).splitlines() or [""]
    if ".json" in by_end:
        record = json.loads(_read_text(by_end[".json"]))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        others, label = read_record(record, columns)
        captions = captions or others
    if ".cls" in by_end:
        label = label_of(_read_text(by_end[".cls"]))
    return captions, label


def _read_text(stored: Stored) -> str:
    if stored.size_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"over {MAX_TEXT_BYTES} bytes")
    return decode_text(stored.read())


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
