"""Writing without losing anything: whole folders or none, free disk checked first, nothing silently overwritten."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mindalle_jax.errors import OutputError


def check_output(path: Path, overwrite: bool) -> None:
    """Raises OutputError if `path` exists and is not to be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists already; name another place or pass --overwrite to replace it")


def check_free_disk(path: Path, need_bytes: int, what: str) -> None:
    """Raises OutputError, stating the need, if the disk that will hold `path` has less than `need_bytes` free."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise OutputError(
            f"{what} needs {need_bytes / 1e9:.1f} GB under {folder}, where {free_bytes / 1e9:.1f} GB are free; "
            "free some space or name a place on another disk"
        )


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises OutputError if `path` exists (and overwrite is False), cannot be written, or the disk fills up.
    """
    path = path.absolute()
    check_output(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _move_into_place(partial, path, overwrite)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise OutputError(f"{path}: {error.strerror}; nothing was left behind") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, path: Path, overwrite: bool) -> None:
    check_output(path, overwrite)
    if os.path.lexists(path):
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        os.rename(path, old / path.name)
        os.rename(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
