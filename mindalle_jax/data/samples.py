"""The samples of a data set, by number, and a report of what was left out. Nothing here reads pixels."""

import copy
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from mindalle_jax.errors import DataError, UsageError
from mindalle_jax.text.tokenizer import check_prompt

DataTask = Literal["text", "class", "unconditional"]
"""The condition of a model. Each sample must have captions for "text", a label for "class", and neither otherwise."""
TASKS: tuple[DataTask, ...] = ("text", "class", "unconditional")
MAX_TEXT_BYTES = 64 << 10
"""Size limit of a file with captions or a label; a longer file is no caption."""


class Location(Protocol):
    """The place of the encoded image of a sample."""

    def read(self) -> bytes:
        """Returns the bytes of the image file. Raises OSError."""
        ...


class Stored(NamedTuple):
    """A range of bytes in a file: a complete image file, or a member of a tar."""

    file: str
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        """Returns the bytes; fewer than size_bytes if the file has become shorter. Raises OSError."""
        # Opened each time: so threads share no file position, and the number of tars has no limit.
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One image, encoded or as codes, with its captions and label."""

    id: str
    """The path of the image below the data set, which is stable and unique."""
    image: Location | None
    """None if the sample holds codes."""
    codes: np.ndarray | None = None
    """uint16 or int32 [T], if the codes were computed beforehand."""
    captions: Sequence[str] = ()
    label: int | str | None = None
    """The number of a class. Readers may give its name, which Source turns into a number."""


class DatasetReport:
    """Counts the samples of a data set, and what was left out when it was opened, with the reasons."""

    def __init__(self) -> None:
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        """Reason -> number of samples or files left out."""
        self.first: dict[str, str] = {}
        """Reason -> name of the first sample or file left out."""
        self.unused: dict[tuple[str, str], int] = {}
        """(Kind, reason) of files, members or columns that nothing reads -> number of them."""
        self.layout = ""
        """The layout of the data set, in words."""

    def drop(self, reason: str, name: str) -> None:
        """Counts a sample or file that is left out."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, name)

    def __str__(self) -> str:
        """Returns the report in one line."""
        reasons = [f"{count:,} {reason} (first: {self.first[reason]!r})" for reason, count in self.dropped.items()]
        unused = [f"{count:,} {kind} ({reason})" for (kind, reason), count in self.unused.items()]
        parts = [f"{self.kept:,} samples"]
        parts += [f"left out: {', '.join(reasons)}"] if reasons else []
        parts += [f"not used: {', '.join(unused)}"] if unused else []
        return "; ".join(parts)


class Source:
    """The samples of a data set that a task can use, in a fixed order."""

    def __init__(
        self,
        path: str,
        task: DataTask,
        samples: Iterable[Sample],
        report: DatasetReport,
        *,
        num_classes: int | None = None,
        classes: list[str] | None = None,
        known_classes: list[str] | None = None,
    ):
        """Keeps the samples that have what the task needs, and counts the rest in the report.

        num_classes: number of classes of the model, for the task "class". classes: names of the labels, if the data
        set lists them. known_classes: for validation data the names of the training data's classes, whose numbers the
        labels get. Raises DataError if no sample is left, or if a label is not in [0, num_classes).
        """
        self.path, self.report = path, report
        self.task: DataTask = task
        self.samples = [kept for sample in samples if (kept := _fit(sample, task, report)) is not None]
        if task == "class":
            classes = _number_labels(path, self.samples, classes, known_classes)
            if self.samples and classes is not None and num_classes is not None and len(classes) != num_classes:
                raise DataError(
                    f"{path}: has {len(classes)} classes, but the model has {num_classes}; set "
                    f"stage2.hparams.n_classes={len(classes)}, or choose other data"
                )
        self.classes = classes
        self.report.kept = len(self.samples)
        if not self.samples:
            raise DataError(f"{path}: nothing to train on for the task {task!r}: {report}")
        if task == "class":
            highest = max(self.samples, key=_label)
            if num_classes is not None and _label(highest) >= num_classes:
                raise DataError(
                    f"{path}: {highest.id!r} has the label {highest.label}, but the model has {num_classes} classes; "
                    "labels start at 0: set stage2.hparams.n_classes, or choose other data"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Sample:
        return self.samples[number]

    def part(self, first: int, last: int) -> "Source":
        """Returns a source with the samples [first, last)."""
        part = copy.copy(self)
        part.samples = self.samples[first:last]
        return part

    @property
    def has_codes(self) -> bool:
        """Whether the samples hold codes and no images."""
        return self.samples[0].codes is not None

    def fingerprint(self) -> str:
        """Returns a hexadecimal digest of task, ids, sizes, captions and labels, in order. It changes with the data.

        It reads no images. So it does not notice an image that changed and kept its size.
        """
        digest = hashlib.sha256(json.dumps([self.task, self.classes]).encode())
        for sample in self.samples:
            size_bytes = sample.image.size_bytes if isinstance(sample.image, Stored) else None
            digest.update(json.dumps([sample.id, size_bytes, list(sample.captions), sample.label]).encode())
        return digest.hexdigest()


def _fit(sample: Sample, task: DataTask, report: DatasetReport) -> Sample | None:
    """Returns the sample without unusable captions. If it lacks what the task needs, counts it and returns None."""
    try:
        sample.id.encode()
    except UnicodeEncodeError:
        report.drop("with a name that is not UTF-8", ascii(sample.id))
        return None
    if task == "class" and (sample.label is None or (isinstance(sample.label, int) and sample.label < 0)):
        report.drop("without a label", sample.id)
        return None
    if task == "text":
        captions = [caption.strip() for caption in sample.captions if caption.strip()]
        if not captions:
            report.drop("with an empty caption" if sample.captions else "without a caption", sample.id)
            return None
        captions = [caption for caption in captions if _is_prompt(caption)]
        if not captions:
            report.drop("with a caption that is too long or no text", sample.id)
            return None
        if captions != sample.captions:
            return dataclasses.replace(sample, captions=captions)
    return sample


def _number_labels(
    path: str, samples: list[Sample], classes: list[str] | None, known: list[str] | None
) -> list[str] | None:
    """Replaces the names of classes by their numbers, and returns the names.

    Names without a list are numbered in sorted order: cat, dog, eel are 0, 1, 2. Raises DataError for names beside
    numbers, and for classes that the training data does not have.
    """
    names = {sample.label for sample in samples if isinstance(sample.label, str)}
    if names:
        if number := next((sample for sample in samples if isinstance(sample.label, int)), None):
            raise DataError(
                f"{path}: labels are numbers and names: {number.label} ({number.id!r}), {min(names)!r}, ..."
            )
        classes = classes or sorted(names)
    if known is not None and classes is not None:
        used = names or set(classes)
        if unknown := sorted(used - set(known)):
            raise DataError(
                f"{path}: has classes that the training data does not have: {', '.join(unknown[:5])}; "
                f"the training data has {len(known)}: {', '.join(known[:5])}, ..."
            )
        if not names and classes != known:
            raise DataError(f"{path}: its {len(classes)} classes are not the {len(known)} classes of the training data")
        classes = known
    if names and classes is not None:
        numbers = {name: number for number, name in enumerate(classes)}
        for at, sample in enumerate(samples):
            samples[at] = dataclasses.replace(sample, label=numbers[str(sample.label)])
    return classes


def _is_prompt(caption: str) -> bool:
    try:
        check_prompt(caption)
    except UsageError:
        return False
    return True


def _label(sample: Sample) -> int:
    return sample.label if isinstance(sample.label, int) else -1
