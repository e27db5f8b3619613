"""Opens a data set on disk.

The format is found out from the content of the path. It decides for which tasks the data can be used:

    name.jpg (or .jpeg, .png, .webp) and name.txt with one caption per line; in nested folders too   text
    metadata.jsonl or metadata.csv with file_name and text, label                                    text, class
    one folder per class                                                                             class
    images alone, in nested folders too                                                              unconditional
    tar files as webdataset writes them: key.jpg with key.txt, key.json or key.cls                   text, class
    codes that mindalle prepare-codes wrote; a data set that `datasets` saved to disk                text, class

All of them can be used for the task "unconditional" too.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from mindalle_jax.data import codes, folders, tars
from mindalle_jax.data.samples import TASKS, DatasetReport, DataTask, Sample, Source
from mindalle_jax.errors import DataError, UsageError


def open_source(
    path: str | Path,
    task: DataTask,
    *,
    num_classes: int | None = None,
    classes: list[str] | None = None,
    vqgan: str | None = None,
) -> Source:
    """Opens a data set: a folder, a .tar, or a pattern of tar files such as "cc3m-{00..31}.tar".

    num_classes: number of classes of the model, for the task "class". classes: for validation data the names of the
    training data's classes, so that folders get the same labels. vqgan: codes.vqgan_digest of the model, with which
    codes are compared.

    Raises DataError if the data cannot be read or the task can use no sample; the message counts what was left out.
    Raises UsageError for an unknown task, and for codes without `vqgan`.
    """
    if task not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    report, path = DatasetReport(), os.path.expanduser(path)
    try:
        samples, names = _find_samples(path, task, classes, vqgan, report)
        if classes is not None and names is not None and names != classes:
            raise DataError(f"{path}: its {len(names)} classes are not the {len(classes)} classes of the training data")
        return Source(path, task, samples, report, num_classes=num_classes, classes=names)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def first_caption(path: str | Path, vqgan: str | None = None) -> str | None:
    """Returns the first caption of a data set, or None, and reads no further. Arguments, errors: as open_source."""
    samples, _ = _find_samples(os.path.expanduser(path), "text", None, vqgan, DatasetReport())
    return next((caption.strip() for sample in samples for caption in sample.captions if caption.strip()), None)


def _find_samples(
    path: str, task: DataTask, classes: list[str] | None, vqgan: str | None, report: DatasetReport
) -> tuple[Iterator[Sample], list[str] | None]:
    """Returns the samples, and the names of the classes if they have names. Arguments are as in open_source."""
    folder = Path(path)
    if files := tars.find_tars(path):
        return tars.tar_samples(files, report), None
    if not folder.is_dir():
        kind = "is neither a folder nor a .tar" if folder.exists() else "does not exist"
        raise DataError(f"{path}: {kind}; images are read from folders and from uncompressed tars")
    if (folder / codes.MANIFEST).exists():
        return codes.code_samples(folder, vqgan)
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return folders.saved_samples(folder)
    if metadata := folders.find_metadata(folder):
        return folders.metadata_samples(metadata, report), None
    if task == "class":
        names = folders.class_names(folder, classes)
        return folders.class_samples(folder, names, report), names
    return folders.folder_samples(folder, task, report), None
