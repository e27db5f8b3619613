"""Computes the codes of a data set once and checks what was written: the work of `mindalle prepare-codes`."""

from pathlib import Path

from mindalle_jax.data.codes import Codec, write_codes
from mindalle_jax.data.samples import DatasetReport, DataTask, Source
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import UsageError


def open_images(data: str, task: DataTask) -> Source:
    """The images of a data set whose codes are to be computed. Raises UsageError if it holds codes, DataError."""
    source = open_source(data, task)
    if source.has_codes:
        raise UsageError(f"{data} holds codes already")
    return source


def prepare_codes(source: Source, codec: Codec, out: Path, *, vqgan: str, batch_size: int = 8) -> DatasetReport:
    """Writes the codes of a source into the folder `out`, or resumes there, and reads them back.

    Returns the report of what was read back: every CRC-32 is checked. Arguments and errors: as write_codes.
    """
    write_codes(source, codec, out, vqgan=vqgan, batch_size=batch_size)
    return open_source(str(out), source.task, vqgan=vqgan).report
