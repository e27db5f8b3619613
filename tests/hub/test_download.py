"""Downloads from a faulty server on this machine, and archives that mean harm."""

import fcntl
import hashlib
import http.client
import http.server
import io
import json
import logging
import os
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from archives import FOLDERS, GOOD, check_unpacked, free_disk, left_behind, tar_gz

from mindalle_jax.errors import CheckpointError, DownloadError, OutputError, UsageError
from mindalle_jax.hub import download as module
from mindalle_jax.hub import unpack as unpack_module
from mindalle_jax.hub.download import RELEASES, Release, download, fetch_release
from mindalle_jax.runtime.cache import cache_dir

NAME = "minDALL-E/1.3B"
BODY = random.Random(0).randbytes(300_000)
BODY_MD5 = hashlib.md5(BODY).hexdigest()


# A server with faults


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` at every path; each request takes the next of `faults`, a function handler -> None, or None."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.headers, self.faults = BODY, '"one"', {}, []
        self.requests = []  # (Range, If-Range) of each request, None where absent
        self.released = threading.Event()  # set at the end, for the faults that stall

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/some/{BODY_MD5}/file.tar.gz"

    def handle_error(self, request, client_address):
        """A client that went away is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.headers["Range"], self.headers["If-Range"]))
        fault = self.server.faults.pop(0) if self.server.faults else None
        (fault or answer)(self)


def answer(handler, *, cut=None, ranges=True, length=None, content_range=None, reset=False, stall=False, etag=True):
    """A correct answer, or one that ends after `cut` bytes of the body: by closing, reset or silence."""
    server = handler.server
    start = 0
    wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
    if wanted and ranges and handler.headers["If-Range"] in (None, server.etag):
        start = int(wanted[1])
    if start >= len(server.body):
        return fail(handler, 416)
    handler.send_response(206 if start else 200)
    total = len(server.body)
    if start:
        handler.send_header("Content-Range", content_range or f"bytes {start}-{total - 1}/{total}")
    if length != "none":
        handler.send_header("Content-Length", str(length or total - start))
    if etag and server.etag:
        handler.send_header("ETag", server.etag)
    for header in server.headers.items():
        handler.send_header(*header)
    handler.end_headers()
    handler.wfile.write(server.body[start : None if cut is None else start + cut])
    handler.wfile.flush()
    if stall:
        server.released.wait(10)
    if reset:  # Closing with linger 0 sends RST; the pause lets the client read what was sent before.
        time.sleep(0.05)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()


def faulty(**how):
    return lambda handler: answer(handler, **how)


def fail(handler, status=503):
    handler.send_error(status)


def failing(status):
    return lambda handler: fail(handler, status)


def redirecting(to):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return redirect


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def sleeps(monkeypatch):
    """The pauses asked for, in seconds; nothing really sleeps. And no proxy stands before 127.0.0.1."""
    pauses = []
    monkeypatch.setattr(module, "_sleep", pauses.append)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MINDALLE_CACHE", raising=False)
    return pauses


def fetch(server, tmp_path, url=None):
    download(url or server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert (tmp_path / "file.tar.gz").read_bytes() == BODY
    assert left_behind(tmp_path) == ["file.tar.gz"]


def interrupted(server, tmp_path, bars, at=100_000) -> int:
    """Ctrl-C once `at` bytes have come; returns how many are kept."""
    bars.interrupt_at = at
    with pytest.raises(KeyboardInterrupt):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert left_behind(tmp_path) == ["file.tar.gz.part", "file.tar.gz.part.json"]
    kept = (tmp_path / "file.tar.gz.part").read_bytes()
    assert at <= len(kept) < len(BODY) and BODY.startswith(kept)
    server.requests.clear()
    return len(kept)


# Download


def test_downloads_whole_file_once(server, tmp_path, bars):
    fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert server.requests == [(None, None)]
    assert [(bar.name, bar.n, bar.total) for bar in bars] == [
        ("file.tar.gz", len(BODY), len(BODY)),
        ("checking file.tar.gz", len(BODY), len(BODY)),
    ]


def test_length_not_given(server, tmp_path):
    server.faults = [faulty(length="none")]
    fetch(server, tmp_path)


def test_interrupted_download_asks_for_the_missing_bytes_only(server, tmp_path, bars):
    # The client is interrupted in the middle because the server falls silent there.
    server.faults = [faulty(cut=150_000, stall=True)]
    kept = interrupted(server, tmp_path, bars)
    bars.clear()
    fetch(server, tmp_path)
    assert server.requests == [(f"bytes={kept}-", '"one"')]
    assert [(bar.name, bar.total) for bar in bars] == [("checking file.tar.gz.part", kept), ("file.tar.gz", len(BODY))]
    assert bars[1].n == len(BODY)


def test_killed_process_is_continued_and_holds_no_lock(server, tmp_path):
    """kill -9: the bytes and the note on disk are enough, and the lock dies with the process."""
    server.faults = [faulty(cut=200_000, stall=True)]
    path, part = tmp_path / "file.tar.gz", tmp_path / "file.tar.gz.part"
    code = "import sys, pathlib; from mindalle_jax.hub.download import download as d; "
    code += "d(sys.argv[1], pathlib.Path(sys.argv[2]), md5=sys.argv[3])"
    child = subprocess.Popen([sys.executable, "-c", code, server.url, str(path), BODY_MD5])
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size == 200_000):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests == [("bytes=200000-", '"one"')]


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"cut": 100_000}, "the connection closed after 100000 of 300000 bytes"),
        ({"cut": 100_000, "reset": True}, "Connection reset by peer"),
        ({"cut": 100_000, "stall": True}, "timed out"),
    ],
)
def test_broken_connection_is_retried_from_where_it_broke(server, tmp_path, fault, reason, sleeps, monkeypatch, caplog):
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    server.faults = [faulty(**fault)]
    fetch(server, tmp_path)
    assert f"{reason}; trying again in 1 s" in caplog.text
    assert len(server.requests) == 2 and sleeps == [1.0]
    if "reset" not in fault:  # A reset may destroy bytes that were sent and not read yet.
        assert server.requests[1] == ("bytes=100000-", '"one"')


def test_busy_server_is_retried(server, tmp_path, sleeps):
    server.faults = [fail, fail]
    fetch(server, tmp_path)
    assert len(server.requests) == 3 and sleeps == [1.0, 4.0]


def test_retries_end_and_the_part_is_kept(server, tmp_path, sleeps):
    server.faults = [faulty(cut=100_000)] + [fail] * 4
    path = tmp_path / "file.tar.gz"
    with pytest.raises(DownloadError) as error:
        download(server.url, path, md5=BODY_MD5)
    assert sleeps == [1.0, 4.0, 16.0]
    first, second = str(error.value).split("\n")
    assert first.startswith(f"cannot download {server.url}: HTTP Error 503: Service Unavailable. ")
    assert "are kept; the same command continues." in first
    assert f"(MD5 {BODY_MD5})" in second and f"put it at {path}, then repeat" in second
    assert len((tmp_path / "file.tar.gz.part").read_bytes()) == 100_000
    server.faults = []
    fetch(server, tmp_path)
    assert server.requests[-1] == ("bytes=100000-", '"one"')


def test_progress_renews_the_retries_but_a_server_that_never_gets_further_does_not(server, tmp_path, sleeps):
    server.faults = [faulty(cut=50_000) for _ in range(5)]
    fetch(server, tmp_path)
    assert sleeps == [1.0] * 5
    (tmp_path / "file.tar.gz").unlink()
    sleeps.clear()
    server.faults = [faulty(cut=50_000, ranges=False) for _ in range(20)]
    with pytest.raises(DownloadError, match=r"the connection closed after 50000 of 300000 bytes\. 0\.0 GB are kept"):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert sleeps == [1.0, 4.0, 16.0] and len(server.requests) == 6 + 4


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_refusal_is_not_retried_and_leaves_nothing(server, tmp_path, sleeps, status):
    server.faults = [failing(status)]
    with pytest.raises(DownloadError, match=f"HTTP Error {status}: .*\\.\nFetch {server.url} "):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert len(server.requests) == 1 and sleeps == []
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "fault, requests",
    [
        ({"ranges": False}, 1),
        ({"content_range": "bytes 0-299999/300000"}, 2),
        ({"content_range": "bytes 5-299999/300000"}, 2),
        ({"content_range": "bytes */300000"}, 2),
        ({"content_range": "nonsense"}, 2),
    ],
)
def test_server_that_does_not_continue_is_read_from_the_start(server, tmp_path, bars, caplog, fault, requests):
    server.faults = [faulty(cut=150_000, stall=True)]
    interrupted(server, tmp_path, bars)
    server.faults = [faulty(**fault)]
    fetch(server, tmp_path)
    assert len(server.requests) == requests
    assert "starting again" in caplog.text


def test_changed_file_is_read_from_the_start(server, tmp_path, bars):
    """The first 100 kB are of another edition; If-Range makes the server send the new one whole."""
    server.body, server.faults = BODY[::-1], [faulty(cut=150_000, stall=True)]
    bars.interrupt_at = 100_000
    with pytest.raises(KeyboardInterrupt):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    server.body, server.etag = BODY, '"two"'
    server.requests.clear()
    fetch(server, tmp_path)
    assert len(server.requests) == 1 and server.requests[0][1] == '"one"'


def test_changed_file_from_a_server_that_ignores_if_range(server, tmp_path):
    """206 with another ETag is not a continuation."""
    server.body = BODY[::-1]

    def change(handler):
        answer(handler, cut=100_000)
        server.body, server.etag = BODY, '"two"'

    def ignores_if_range(handler):
        handler.headers.replace_header("If-Range", '"two"')
        answer(handler)

    server.faults = [change, ignores_if_range]
    fetch(server, tmp_path)
    assert server.requests == [(None, None), ("bytes=100000-", '"one"'), (None, None)]


def test_weak_etag_is_not_sent_back_but_the_date_is(server, tmp_path):
    server.etag, server.headers = 'W/"weak"', {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    server.faults = [faulty(cut=100_000)]
    fetch(server, tmp_path)
    # This server knows only its ETag, so it sends everything; what counts is the header.
    assert server.requests == [(None, None), ("bytes=100000-", "Wed, 21 Oct 2015 07:28:00 GMT")]


def test_part_longer_than_the_file_now_is(server, tmp_path, bars):
    """416: the server's file is shorter than what we have."""
    server.body, server.faults = BODY + bytes(500_000), [faulty(cut=400_000, stall=True)]
    bars.interrupt_at = 350_000
    with pytest.raises(KeyboardInterrupt):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    server.body = BODY
    fetch(server, tmp_path)


def test_part_without_its_note_or_with_a_damaged_one_starts_again(server, tmp_path):
    for note in (None, "{", "[]", '{"url": 1}', json.dumps({"url": server.url, "validator": "", "length": 3})):
        (tmp_path / "file.tar.gz.part").write_bytes(BODY[:1000])
        if note is not None:
            (tmp_path / "file.tar.gz.part.json").write_text(note)
        server.requests.clear()
        fetch(server, tmp_path)
        assert server.requests == [(None, None)]
        (tmp_path / "file.tar.gz").unlink()


def test_complete_part_needs_no_server(server, tmp_path):
    """Killed between the last byte and the rename."""
    note = {"url": server.url, "validator": '"one"', "length": len(BODY)}
    (tmp_path / "file.tar.gz.part").write_bytes(BODY)
    (tmp_path / "file.tar.gz.part.json").write_text(json.dumps(note))
    fetch(server, tmp_path)
    assert server.requests == []


def test_second_source_continues_the_first(server, tmp_path, bars):
    """Another URL of the same length is asked for the rest, without the first one's ETag."""
    server.faults = [faulty(cut=150_000, stall=True)]
    kept = interrupted(server, tmp_path, bars)
    fetch(server, tmp_path, url=server.url.replace("/some/", "/mirror/"))
    assert server.requests == [(f"bytes={kept}-", None)]


@pytest.mark.parametrize("body", [BODY[:-1], BODY[:-1] + bytes([BODY[-1] ^ 1]), b"", b"\0" * 10])
def test_wrong_content_is_removed(server, tmp_path, body):
    server.body, got = body, hashlib.md5(body).hexdigest()
    server.faults = [lambda h: answer(h) if body else h.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")]
    with pytest.raises(DownloadError) as error:
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert (
        str(error.value)
        == f"{server.url}: got {len(body)} bytes with MD5 {got}, expected {BODY_MD5}; they were removed"
    )
    assert left_behind(tmp_path) == []


def test_too_small_content_length_is_a_wrong_file(server, tmp_path):
    server.faults = [faulty(length=1000)]
    with pytest.raises(DownloadError, match="got 1000 bytes with MD5 .* expected"):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert left_behind(tmp_path) == []


def test_web_page_does_not_replace_what_is_there(server, tmp_path, bars):
    """A hotel's login page answers 200 to everything."""
    server.faults = [faulty(cut=150_000, stall=True)]
    kept = interrupted(server, tmp_path, bars)
    server.body, server.headers, server.etag = b"<html>", {"Content-Type": "text/html; charset=utf-8"}, '"page"'
    with pytest.raises(DownloadError, match=r"got a web page, not an archive \(HTTP status 200\)"):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert (tmp_path / "file.tar.gz.part").stat().st_size == kept


def test_offline_says_what_to_do_by_hand(tmp_path, sleeps, monkeypatch):
    def no_dns(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_dns)
    with pytest.raises(DownloadError) as error:
        fetch_release(NAME, cache=tmp_path)
    release, archive = RELEASES[NAME], tmp_path / "minDALL-E" / "1.3B.tar.gz"
    assert str(error.value) == (
        f"cannot download {release.url}: Name or service not known.\n"
        f"Fetch {release.url} (MD5 {release.md5}) by other means and put it at {archive}, then repeat the command; "
        "or unpack it and give its folder as the model; or convert it: mindalle convert minDALL-E/1.3B DIR "
        "--download-from FILE."
    )
    assert sleeps == []
    assert left_behind(tmp_path) == ["minDALL-E"]


def test_connection_refused_is_not_retried(tmp_path, sleeps):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x.tar.gz"
        with pytest.raises(DownloadError, match="Connection refused.\nFetch http://127"):
            download(url, tmp_path / "x.tar.gz", md5=BODY_MD5)
    assert sleeps == [] and left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "url, reason",
    [
        ("file:///etc/passwd", "unknown url type: file"),
        ("ftp://127.0.0.1/x", "unknown url type: ftp"),
        ("data:,x", "unknown url type: data"),
        ("nonsense", "unknown url type"),
        ("http://127.0.0.1:port/x", "nonnumeric port"),
        ("http://[/x", "Invalid IPv6 URL"),
        ("http:///x", "no host given"),
    ],
)
def test_only_http_and_https_are_downloaded(tmp_path, sleeps, url, reason):
    with pytest.raises(DownloadError, match=reason):
        download(url, tmp_path / "x.tar.gz", md5=BODY_MD5)
    assert sleeps == [] and left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "to, message",
    [
        ("file:///etc/passwd", "Redirection to url 'file:///etc/passwd' is not allowed"),
        ("data:,x", "Redirection to url 'data:,x' is not allowed"),
        ("ftp://127.0.0.1/x", "redirect to ftp://127.0.0.1/x refused"),
    ],
)
def test_redirects_to_other_schemes_are_refused(server, tmp_path, sleeps, to, message):
    server.faults = [redirecting(to)]
    with pytest.raises(DownloadError, match=f"HTTP Error 302: .*{message}"):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert sleeps == [] and left_behind(tmp_path) == []


def test_redirect_keeps_the_range(server, tmp_path, bars):
    server.faults = [faulty(cut=150_000, stall=True)]
    kept = interrupted(server, tmp_path, bars)
    server.faults = [redirecting("/elsewhere")]
    fetch(server, tmp_path)
    assert server.requests == [(f"bytes={kept}-", '"one"')] * 2


def test_redirect_from_https_to_http_is_refused():
    request = urllib.request.Request("https://a.example/x")
    with pytest.raises(OSError, match="redirect to http://b.example/x refused"):
        module._Redirects().redirect_request(
            request, io.BytesIO(), 302, "Found", http.client.HTTPMessage(), "http://b.example/x"
        )


@pytest.mark.parametrize(
    "error, transient",
    [
        (TimeoutError("timed out"), True),
        (urllib.error.URLError(TimeoutError("timed out")), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (http.client.RemoteDisconnected("closed"), True),
        (http.client.IncompleteRead(b""), True),
        (urllib.error.URLError(ssl.SSLEOFError(8, "EOF occurred")), True),
        (urllib.error.URLError(ssl.SSLCertVerificationError(1, "certificate verify failed")), False),
        (urllib.error.URLError(OSError(101, "Network is unreachable")), False),
        (urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution")), False),
    ],
)
def test_which_errors_are_retried(error, transient):
    """Without a network it says so at once; a wrong certificate does not get better by waiting."""
    assert module._is_transient(error) is transient


def test_download_waits_for_the_process_that_is_at_it(server, tmp_path, caplog):
    """Two at once: one request, both get the file, and the second says whom it waited for."""
    lock_path = tmp_path / "file.tar.gz.lock"
    with open(lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 12345 on somehost\n")
        lock.flush()
        threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.requests == []
    for thread in threads:
        thread.join()
    waiting = f"waiting for process 12345 on somehost, which is fetching {tmp_path / 'file.tar.gz'}"
    assert [record.getMessage() for record in caplog.records] == [waiting] * 2
    assert len(server.requests) == 1
    assert lock_path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_disk_without_locks_is_used_with_a_warning(server, tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    fetch(server, tmp_path)
    assert "no locks on this disk (Operation not supported); run one download at a time" in caplog.text


def test_full_disk_is_noticed_before_the_first_byte(server, tmp_path, monkeypatch):
    free_disk(monkeypatch, 1000)
    with pytest.raises(OutputError, match=r"downloading http.* needs 0\.0 GB under .* where 0\.0 GB are free"):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert left_behind(tmp_path) == []


def test_disk_that_fills_up_on_the_way(server, tmp_path, monkeypatch, sleeps):
    class Full(io.FileIO):
        def write(self, block):
            if str(self.name).endswith(".part") and self.tell() > 100_000:
                raise OSError(28, "No space left on device")
            return super().write(block[:7000])  # In pieces, as the system may.

    monkeypatch.setattr(module, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(io, "FileIO", Full)
    with pytest.raises(OutputError, match="file.tar.gz.part: No space left on device"):
        download(server.url, tmp_path / "file.tar.gz", md5=BODY_MD5)
    assert sleeps == []
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    fetch(server, tmp_path)
    assert int(server.requests[1][0][6:-1]) > 100_000


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="/file: (Not a directory|File exists)"):
        download(server.url, tmp_path / "file" / "file.tar.gz", md5=BODY_MD5)


def test_progress_is_a_bar_in_bytes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with unpack_module.progress("1.3B.tar.gz", 2_000_000, 1_000_000) as bar:
        bar.update(500_000)
    assert re.search(r"1\.3B\.tar\.gz: +75%.*1\.50M/2\.00M", capsys.readouterr().err)
    with unpack_module.progress("1.3B.tar.gz", -1) as bar:
        assert bar.total is None


# Fetch

ARCHIVE = tar_gz(FOLDERS + GOOD)
ARCHIVE_MD5 = hashlib.md5(ARCHIVE).hexdigest()


@pytest.fixture
def release(server, monkeypatch):
    """A small archive in the place of the published one."""
    server.body = ARCHIVE
    url = server.url.replace(BODY_MD5, ARCHIVE_MD5)
    small = Release(NAME, url, ARCHIVE_MD5, len(ARCHIVE), 10_000)
    monkeypatch.setitem(RELEASES, NAME, small)
    return small


def test_published_release():
    release = RELEASES[NAME]
    assert release.url.split("/")[-2:] == [release.md5, "1.3B.tar.gz"] and re.fullmatch("[0-9a-f]{32}", release.md5)
    assert release.root == "1.3B" and release.name == NAME


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/mindalle-jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/mindalle-jax")
    monkeypatch.setenv("MINDALLE_CACHE", "~/models")
    assert cache_dir() == Path("/home/someone/models")


def test_fetch_release_downloads_unpacks_and_removes_the_archive(server, release, tmp_path, monkeypatch):
    monkeypatch.setenv("MINDALLE_CACHE", str(tmp_path / "cache"))
    folder = fetch_release(NAME)
    assert folder == tmp_path / "cache" / "minDALL-E" / "1.3B"
    check_unpacked(folder)
    assert sorted(os.listdir(folder.parent)) == ["1.3B", "1.3B.tar.gz.lock"]
    assert fetch_release(NAME, cache=tmp_path / "cache") == folder
    assert len(server.requests) == 1


def test_fetched_release_needs_no_write_access(release, tmp_path, monkeypatch):
    folder = fetch_release(NAME, cache=tmp_path)
    monkeypatch.setattr(module, "_locked", None)
    assert fetch_release(NAME, cache=tmp_path) == folder


def test_interrupted_fetch_is_not_taken_for_complete(server, release, tmp_path, bars):
    server.faults = [faulty(cut=len(ARCHIVE) // 2, stall=True)]
    bars.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        fetch_release(NAME, cache=tmp_path)
    assert left_behind(tmp_path / "minDALL-E") == ["1.3B.tar.gz.part", "1.3B.tar.gz.part.json"]
    check_unpacked(fetch_release(NAME, cache=tmp_path))
    assert server.requests[1] == (f"bytes={len(ARCHIVE) // 2}-", '"one"')


def test_archive_put_there_by_hand_is_used(server, release, tmp_path):
    """What the offline message tells people to do."""
    (tmp_path / "minDALL-E").mkdir()
    (tmp_path / "minDALL-E" / "1.3B.tar.gz").write_bytes(ARCHIVE)
    check_unpacked(fetch_release(NAME, cache=tmp_path))
    assert server.requests == []
    assert not (tmp_path / "minDALL-E" / "1.3B.tar.gz").exists()


def test_incomplete_archive_put_there_by_hand_is_left_alone(server, release, tmp_path):
    """It may be a copy that is still going on."""
    (tmp_path / "minDALL-E").mkdir()
    archive = tmp_path / "minDALL-E" / "1.3B.tar.gz"
    archive.write_bytes(ARCHIVE[:100])
    with pytest.raises(DownloadError) as error:
        fetch_release(NAME, cache=tmp_path)
    assert str(error.value) == (
        f"{archive} (100 bytes) has MD5 {hashlib.md5(ARCHIVE[:100]).hexdigest()}, expected {ARCHIVE_MD5}: "
        "it is incomplete or another file; remove or replace it"
    )
    assert left_behind(tmp_path / "minDALL-E") == ["1.3B.tar.gz"]


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "file:{}"])
def test_local_source_is_used_in_place_and_kept(server, release, tmp_path, form):
    (tmp_path / "my archive.tgz").write_bytes(ARCHIVE)
    path = str(tmp_path / "my archive.tgz")
    source = form.format(path if form == "{}" else urllib.request.pathname2url(path))
    check_unpacked(fetch_release(NAME, source=source, cache=tmp_path / "cache"))
    assert server.requests == []
    assert (tmp_path / "my archive.tgz").read_bytes() == ARCHIVE
    assert sorted(os.listdir(tmp_path / "cache" / "minDALL-E")) == ["1.3B", "1.3B.tar.gz.lock"]


def test_other_url_as_source(server, release, tmp_path):
    url = release.url
    RELEASES[NAME] = Release(NAME, "http://nowhere.invalid/1.3B.tar.gz", ARCHIVE_MD5, len(ARCHIVE), 10_000)
    check_unpacked(fetch_release(NAME, source=url, cache=tmp_path))


@pytest.mark.parametrize(
    "source, message",
    [
        ("ftp://127.0.0.1/x", "source 'ftp://127.0.0.1/x': give an http, https or file URL, or a path"),
        ("file://otherhost/x", "give an http, https or file URL, or a path"),
        ("file:///no/such/file", "source 'file:///no/such/file': no such file"),
        ("/no/such/file", "source '/no/such/file': no such file"),
        ("", "source '' is a folder; give the archive, or the folder as the model path"),
        ("/dev/null", "source '/dev/null': no such file"),
    ],
)
def test_unusable_sources(release, tmp_path, source, message):
    with pytest.raises(DownloadError, match=re.escape(message)):
        fetch_release(NAME, source=source, cache=tmp_path / "cache")
    assert os.listdir(tmp_path) == []


def test_local_source_with_another_checksum(release, tmp_path):
    (tmp_path / "a.tgz").write_bytes(ARCHIVE[:-1] + b"!")
    with pytest.raises(DownloadError, match=f"has MD5 .*, expected {ARCHIVE_MD5}: it is incomplete or another file"):
        fetch_release(NAME, source=str(tmp_path / "a.tgz"), cache=tmp_path / "cache")
    assert left_behind(tmp_path) == ["a.tgz", "cache", "cache/minDALL-E"]


def test_right_checksum_and_wrong_content_keeps_the_archive(server, release, tmp_path, monkeypatch):
    """So that 5 GB are not fetched again to look at them."""
    body = tar_gz([*GOOD, ("1.3B/extra", b"", {})])
    server.body, md5 = body, hashlib.md5(body).hexdigest()
    monkeypatch.setitem(RELEASES, NAME, Release(NAME, release.url, md5, len(body), 10_000))
    with pytest.raises(CheckpointError, match=r"1\.3B\.tar\.gz: unexpected member '1\.3B/extra'"):
        fetch_release(NAME, cache=tmp_path)
    assert left_behind(tmp_path / "minDALL-E") == ["1.3B.tar.gz"]


def test_unknown_release():
    with pytest.raises(UsageError, match="unknown release 'minDALL-E/2B'; there is minDALL-E/1.3B"):
        fetch_release("minDALL-E/2B")


def test_incomplete_folder_is_reported(server, release, tmp_path):
    folder = fetch_release(NAME, cache=tmp_path)
    (folder / "stage1_last.ckpt").unlink()
    with pytest.raises(OutputError, match=r"1\.3B is there but lacks stage1_last\.ckpt; remove the folder to fetch it"):
        fetch_release(NAME, cache=tmp_path)


def test_leftovers_of_a_killed_process_are_removed(server, release, tmp_path):
    leftover = tmp_path / "minDALL-E" / ".1.3B.unpack-0123abcd"
    leftover.mkdir(parents=True)
    (leftover / "stage2_last.ckpt").write_bytes(b"half")
    fetch_release(NAME, cache=tmp_path)
    assert not leftover.exists()


def test_disk_for_archive_and_folder_is_asked_for_at_the_start(tmp_path, monkeypatch):
    """The published size, less what has come already: 5.0 + 5.6 GB."""
    free_disk(monkeypatch, 3_000_000_000)
    with pytest.raises(OutputError) as error:
        fetch_release(NAME, cache=tmp_path)
    assert str(error.value) == (
        f"downloading and unpacking {NAME} needs 10.6 GB under {tmp_path / 'minDALL-E'}, where 3.0 GB are free; "
        "free some space or set MINDALLE_CACHE to a folder on a larger disk"
    )
    with open(tmp_path / "minDALL-E" / "1.3B.tar.gz.part", "wb") as part:
        part.truncate(4_000_000_000)  # Sparse: takes no disk.
    with pytest.raises(OutputError, match=r"needs 6\.6 GB"):
        fetch_release(NAME, cache=tmp_path)


def test_two_fetches_at_once_share_one_download(server, release, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    server.faults = [lambda handler: (time.sleep(0.2), answer(handler))]
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(fetch_release(NAME, cache=tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 3 and len(server.requests) == 1
    check_unpacked(folders[0])
