"""A web server's directory pages as a store: the tree is what they link to, a file's size and version are in the answer to HEAD.

Lists are asked for over fsspec's connections, but what is asked is here, because fsspec takes whatever a server answers to a Range for that range,
and drops links to files whose names begin with "http". Content is read over connections of the threads that want it (urllib3): all of fsspec's are
of one thread, which took longer over a byte than the network. Any number of ranges can be fetched at a time.
"""

import asyncio
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import Any, Final
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

import urllib3
from fsspec.asyn import sync
from urllib3.util import parse_url
from yarl import URL

from fusehsm.tier.stores.base import Entry, Kind, Rights, StoreError, changed
from fusehsm.tier.stores.fsspec import PATIENCE, FsspecStore

_AT_ONCE: Final = 16  # HEAD requests of a list
_CONNECTIONS: Final = 32  # that are kept, of the threads that read
_REDIRECTS: Final = 10
_PIECE: Final = 1 << 20  # bytes
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class HttpStore(FsspecStore):
    """The tree below a URL. It tells sizes, times of modification (Last-Modified) and versions: ETags, else time and size."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        super().__init__(name, filesystem, root)
        if urlsplit(root).query:
            raise ValueError(f"{name}: a query names no directory; leave it away")
        parts = parse_url(root)
        # One more try for a connection that the server has closed while it was idle.
        retries = urllib3.Retry(total=None, connect=0, read=1, other=0, status=0, redirect=_REDIRECTS)
        self._pool = urllib3.PoolManager(
            maxsize=_CONNECTIONS,
            retries=retries,
            timeout=urllib3.Timeout(connect=PATIENCE, read=PATIENCE),
            headers={
                "Accept-Encoding": "identity",
                **(urllib3.make_headers(basic_auth=unquote(parts.auth)) if parts.auth else {}),
            },
        )

    def version(self, path: str) -> str:
        """Of the answer to HEAD."""
        with self.complaining(path, "cannot be looked up"):
            headers = self._looked_up(path)
        version = _version(headers, _content_length(headers))
        if version is None:
            raise StoreError(
                errno.EIO, f"{self.name} tells neither its ETag nor its size, so it has no version", path
            )
        return version

    def rights(self, path: str) -> Rights | None:
        """A web server tells no owners."""
        return None

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """One GET with a Range. What comes is checked against the range and the version that the answer itself names."""
        if not length:
            return b""
        with self.complaining(path, "cannot be read", reading=True):
            return self._get(path, offset, length, version)

    def full(self, path: str) -> str:
        """The URL; a directory's ends with a slash."""
        return f"{self._root}/{quote(os.fsencode(path))}"

    def close(self) -> None:
        """Close the connections of the calling threads."""
        self._pool.clear()

    def _sync(self, coroutine: Any) -> Any:
        return sync(self._filesystem.loop, lambda: coroutine)

    async def _head(self, path: str) -> Mapping[str, str]:
        session = await self._filesystem.set_session()
        async with session.head(URL(self.full(path), encoded=True), allow_redirects=True) as answer:
            _expect_success(answer.status, answer.reason)
            headers: Mapping[str, str] = answer.headers
            return headers

    def _looked_up(self, path: str) -> Mapping[str, str]:
        answer = self._pool.request("HEAD", self.full(path))
        _expect_success(answer.status, answer.reason)
        return answer.headers

    def _get(self, path: str, offset: int, length: int, version: str) -> bytes:
        answer = self._pool.request(
            "GET",
            self.full(path),
            headers={**self._pool.headers, "Range": f"bytes={offset}-{offset + length - 1}"},
            preload_content=False,
        )
        try:
            skip, expected = self._expect_range(path, answer, offset, length, version)
            data = self._body(path, answer, skip, expected)
            if answer.status == 206:
                answer.drain_conn()  # at the end already: this gives the connection back
            return data
        finally:
            answer.close()  # and with it a connection that still has something to say

    def _expect_range(
        self, path: str, answer: urllib3.BaseHTTPResponse, offset: int, length: int, version: str
    ) -> tuple[int, int]:
        """How many bytes of the body are before the range, and how many of the range are there. Raises where it is another range or version."""
        if answer.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise self._nonsense(path, "compressed content, although asked for plain")
        if answer.status == 416:
            # Nothing there: the end of the file, unless it has become shorter. This answer need not name a version.
            now = self._looked_up(path)
            total = _content_length(now)
            if _version(now, total) != version:
                raise changed(self, path)
            if total is None or offset < total:
                raise self._nonsense(path, "no such range, although the file is longer")
            return 0, 0
        _expect_success(answer.status, answer.reason)
        if answer.status == 206:
            start, end, total = _range_of(answer.headers)
            if start != offset or end is None or end >= offset + length:
                raise self._nonsense(path, f"another range: {answer.headers.get('Content-Range')}")
            skip, expected = 0, end + 1 - start
            if expected < length and total is not None and end + 1 != total:
                raise self._nonsense(path, "a part of the range only")
        elif answer.status == 200:
            # The server knows no ranges and sends the whole file: what lies before the range is thrown away.
            total = _content_length(answer.headers)
            if total is None:
                raise self._nonsense(path, "neither a range nor the file's size")
            skip, expected = offset, max(0, min(length, total - offset))
        else:
            raise self._nonsense(path, f"status {answer.status}")
        if _version(answer.headers, total) != version:
            raise changed(self, path)
        return skip, expected

    def _body(self, path: str, answer: urllib3.BaseHTTPResponse, skip: int, expected: int) -> bytes:
        """`expected` bytes after the first `skip` bytes; the rest is not waited for."""
        while skip and (piece := answer.read(min(skip, _PIECE), decode_content=False)):
            skip -= len(piece)
        pieces: list[bytes] = []
        missing = expected
        while missing and (piece := answer.read(missing, decode_content=False)):
            missing -= len(piece)
            pieces.append(piece)
        if missing:
            raise self._nonsense(path, f"{expected - missing} bytes instead of {expected}")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _nonsense(self, path: str, what: str) -> StoreError:
        return StoreError(errno.EIO, f"{self.name} answered with {what}", path)

    def _list(self, path: str, on_error: Callable[[StoreError], None]) -> Iterator[Entry]:
        names = self._sync(self._links(path))
        prefix = f"{path}/" if path else ""
        files = [name for name, is_directory in names if not is_directory]
        for name, is_directory in names:
            if is_directory:
                yield Entry(prefix + name, Kind.DIRECTORY)
        for name, headers in zip(
            files, self._sync(self._heads([prefix + name for name in files])), strict=True
        ):
            if isinstance(headers, Exception):
                on_error(StoreError(errno.EIO, f"cannot be looked up: {headers}", prefix + name))
                continue
            size = _content_length(headers)
            yield Entry(
                prefix + name,
                Kind.FILE,
                size=size,
                mtime_ns=_mtime_ns(headers),
                version=_version(headers, size),
            )

    async def _heads(self, paths: list[str]) -> list[Mapping[str, str] | BaseException]:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def head(path: str) -> Mapping[str, str]:
            async with turns:
                return await self._head(path)

        return await asyncio.gather(*map(head, paths), return_exceptions=True)

    async def _links(self, path: str) -> list[tuple[str, bool]]:
        """The names that a directory's page links to, and whether each is a directory's (they end with a slash)."""
        session = await self._filesystem.set_session()
        url = self.full(path).rstrip("/") + "/"
        async with session.get(URL(url, encoded=True)) as answer:
            _expect_success(answer.status, answer.reason)
            page = (await answer.read()).decode("utf-8", "surrogateescape")
            base = str(answer.url)
        found: dict[str, bool] = {}
        parser = _Links()
        parser.feed(page)
        for link in parser.links:
            name, is_directory = _name_in(base, link)
            if name:
                found[name] = is_directory or found.get(name, False)
        return list(found.items())


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.extend(value for name, value in attrs if name == "href" and value)


def _name_in(base: str, link: str) -> tuple[str, bool]:
    """The name that `link` on the page `base` has in that directory, and whether it is a directory's; "" for all other links."""
    there, here = urlsplit(urljoin(base, link)), urlsplit(base)
    directory = here.path.rpartition("/")[0] + "/"
    if (there.scheme, there.netloc, there.query, there.fragment) != (here.scheme, here.netloc, "", ""):
        return "", False
    # Which characters are escaped is the server's choice, so what is compared is what they stand for.
    path, above = _decoded(there.path), _decoded(directory)
    is_deeper = there.path.rstrip("/").count("/") != directory.count("/")
    if not path.startswith(above) or path == above or is_deeper:
        return "", False
    return os.fsdecode(path[len(above) :].removesuffix(b"/")), there.path.endswith("/")


def _decoded(path: str) -> bytes:
    return unquote_to_bytes(path.encode("utf-8", "surrogateescape"))


def _expect_success(status: int, reason: str | None) -> None:
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if status >= 300:
        # Not raise_for_status(): its text has the URL, passwords included.
        raise OSError(errno.EIO, f"the server answered {status} {reason}")


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "")
    plain = headers.get("Content-Encoding", "identity") in ("", "identity")
    return int(text) if text.isdecimal() and plain else None


def _range_of(headers: Mapping[str, str]) -> tuple[int | None, int | None, int | None]:
    """First byte, last byte and the file's size as Content-Range tells (RFC 9110, 14.4)."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if match is None:
        return None, None, None
    first, last, total = (int(text) if text and text.isdecimal() else None for text in match.groups())
    return first, last, total


def _version(headers: Mapping[str, str], size: int | None) -> str | None:
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    if etag is not None:
        return f"etag {etag}"
    if size is None:
        return None
    return f"mtime {modified} size {size}" if modified is not None else f"size {size}"


def _mtime_ns(headers: Mapping[str, str]) -> int | None:
    try:
        return int(parsedate_to_datetime(headers["Last-Modified"]).timestamp()) * 1_000_000_000
    except (KeyError, ValueError):
        return None
