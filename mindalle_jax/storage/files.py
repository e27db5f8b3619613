"""Writes files safely: a folder is complete or absent, free disk is checked first, nothing is overwritten silently."""

import contextlib
import errno
import io
import logging
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from mindalle_jax.errors import MindalleError, OutputError

log = logging.getLogger(__name__)
DEMO = "demo"
"""Name of the model in the package that is the default."""
IN_PACKAGE = {name: Path(__file__).parent.parent / name for name in (DEMO, "demo-scenes")}
"""Name -> folder of the small models that ship in the package, each with its ranker."""
RANKER = "ranker"
"""Name of the folder inside a model folder that holds a CLIP model, which ranks its images."""
SYNC_BYTES = 128 << 20
"""A writer of gigabytes calls to_disk once per this many bytes."""


def check_output(path: Path, overwrite: bool, marks: Collection[str] = ()) -> None:
    """Raises OutputError if `path` exists and may not be replaced.

    overwrite: allows to replace an empty folder, or a folder that holds a file named in `marks`. No other folder may be
    replaced, so that a typing error does not delete somebody's documents.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError(f"{path} exists already; name another folder or pass --overwrite to replace it")
    if not path.is_dir():
        raise OutputError(f"{path} is not a folder and is not replaced; name another folder")
    if any(path.iterdir()) and not any((path / mark).is_file() for mark in marks):
        raise OutputError(
            f"{path} is not empty and holds none of {', '.join(marks) or 'our files'}, so --overwrite does not "
            "replace it; name another folder"
        )


def check_apart(source: Path, target: Path) -> None:
    """Raises OutputError if replacing `target` would delete `source`, or a file to which a link in `source` points."""
    places = [source, *(path for path in source.glob("*") if path.is_symlink())]
    if any(place.resolve().is_relative_to(target.resolve()) for place in places):
        raise OutputError(f"{target} is, or holds, the source of the conversion, {source}; name another folder")


def check_free_disk(path: Path, need_bytes: int, what: str, remedy: str = "name a place on another disk") -> None:
    """Raises OutputError if the disk that will hold `path` has less than `need_bytes` free.

    what: name of the data, which begins the message. remedy: an advice, which ends it.
    """
    folder = _nearest_existing(path)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise OutputError(
            f"{what} needs {need_bytes / 1e9:.1f} GB under {folder}, where {free_bytes / 1e9:.1f} GB are free; "
            f"free some space or {remedy}"
        )


def check_writable(path: Path) -> None:
    """Raises OutputError if `path`, or the nearest folder above it that exists, cannot be written to."""
    folder = _nearest_existing(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {folder} is not a folder that can be written to; name another folder")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into an OutputError that names `path`."""
    try:
        yield
    except MindalleError:  # some of them are OSErrors
        raise
    except OSError as error:
        raise OutputError(f"{path}: {reason(error)}") from error


def write_all(file: io.FileIO, block: bytes) -> None:
    """Writes all of `block`; an unbuffered file may take it in pieces. Raises OutputError."""
    view = memoryview(block)
    while view:
        with disk_errors(Path(str(file.name))):
            view = view[file.write(view) :]


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is always complete: the new content appears with one rename. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def lock_file(file: io.FileIO, wait: bool) -> None:
    """Locks an open file. Raises BlockingIOError if another process holds it, and OSError if locks do not work."""
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError(errno.ENOSYS, "this system has no fcntl") from None
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextlib.contextmanager
def hold_lock(path: Path, when_held: Callable[[str], object], unlocked: str) -> Iterator[None]:
    """Holds the lock file `path` within the block. The lock ends with the process, also if it is killed.

    when_held: called with the name of the process that holds the lock; if it does not raise, the block waits. unlocked:
    the advice of the warning if the disk has no locks. Raises OutputError if the file cannot be written to.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(path, "a+")
    with file:
        try:
            lock_file(file, wait=False)
        except BlockingIOError:
            file.seek(0)
            when_held(file.read(200).decode(errors="replace").strip() or "another process")
            lock_file(file, wait=True)
        except OSError as error:
            log.warning("%s: no locks on this disk (%s); %s", path.parent, reason(error), unlocked)
        with disk_errors(path):
            file.truncate(0)
        write_all(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def to_disk(file: IO[bytes]) -> None:
    """Forces the written data to the disk, and out of the page cache.

    So a verification reads the disk and not memory. Also, the kernel need not find memory for gigabytes of dirty pages,
    which was the slowest part of a conversion (docs/log.md).
    """
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reason(error: BaseException) -> str:
    """Returns the reason of an error, without the number and the path that str(OSError) has."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False, marks: Collection[str] = ()) -> Iterator[Path]:
    """Yields a temporary folder beside `path`. If the block succeeds it is renamed to `path`, else it is deleted.

    Raises OutputError if `path` exists (overwrite and marks: see check_output), and for an OSError in the block, such
    as a full disk.
    """
    path = path.absolute()
    check_output(path, overwrite, marks)
    new_parents = [parent for parent in path.parents if not os.path.lexists(parent)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        check_output(path, overwrite, marks)  # again, since hours may have passed
        _move_into_place(partial, path)
    except MindalleError as error:
        if str(partial) not in str(error):
            raise
        # The message names the final folder, because the partial one is deleted.
        raise type(error)(str(error).replace(str(partial), str(path))) from None
    except OSError as error:
        name = "" if error.filename is None else f" ({str(error.filename).replace(str(partial), str(path))})"
        raise OutputError(f"{path}: {error.strerror or error}{name}; nothing was left behind") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:  # the innermost first; folders that are not empty stay
            with contextlib.suppress(OSError):
                parent.rmdir()


def _move_into_place(partial: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(partial, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    try:
        os.rename(path, old / path.name)
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a folder that cannot be moved back stays in `old`
            if os.path.lexists(old / path.name) and not os.path.lexists(path):
                os.rename(old / path.name, path)
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


MAX_EXTENSION_BYTES = 1 << 20
"""Size limit of a tar extension header (long names, pax records), which tarfile reads into memory, and of data after
the end."""


class BoundedHeader(tarfile.TarInfo):
    """Refuses huge extension headers before tarfile reads them into memory."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        is_extension = member.type in (b"x", b"g", b"X", b"L", b"K")  # pax, pax global, Solaris pax, GNU long names
        if is_extension and member.size > MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"extension header of {member.size} bytes")
        return member
