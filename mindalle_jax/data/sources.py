"""Opens a data set: finds out its layout from the names in it, and calls the reader of that layout.

    layout                                                                                 tasks
    name.jpg (.jpeg, .png, .webp) with name.txt, name.caption or name.json beside it       text
    metadata.jsonl, metadata.csv or metadata.tsv, also in subfolders                       text, class
    captions in the JSON format of COCO                                                    text
    one folder per class                                                                   class
    images alone                                                                           unconditional
    tar files as webdataset writes them: key.jpg with key.txt, key.json or key.cls         text, class
    parquet files; a data set that `datasets` saved; hf://OWNER/NAME on the hub            text, class
    codes that mindalle prepare-codes wrote                                                text, class

All of them can be used for the task "unconditional" too. Above most of them there may be folders of splits: train/ and
val/. Training takes train, validation takes val.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from mindalle_jax.data import codes, folders, metadata, tables, tars
from mindalle_jax.data.records import ANY_COLUMNS, Columns
from mindalle_jax.data.samples import TASKS, DatasetReport, DataTask, Sample, Source
from mindalle_jax.data.walk import Split, is_image, split_folder, walk
from mindalle_jax.errors import DataError, UsageError

UNPACK = {
    ".tar.gz": "gunzip -k",
    ".tgz": "gunzip -k -S .tgz",
    ".tar.bz2": "bunzip2 -k",
    ".tar.xz": "unxz -k",
    ".tar.zst": "unzstd",
    ".zip": "unzip",
    ".rar": "unrar x",
    ".7z": "7z x",
}
"""Extension of an archive that is not read -> the command that unpacks it."""


def open_source(
    path: str | Path,
    task: DataTask,
    *,
    split: Split = "train",
    columns: Columns = ANY_COLUMNS,
    num_classes: int | None = None,
    classes: list[str] | None = None,
    vqgan: str | None = None,
) -> Source:
    """Opens a data set: a folder, a file, a pattern of tar files such as "cc3m-{00..31}.tar", or hf://OWNER/NAME.

    split: which one is read of a data set with splits. columns: names of fields, where they are not the usual ones.
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
        samples, names = _find_samples(path, task, split, columns, vqgan, report)
        return Source(path, task, samples, report, num_classes=num_classes, classes=names, known_classes=classes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def check_path(path: str | None, field: str, columns: Columns = ANY_COLUMNS) -> None:
    """Raises DataError if a data set is not there, or has no sample for any task, or needs a library that is missing.

    It is called before a model is downloaded, and reads no further than the first sample. None is no data set.
    """
    if path is None:
        return
    if path.startswith(tables.HUB):
        tables.check_library(path)
        return
    path = os.path.expanduser(path)
    if not path.strip():
        raise DataError(f"{field} is not set; name your images, such as {field}=photos")
    if not tars.find_tars(path) and not os.path.exists(path):
        raise DataError(f"{field}: {path} does not exist")
    if (Path(path) / codes.MANIFEST).exists():
        return
    split, errors = "valid" if field == "data.valid" else "train", []
    for task in TASKS:
        report = DatasetReport()
        try:
            samples, _ = _find_samples(path, task, split, columns, None, report)
            if next(samples, None) is not None:
                return
            errors.append(DataError(f"{field}: {path} holds nothing to train on: {report}"))
        except DataError as error:
            errors.append(error)
        except OSError as error:
            raise DataError(f"{field}: {path} cannot be read: {error}") from None
    raise errors[0]


def first_caption(path: str | Path, vqgan: str | None = None, columns: Columns = ANY_COLUMNS) -> str | None:
    """Returns the first caption of a data set, or None, and reads no further. Arguments, errors: as open_source."""
    samples, _ = _find_samples(os.path.expanduser(path), "text", "train", columns, vqgan, DatasetReport())
    return next((caption.strip() for sample in samples for caption in sample.captions if caption.strip()), None)


def _find_samples(
    path: str, task: DataTask, split: Split, columns: Columns, vqgan: str | None, report: DatasetReport
) -> tuple[Iterator[Sample], list[str] | None]:
    """Returns the samples, and the names of the classes if they are listed. Arguments are as in open_source."""
    if path.startswith(tables.HUB):
        return tables.hub_samples(path, split, report, columns)
    if files := tars.find_tars(path):
        return tars.tar_samples(files, report, columns), None
    folder = Path(path)
    if not folder.is_dir():
        return _file_samples(folder, split, columns, report)
    if (folder / codes.MANIFEST).exists():
        report.layout = "codes that mindalle prepare-codes wrote"
        return codes.code_samples(folder, vqgan)
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return tables.saved_samples(folder, split, report, columns)
    folder = split_folder(folder, split)
    if files := tars.find_tars(str(folder)):
        return tars.tar_samples(files, report, columns), None
    names = sorted(walk(folder))
    if tables_of_metadata := [name for name in names if metadata.is_metadata(name)]:
        return metadata.metadata_samples(folder, tables_of_metadata, report, columns), None
    if task == "text" and (coco := metadata.find_coco(folder)):
        return metadata.coco_samples(folder, coco, report), None
    parquet = [name for name in names if name.lower().endswith(".parquet")]
    if parquet and not any(map(is_image, names)):
        return tables.parquet_samples(folder, parquet, split, report, columns)
    if not any(map(is_image, names)):
        _refuse_archives(folder, names)
    if task == "class":
        return folders.class_samples(folder, report), folders.class_names(folder)
    return folders.folder_samples(folder, task, report, columns), None


def _file_samples(
    file: Path, split: Split, columns: Columns, report: DatasetReport
) -> tuple[Iterator[Sample], list[str] | None]:
    """Returns the samples of a path that is no folder and no tar. Raises DataError if it is nothing that is read."""
    name = file.name.lower()
    if file.is_file():
        if name.endswith(".parquet"):
            return tables.parquet_samples(file.parent, [file.name], split, report, columns)
        if name.endswith((".jsonl", ".csv", ".tsv")):
            return metadata.metadata_samples(file.parent, [file.name], report, columns), None
        if name.endswith(".json"):
            return metadata.coco_samples(file.parent, [file.name], report), None
        if extension := _archive_of(name):
            unpack = f"{UNPACK[extension]} {shlex.quote(str(file))}"
            raise DataError(f"{file}: {extension} files are not read; unpack it: {unpack}")
    kind = "is no data set" if file.exists() else "does not exist"
    raise DataError(
        f"{file}: {kind}; images are read from folders, uncompressed tars, parquet and metadata files, and "
        f"{tables.HUB}OWNER/NAME"
    )


def _archive_of(name: str) -> str | None:
    """Returns the extension of UNPACK that a name has."""
    return next((end for end in UNPACK if name.lower().endswith(end)), None)


def _refuse_archives(folder: Path, names: list[str]) -> None:
    """Raises DataError for archives, with the command that unpacks the first."""
    for name in names:
        if extension := _archive_of(name):
            count = sum(other.lower().endswith(extension) for other in names)
            raise DataError(
                f"{folder}: holds {count:,} {extension} files, which are not read; unpack them: "
                f"{UNPACK[extension]} {shlex.quote(str(folder / name))}"
            )
