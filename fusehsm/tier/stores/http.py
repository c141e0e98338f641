"""A web server's directory pages as a store: the tree is made of their links; a file's size and version are in the answer to HEAD.

Lists come over fsspec's connections, but the requests are made here: fsspec accepts any answer to a Range as that range, and drops links to files
whose names begin with "http". Content comes over connections of the reading threads (urllib3): all connections of fsspec belong to one thread, which
takes longer for a byte than the network. Any number of ranges can be fetched at a time.
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

_AT_ONCE: Final = 16  # HEAD requests of a list at the same time
_CONNECTIONS: Final = 32  # idle connections that are kept for the reading threads
_REDIRECTS: Final = 10
_PIECE: Final = 1 << 20  # bytes
_LARGEST_PAGE: Final = 1 << 28  # bytes of a directory's page: a million links of 256
_MOST_DIGITS: Final = 20  # of a number of bytes; 63 bits have 19
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class HttpStore(FsspecStore):
    """The tree below a URL. It has sizes, modification times (Last-Modified) and versions: ETags, else time and size."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        super().__init__(name, filesystem, root)
        if urlsplit(root).query:
            raise ValueError(f"{name}: a query names no directory; leave it out")
        parts = parse_url(root)
        # One more try: the server may have closed an idle connection.
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
        """The version in the answer to HEAD. Raises StoreError EIO if the answer has neither ETag nor size."""
        with self.complaining(path, "cannot be looked up"):
            headers = self._looked_up(path)
        version = _version(headers, _content_length(headers))
        if version is None:
            raise StoreError(
                errno.EIO, f"{self.name} tells neither its ETag nor its size, so it has no version", path
            )
        return version

    def rights(self, path: str) -> Rights | None:
        """None: a web server has no owners."""
        return None

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """One GET with a Range. The range and the version that the answer names are checked."""
        if not length:
            return b""
        with self.complaining(path, "cannot be read", reading=True):
            return self._get(path, offset, length, version)

    def full(self, path: str) -> str:
        """The URL; a directory's ends with a slash."""
        return f"{self._root}/{quote(os.fsencode(path))}"

    def close(self) -> None:
        """Close the connections of the reading threads."""
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
                answer.drain_conn()  # already at its end: this returns the connection to the pool
            return data
        finally:
            answer.close()  # also closes a connection with data left

    def _expect_range(
        self, path: str, answer: urllib3.BaseHTTPResponse, offset: int, length: int, version: str
    ) -> tuple[int, int]:
        """Bytes of the body before the range, and bytes of the range in the body. Raises StoreError or StoreChanged for another range or version."""
        if answer.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise self._nonsense(path, "compressed content, although asked for plain")
        if answer.status == 416:
            # The range is beyond the end of the file, unless the file is shorter now. This answer need not have a version.
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
            # The server does not support ranges and sends the whole file: skip the bytes before the range.
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
        """`expected` bytes after the first `skip` bytes, without waiting for the rest."""
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
        """The names that a directory's page links to, and whether each is a directory (the link ends with a slash)."""
        session = await self._filesystem.set_session()
        url = self.full(path).rstrip("/") + "/"
        async with session.get(URL(url, encoded=True)) as answer:
            _expect_success(answer.status, answer.reason)
            page = (await _whole(answer)).decode("utf-8", "surrogateescape")
            base = str(answer.url)
        found: dict[str, bool] = {}
        parser = _Links()
        parser.feed(page)
        for link in parser.links:
            name, is_directory = _name_in(base, link)
            if name:
                found[name] = is_directory or found.get(name, False)
        return list(found.items())


async def _whole(answer: Any) -> bytes:
    """The body of a page. Raises OSError EFBIG beyond _LARGEST_PAGE: a server may send one without end."""
    pieces: list[bytes] = []
    left = _LARGEST_PAGE
    async for piece in answer.content.iter_chunked(_PIECE):
        left -= len(piece)
        if left < 0:
            raise OSError(errno.EFBIG, f"the page has more than {_LARGEST_PAGE:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.extend(value for name, value in attrs if name == "href" and value)


def _name_in(base: str, link: str) -> tuple[str, bool]:
    """The name in the directory `base` to which `link` on its page leads, and whether it is a directory; "" for other links."""
    there, here = urlsplit(urljoin(base, link)), urlsplit(base)
    directory = here.path.rpartition("/")[0] + "/"
    if (there.scheme, there.netloc, there.query, there.fragment) != (here.scheme, here.netloc, "", ""):
        return "", False
    # The server chooses which characters it escapes, so compare the decoded paths.
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
        # Not raise_for_status(): its text has the URL with the password.
        raise OSError(errno.EIO, f"the server answered {status} {reason}")


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "")
    plain = headers.get("Content-Encoding", "identity") in ("", "identity")
    return _bytes(text) if plain else None


def _range_of(headers: Mapping[str, str]) -> tuple[int | None, int | None, int | None]:
    """First byte, last byte and file size in Content-Range (RFC 9110, section 14.4); None for each that is missing."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if match is None:
        return None, None, None
    first, last, total = map(_bytes, match.groups(""))
    return first, last, total


def _bytes(text: str) -> int | None:
    """A number of bytes in a header; None for other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


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
    except (KeyError, ValueError, OverflowError):
        return None
