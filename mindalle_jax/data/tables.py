"""Samples of tables that the library `datasets` reads: saved data sets, parquet files, and data sets of the hub."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mindalle_jax.data.records import Columns, captions_of, label_of
from mindalle_jax.data.samples import DatasetReport, Sample
from mindalle_jax.data.walk import SPLITS, Split, split_of
from mindalle_jax.errors import DataError, install_hint, one_line

HUB = "hf://"
"""Beginning of the name of a data set on the Hugging Face hub."""
Table = tuple[Iterator[Sample], list[str] | None]
"""The samples, and the names of the classes if the labels have names."""


class Row(NamedTuple):
    """The image in one row of a table."""

    dataset: Any
    number: int

    def read(self) -> bytes:
        """Returns the encoded image. Raises OSError."""
        (image,) = self.dataset[self.number].values()
        if isinstance(image, bytes):
            return image
        if image is None:
            raise OSError("the row has no image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def saved_samples(folder: Path, split: Split, report: DatasetReport, columns: Columns) -> Table:
    """Reads a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises DataError if the library is missing, the folder cannot be opened, or it has no column of images.
    """
    if (folder / "dataset_dict.json").exists():
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        folder = folder / _choose(folder, names, split)
    datasets = check_library(folder)
    report.layout = "a data set that the library datasets saved"
    return _samples(str(folder), lambda: datasets.load_from_disk(str(folder)), report, columns)


def parquet_samples(folder: Path, names: list[str], split: Split, report: DatasetReport, columns: Columns) -> Table:
    """Reads parquet files, as the hub and img2dataset write them; of files named by split those of this split."""
    splits = {name: split_of(os.path.basename(name)) for name in names}
    if any(splits.values()):
        known = sorted({found for found in splits.values() if found})
        if split not in known:
            raise DataError(f"{folder}: holds the splits {', '.join(known)}, and no {split}; name the files of one")
        names = [name for name in names if splits[name] == split]
    datasets = check_library(folder)
    files = [str(folder / name) for name in sorted(names)]
    report.layout = f"{len(files)} parquet files" if files[1:] else "a parquet file"
    return _samples(str(folder), lambda: datasets.Dataset.from_parquet(files), report, columns)


def hub_samples(name: str, split: Split, report: DatasetReport, columns: Columns) -> Table:
    """Downloads a data set of the hub, hf://OWNER/NAME, through the library and its cache."""
    datasets = check_library(name)
    report.layout = "a data set of the Hugging Face hub"

    def load() -> Any:
        repository = name.removeprefix(HUB)
        splits = datasets.get_dataset_split_names(repository)
        return datasets.load_dataset(repository, split=_choose(name, splits, split))

    return _samples(name, load, report, columns)


def _choose(place: str | Path, names: Sequence[str], split: Split) -> str:
    """Returns the name of a split among `names`. Raises DataError if there is not exactly one."""
    found = [name for name in names if name.lower() in SPLITS[split]]
    if len(found) != 1:
        raise DataError(f"{place}: holds the splits {', '.join(names)}, and no {split}; name the folder of one")
    return found[0]


def check_library(place: str | Path) -> Any:
    """Returns the library `datasets`. Raises DataError, naming `place`, if it is missing."""
    try:
        import datasets  # in the extra [datasets]
    except ImportError:
        raise DataError(f"{place}: needs the library datasets: {install_hint('datasets')}") from None
    return datasets


def _samples(place: str, load: Any, report: DatasetReport, columns: Columns) -> Table:
    """Returns the rows of a data set as samples. Raises DataError if it cannot be opened or has no images."""
    datasets = check_library(place)
    logger = logging.getLogger("datasets")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # it logs an error that it raises
        dataset: Any = load()
    except DataError:
        raise
    except Exception as error:  # the library raises errors of many kinds
        raise DataError(f"{place}: cannot be opened by the library datasets: {one_line(error)}") from None
    finally:
        logger.setLevel(level)
    features = dataset.features
    found = columns.find(features)
    image = columns.image or _image_column(features, datasets)
    if image is None:
        raise DataError(f"{place}: has no column of images, only {', '.join(features)}; name one: data.image_column")
    if isinstance(features[image], datasets.Image):
        images = dataset.select_columns(image).cast_column(image, datasets.Image(decode=False))
    else:
        images = dataset.select_columns(image)
    texts, labels = (None if name is None else dataset[name][:] for name in (found.caption, found.label))
    report.layout += f": images in the column {image}" + (f", captions in {found.caption}" if found.caption else "")
    unused = [name for name in features if name not in (image, found.caption, found.label)]
    report.unused.update({(f"column {name}", "neither image, caption nor label"): 1 for name in unused})

    def samples() -> Iterator[Sample]:
        for number in range(len(dataset)):
            # The library's own digest replaces the sizes of the images, for which all of them would have to be read.
            name = f"{dataset._fingerprint}/{number}"
            try:
                captions = captions_of(None if texts is None else texts[number])
                label = label_of(None if labels is None else labels[number])
            except ValueError:
                report.drop("rows whose caption or label cannot be read", name)
                continue
            yield Sample(name, Row(images, number), captions=captions, label=label)

    return samples(), getattr(features.get(found.label), "names", None)


def _image_column(features: Any, datasets: Any) -> str | None:
    """Returns the first column of images, or of bytes with the name of an image's extension."""
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes") if name in features]
    stored = [name for name in named if "binary" in str(features[name]) or "bytes" in str(features[name])]
    return next(iter([*typed, *stored]), None)
