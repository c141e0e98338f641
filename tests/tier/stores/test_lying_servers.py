"""A web server that tells numbers which no file can have: such a file is left out with a line, and the others are served."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fusehsm.tier.stores import http
from fusehsm.tier.stores.base import Entry, Kind, StoreError, possible
from fusehsm.tier.stores.fsspec import _nanoseconds
from fusehsm.tier.stores.open import open_store

pytestmark = pytest.mark.any_engine


@contextmanager
def _serving(
    headers: Mapping[str, str], page: bytes = b'<a href="odd">odd</a><a href="good">good</a>'
) -> Iterator[str]:
    """The URL of a directory with the file "odd", of which HEAD tells these headers, and the file "good" of 3 bytes."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in (headers if self.path.endswith("odd") else {"Content-Length": "3"}).items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _listed(url: str) -> tuple[dict[str, Entry], list[str | None]]:
    errors: list[StoreError] = []
    with open_store(url) as store:
        return {entry.path: entry for entry in store.tree(errors.append)}, [
            error.filename for error in errors
        ]


@pytest.mark.parametrize("size", [1 << 63, 10**19])
def test_a_size_beyond_63_bits(size: int) -> None:
    with _serving({"Content-Length": str(size)}) as url:
        entries, left_out = _listed(url)
    assert (set(entries), left_out) == ({"good"}, ["odd"])


@pytest.mark.parametrize(
    "time",
    [
        "Mon, 01 Jan 9999 00:00:00 -0000",
        "Mon, 01 Jan 2024 00:00:00 +99999999999999",
    ],
)
def test_a_time_that_no_file_can_have(time: str) -> None:
    with _serving({"Content-Length": "3", "Last-Modified": time}) as url:
        entries, left_out = _listed(url)
    assert (set(entries), left_out) == ({"odd", "good"}, [])
    assert entries["odd"].mtime_ns is None


def test_a_page_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_LARGEST_PAGE", 1000)
    with _serving({}, page=b"x" * 1001) as url, pytest.raises(StoreError, match="more than 1,000 bytes"):
        _listed(url)


@pytest.mark.parametrize("text", ["9" * 5000, "\u0663", "-1", "1_0", " 1", ""])
def test_what_is_no_number_of_bytes(text: str) -> None:
    assert http._content_length({"Content-Length": text}) is None
    assert http._range_of({"Content-Range": f"bytes 0-{text}/9"})[1] is None


@pytest.mark.parametrize("time", [float("inf"), float("nan"), -float("inf")])
def test_a_time_that_is_no_number(time: float) -> None:
    assert _nanoseconds(time) is None


def test_what_no_file_can_have_is_none() -> None:
    odd = Entry("odd", Kind.FILE, size=1, uid=(1 << 32) - 1, gid=-1, mtime_ns=1 << 63)
    assert possible(odd) == Entry("odd", Kind.FILE, size=1)
    fine = Entry("fine", Kind.FILE, size=(1 << 63) - 1, uid=0, gid=(1 << 32) - 2, mtime_ns=-(1 << 62))
    assert possible(fine) == fine


class _Bucket(BaseHTTPRequestHandler):
    """Answers each request for a range with the right range in its head, and any number of bytes."""

    protocol_version = "HTTP/1.1"
    length = 4

    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Range", "bytes 0-3/4")
        self.send_header("Content-Length", str(self.length))
        self.end_headers()
        with suppress(OSError):  # the client has hung up
            self.wfile.write(b"x" * self.length)

    def log_message(self, *_: object) -> None:
        pass


def test_an_object_that_is_longer_than_its_range_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Bucket) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
                monkeypatch.setenv(name, "any")
            with open_store("s3://bucket/prefix") as store:
                assert store.read("file", 0, 4, 'etag "e"') == b"xxxx"
                monkeypatch.setattr(_Bucket, "length", 10_000_000)
                with pytest.raises(StoreError, match="answered with 5 bytes instead of 4"):
                    store.read("file", 0, 4, 'etag "e"')
        finally:
            server.shutdown()
            thread.join()
