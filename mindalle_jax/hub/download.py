"""Fetches a published model: resumable download, checksum, and unpacking without trusting the archive.

Under the cache folder, for the release `minDALL-E/1.3B`:

    minDALL-E/1.3B/               the result; it appears by one rename, when it is complete
    minDALL-E/1.3B.tar.gz         appears once length and MD5 agree; removed once it is unpacked, to save 5 GB
    minDALL-E/1.3B.tar.gz.part    the received part of an unfinished download, with its .part.json; a retry continues it
    minDALL-E/1.3B.tar.gz.lock    held by the one process that downloads; the file itself stays
    minDALL-E/.1.3B.unpack-*      exists while unpacking

The publisher gives an MD5, which shows damage and a wrong file. `unpack` and the reader of the weights make sure that
nothing in the file can do harm.
"""

import contextlib
import dataclasses
import errno
import hashlib
import http.client
import io
import json
import logging
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mindalle_jax.errors import DownloadError, MindalleError, OutputError, UsageError
from mindalle_jax.hub.unpack import CHUNK_BYTES, FILES, LARGER_CACHE, progress, unpack
from mindalle_jax.runtime.cache import cache_dir
from mindalle_jax.storage.files import check_free_disk, disk_errors, hold_lock, reason, write_all

TIMEOUT_S = 30.0
"""Limit for connecting, and for each wait for more bytes."""
RETRY_DELAYS_S = (1.0, 4.0, 16.0)
"""Pauses before the retries of a transient error. They start anew whenever the download has made progress."""
log = logging.getLogger(__name__)
_sleep = time.sleep  # Tests replace it.


@dataclasses.dataclass(frozen=True)
class Release:
    """A published archive."""

    name: str
    """`minDALL-E/1.3B`; its last part is the folder inside the archive."""
    url: str
    md5: str
    download_bytes: int
    """Approximate size, for the check of the free disk before the server gives the exact one."""
    unpacked_bytes: int
    """Approximate size, as above."""

    @property
    def root(self) -> str:
        return self.name.rpartition("/")[2]


_URL = "https://arena.kakaocdn.net/brainrepo/models/minDALL-E/57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz"
RELEASES = {
    "minDALL-E/1.3B": Release(
        name="minDALL-E/1.3B",
        url=_URL,
        md5=_URL.split("/")[-2],
        download_bytes=5_000_000_000,
        unpacked_bytes=5_600_000_000,  # 1.367e9 float32 weights and what Lightning puts beside them.
    )
}


def fetch_release(name: str, *, source: str | None = None, cache: Path | None = None) -> Path:
    """Returns the folder `cache/name` with config.yaml, tokenizer/, stage1_last.ckpt and stage2_last.ckpt.

    If the folder is not there, downloads and unpacks it. source: another http, https or file URL of the same archive,
    or a path to it; its MD5 must be the same. Such a file is unpacked in its place and stays. An archive in the cache,
    also one that a person put there, is removed after it is unpacked. cache: the default is `cache_dir()`.

    Raises UsageError (unknown name), DownloadError (unreachable, incomplete or the wrong file), OutputError (disk full
    or not writable, an incomplete folder in the way) and CheckpointError (the archive holds something else).
    """
    if name not in RELEASES:
        raise UsageError(f"unknown release {name!r}; there is {', '.join(RELEASES)}")
    release = RELEASES[name]
    folder = (cache or cache_dir()) / name
    if _is_unpacked(folder):
        return folder
    archive = folder.with_name(f"{release.root}.tar.gz")
    local = _local_path(release.url if source is None else source)
    with _locked(archive):
        if _is_unpacked(folder):  # Another process did it while this one waited.
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.unpack-*"):  # Its process died, else it held the lock.
            shutil.rmtree(leftover, ignore_errors=True)
        if local is not None:
            check_free_disk(folder.parent, release.unpacked_bytes, "unpacking", LARGER_CACHE)
            _check_file(local, release.md5)
            unpack(local, folder, root=release.root)
        else:
            have = sum(p.stat().st_size for p in (archive, _part_path(archive)) if p.exists())
            need = max(0, release.download_bytes - have) + release.unpacked_bytes
            check_free_disk(folder.parent, need, f"downloading and unpacking {name}", LARGER_CACHE)
            _download(source or release.url, archive, release.md5)
            unpack(archive, folder, root=release.root)
            archive.unlink()
    return folder


def download(url: str, path: Path, *, md5: str) -> None:
    """Downloads `url` (http or https) to `path`. It continues `path`.part, which an earlier call may have left.

    `path` appears only when length and MD5 (32 hex digits) agree. If it is there already, it is only checked. Transient
    errors are retried. Raises DownloadError, whose message says what to do by hand, and OutputError (disk).
    """
    with _locked(path):
        _download(url, path, md5)


# Downloading


@dataclasses.dataclass(frozen=True)
class _Entity:
    """The file that a server sends, by its headers. It shows whether a later answer continues the same file."""

    url: str
    validator: str
    """The strong ETag, else Last-Modified, else empty."""
    length: int
    """Length in bytes; -1 if the server did not give it."""


class _Part:
    """The bytes received so far (`path`.part) with their MD5; `path`.part.json names their entity."""

    def __init__(self, path: Path, file: io.FileIO):
        self.path, self.note_path, self.file = _part_path(path), path.with_name(path.name + ".part.json"), file
        self.entity, self.size, self.md5 = _Entity("", "", -1), 0, _md5()

    def load(self) -> None:
        """Continues the file of an earlier process, if its note can be read."""
        try:
            note = json.loads(self.note_path.read_text())
            entity = _Entity(str(note["url"]), str(note["validator"]), int(note["length"]))
        except (OSError, ValueError, TypeError, KeyError):
            return self.start(self.entity)
        with disk_errors(self.path):
            self.file.seek(0)
            self.md5, self.size, self.entity = _hash(self.file, self.path.name), self.file.tell(), entity
        if self.size > entity.length:
            self.start(self.entity)

    def start(self, entity: _Entity) -> None:
        """Empties the file, for the start of `entity`."""
        self.entity, self.size, self.md5 = entity, 0, _md5()
        with disk_errors(self.path):
            self.file.truncate(0)  # First the bytes, then the note: never a note about other bytes.
            self.note_path.write_text(json.dumps(dataclasses.asdict(entity)))

    def append(self, block: bytes) -> None:
        write_all(self.file, block)
        self.md5.update(block)
        self.size += len(block)

    def resume_headers(self, url: str) -> dict[str, str]:
        headers = {"Range": f"bytes={self.size}-"}
        if url == self.entity.url and self.entity.validator:
            headers["If-Range"] = self.entity.validator
        return headers

    def is_continued_by(self, url: str, response: http.client.HTTPResponse) -> bool:
        """Returns whether the answer starts at the end of our part and goes to the end of the same file.

        For another URL, the same length is enough; the MD5 decides at the end.
        """
        got = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
        expected = (self.size, self.entity.length - 1, self.entity.length)
        if response.status != 206 or got is None or tuple(map(int, got.groups())) != expected:
            return False
        return url != self.entity.url or _validator(response) in ("", self.entity.validator)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)


@contextlib.contextmanager
def _open_part(path: Path) -> Iterator[_Part]:
    with disk_errors(_part_path(path)):
        file = io.FileIO(_part_path(path), "a+")
    with file:
        part = _Part(path, file)
        part.load()
        try:
            yield part
        finally:
            if part.size == 0:
                part.remove()


def _download(url: str, path: Path, md5: str) -> None:
    """`download`, with the lock held."""
    if path.exists():
        return _check_file(path, md5)
    by_hand = (
        f"Fetch {url} (MD5 {md5}) by other means and put it at {path}, then repeat the command; "
        "or unpack it and give its folder as the model; or convert it: mindalle convert minDALL-E/1.3B DIR "
        "--download-from FILE."
    )
    with _open_part(path) as part:
        _receive_with_retries(url, part, by_hand)
        if part.md5.hexdigest() != md5:
            part.remove()
            raise DownloadError(
                f"{url}: got {part.size} bytes with MD5 {part.md5.hexdigest()}, expected {md5}; they were removed"
            )
        with disk_errors(path):
            os.fsync(part.file.fileno())
            os.replace(part.path, path)
            part.remove()


def _receive_with_retries(url: str, part: _Part, by_hand: str) -> None:
    """Makes `part` complete, with retries. Raises DownloadError that ends in `by_hand`; the received part stays."""
    delays, furthest = list(RETRY_DELAYS_S), part.size
    while True:
        try:
            return _receive(url, part)
        except MindalleError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            if part.size > furthest:
                delays, furthest = list(RETRY_DELAYS_S), part.size
            if not delays or not _is_transient(error):
                kept = f" {part.size / 1e9:.1f} GB are kept; the same command continues." if part.size else ""
                raise DownloadError(f"cannot download {url}: {_reason(error)}.{kept}\n{by_hand}") from error
            log.warning("%s: %s; trying again in %g s", url, _reason(error), delays[0])
        _sleep(delays.pop(0))


def _receive(url: str, part: _Part) -> None:
    """Makes one attempt: connects, and appends until the length that the server gave, or until it closes."""
    if part.size and part.size == part.entity.length:
        return
    with _connect(url, part) as response:
        length = part.entity.length
        check_free_disk(part.path.parent, length - part.size, f"downloading {url}", LARGER_CACHE)
        with progress(part.path.name.removesuffix(".part"), length, part.size) as bar:
            while part.size != length:
                block = response.read1(CHUNK_BYTES)
                if not block:
                    break
                part.append(block)
                bar.update(len(block))
    if length not in (-1, part.size):
        raise ConnectionResetError(f"the connection closed after {part.size} of {length} bytes")


def _connect(url: str, part: _Part) -> http.client.HTTPResponse:
    """Returns an answer whose body continues `part`. If the server will not continue, empties `part` first."""
    response = None
    if part.size:
        try:
            response = _request(url, part.resume_headers(url))
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        if response and part.is_continued_by(url, response):
            return response
        if response and response.status != http.client.OK:
            response.close()
            response = None
    response = response or _request(url, {})
    if response.status != http.client.OK or response.headers.get_content_type() == "text/html":
        response.close()  # A login or error page must not replace gigabytes already here.
        raise ValueError(f"got a web page, not an archive (HTTP status {response.status})")
    if part.size:
        log.warning("%s: the file changed, or the server cannot continue at byte %d; starting again", url, part.size)
    part.start(_Entity(url, _validator(response), -1 if response.length is None else response.length))
    return response


def _validator(response: http.client.HTTPResponse) -> str:
    """Returns the value for If-Range: a strong ETag or a date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, and none from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            raise urllib.error.HTTPError(req.full_url, code, f"redirect to {newurl} refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _request(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()  # Not build_opener, which adds file, ftp and data URLs.
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(urllib.request.UnknownHandler())
    opener.add_handler(urllib.request.HTTPHandler())
    opener.add_handler(urllib.request.HTTPSHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    opener.add_handler(urllib.request.HTTPDefaultErrorHandler())
    opener.add_handler(_Redirects())
    request = urllib.request.Request(url, headers={"User-Agent": "mindalle-jax", **headers})
    try:
        return opener.open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _is_transient(error: Exception) -> bool:
    """Returns whether another try may help soon. It does not without a network, host or file."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    reason = getattr(error, "reason", error)
    lasting = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError, http.client.InvalidURL)
    if isinstance(reason, lasting) or getattr(reason, "errno", 0) in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return False
    return isinstance(reason, OSError | http.client.HTTPException)


# Files, checksums, locks


def _is_unpacked(folder: Path) -> bool:
    """Raises OutputError when `folder` is there without one of its files."""
    if not os.path.lexists(folder):
        return False
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise OutputError(f"{folder} is there but lacks {', '.join(missing)}; remove the folder to fetch it again")
    return True


def _local_path(source: str) -> Path | None:
    """The file that `source` names; None when it is an http or https URL."""
    path = Path(os.path.expanduser(source))
    if "://" in source or source.lower().startswith("file:"):
        scheme, host, url_path, *_ = urllib.parse.urlparse(source)
        if scheme in ("http", "https"):
            return None
        if scheme != "file" or host not in ("", "localhost"):
            raise DownloadError(f"source {source!r}: give an http, https or file URL, or a path")
        path = Path(urllib.request.url2pathname(url_path))
    if path.is_dir():
        raise DownloadError(f"source {source!r} is a folder; give the archive, or the folder as the model path")
    if not path.is_file():
        raise DownloadError(f"source {source!r}: no such file")
    return path


def _part_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _md5():
    return hashlib.md5(usedforsecurity=False)


def _hash(file: io.FileIO, name: str):
    """The MD5 of the rest of `file`, as an object that can take more."""
    md5 = _md5()
    with progress(f"checking {name}", os.fstat(file.fileno()).st_size) as bar:
        while block := file.read(CHUNK_BYTES):
            md5.update(block)
            bar.update(len(block))
    return md5


def _check_file(path: Path, md5: str) -> None:
    """Raises DownloadError when a file that the user gave is another one; leaves it alone."""
    try:
        with io.FileIO(path) as file:
            got = _hash(file, path.name).hexdigest()
    except OSError as error:
        raise DownloadError(f"{path}: {_reason(error)}") from error
    if got != md5:
        raise DownloadError(
            f"{path} ({path.stat().st_size} bytes) has MD5 {got}, expected {md5}: "
            "it is incomplete or another file; remove or replace it"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds `path`.lock within the block. If another process holds it, names that process and waits."""

    def tell(holder: str) -> None:
        log.warning("waiting for %s, which is fetching %s", holder, path)

    with hold_lock(path.with_name(path.name + ".lock"), tell, "run one download at a time"):
        yield


def _reason(error: BaseException) -> str:
    """As files.reason, of what lies inside a URLError."""
    inner = error.reason if type(error) is urllib.error.URLError else error
    return reason(inner) if isinstance(inner, BaseException) else str(inner)
