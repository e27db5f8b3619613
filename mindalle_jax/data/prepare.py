"""Computes the codes of a data set once, and checks the files that were written. `mindalle prepare-codes` uses it."""

from pathlib import Path

from mindalle_jax.data.codes import Codec, write_codes
from mindalle_jax.data.samples import DatasetReport, DataTask, Source
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import UsageError


def open_images(data: str, task: DataTask) -> Source:
    """Opens a data set of images. Raises UsageError if it holds codes already, and DataError as open_source."""
    source = open_source(data, task)
    if source.has_codes:
        raise UsageError(f"{data} holds codes already")
    return source


def prepare_codes(source: Source, codec: Codec, out: Path, *, vqgan: str, batch_size: int = 8) -> DatasetReport:
    """Writes the codes of a source into the folder `out`, or resumes there. Then reads them back.

    Reading back checks every CRC-32. Returns its report. Arguments and errors are as in write_codes.
    """
    write_codes(source, codec, out, vqgan=vqgan, batch_size=batch_size)
    return open_source(str(out), source.task, vqgan=vqgan).report
