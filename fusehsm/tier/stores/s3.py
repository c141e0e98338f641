"""A bucket of S3 or of a compatible server as a store, or the part of a bucket below a prefix.

botocore finds the server and the credentials: AWS_* in the environment, ~/.aws, and fsspec's FSSPEC_S3_*. Any number of threads can fetch ranges at a
time, over at most CONNECTIONS connections.

An object's version is its ETag. Lists have ETags, too, but no version ids; an object that is written again with the same content counts as the same.
read() sends the ETag as If-Match. So all bytes of an answer are of that version, also if the object is replaced meanwhile. For servers that ignore
If-Match, the ETag in the answer is checked. read_if() checks only that ETag, which saves a HEAD for each file: a stub has room only for a digest of
the version, so the ETag is not known before the answer.

Lists have neither owner nor mode, nor the times that rclone and s3fs keep as metadata (x-amz-meta-mtime). Only HEAD has them: one request for each
object instead of one for a thousand (measured on loopback, for a thousand objects: a list took 0.25 s, HEADs, 16 at a time, 4 to 7 s). So this store
does not use them, and a file's time is the time when the object was made.

A key is a path: components separated by "/". A key that ends in "/" is a directory. Keys that no file system can have go to `on_error` and are left
out: keys with an empty component, "." or "..", and an object whose key is also the name of a directory.
"""

import asyncio
import errno
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from typing import Any, Final, Generic, TypeAlias, TypeVar

import aiohttp
import fsspec.config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from fsspec.asyn import sync

from fusehsm.tier.stores.base import Entry, Kind, Rights, StoreError, byte_order, changed, throw
from fusehsm.tier.stores.fsspec import FsspecStore

# botocore's errors as one line with the fix. botocore's own texts have whole URLs and several lines.


# An answer to HEAD has no body, so the code of its error is the status.
GONE: Final = frozenset(("NoSuchKey", "404"))
CHANGED: Final = frozenset(("PreconditionFailed", "412"))
OUT_OF_RANGE: Final = frozenset(("InvalidRange", "416"))
_KEYS: Final = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws (AWS_PROFILE)"
_BAD_CREDENTIALS: Final = {
    "InvalidAccessKeyId": "the server does not know this access key",
    "SignatureDoesNotMatch": "the secret key is not the access key's",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is wrong",
    "InvalidTokenId": "the session token is wrong",
}
_CLOCK: Final = frozenset(("RequestTimeTooSkewed",))
_ELSEWHERE: Final = frozenset(("PermanentRedirect", "301", "AuthorizationHeaderMalformed"))


def code_of(error: ClientError) -> str:
    """The code of an error answer: a name of S3, or the status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def explained(error: Exception, path: str, what: str, bucket: str, endpoint: str) -> OSError | None:
    """The error as a StoreError; None if it is not botocore's. `what`: "cannot be read", ...; `endpoint`: the server's URL."""
    number, why = errno.EIO, ""
    match error:
        case ClientError():
            number, why = _answer(error, bucket)
        case NoCredentialsError() | PartialCredentialsError():
            number = errno.EACCES
            why = f"no credentials are set; set {_KEYS}; for a public bucket: FSSPEC_S3_ANON=true"
        case ConnectTimeoutError() | ReadTimeoutError():
            number = errno.ETIMEDOUT
            why = f"{endpoint} does not answer; see that it is up and can be reached from here"
        case EndpointConnectionError():
            number = errno.ECONNREFUSED
            why = f"{endpoint} cannot be reached; see that AWS_ENDPOINT_URL is right and the server is up"
        case BotoCoreError():
            why = " ".join(str(error).split())
    return StoreError(number, f"{what}: {why}", path) if why else None


def _answer(error: ClientError, bucket: str) -> tuple[int, str]:
    """The errno, and the cause with the fix."""
    code = code_of(error)
    if code == "NoSuchBucket":
        return errno.ENOENT, f"there is no bucket {bucket}; see that its name and AWS_ENDPOINT_URL are right"
    if code in _BAD_CREDENTIALS:
        return errno.EACCES, f"{_BAD_CREDENTIALS[code]}; set {_KEYS}"
    if code in ("AccessDenied", "403"):
        return (
            errno.EACCES,
            f"access is denied; the credentials need s3:ListBucket and s3:GetObject for the bucket {bucket}",
        )
    if code in _CLOCK:
        return errno.EACCES, "this machine's clock differs too much from the server's; set it"
    if code in _ELSEWHERE:
        return errno.EREMOTE, f"the bucket {bucket} lies in another region; set AWS_DEFAULT_REGION to that"
    if code in GONE:
        return errno.ENOENT, "it is not there"
    details: Any = error.response.get("Error", {})
    text = " ".join(str(details.get("Message", "")).split())
    return errno.EIO, f"the server answered {code} {text}".rstrip()


# Lists of a tree's directories, requested before their turn. Each takes a round trip, and a walk without this would mostly wait.


_Listed = TypeVar("_Listed")

AHEAD: Final = 8  # directories of each level of the tree whose lists are requested, or wait for their turn


class ListsAhead(Generic[_Listed]):
    """Lists ahead for one walk, depth first. `ask(directory)` lists a directory. It runs in `loop`, which must be in another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ask: Callable[[str], Awaitable[_Listed]]) -> None:
        self._loop = loop
        self._ask = ask
        self._asked: dict[str, Future[_Listed]] = {}
        # Directories that are not requested yet, by each requested sibling.
        self._siblings: dict[str, deque[str]] = {}

    def take(self, directory: str) -> _Listed:
        """The list of the directory. Raises the error of its request."""
        siblings = self._siblings.pop(directory, None)
        asked = self._asked.pop(directory, None) or self._start(directory)
        if siblings:
            following = siblings.popleft()
            self._asked[following] = self._start(following)
            self._siblings[following] = siblings
        return asked.result()

    def expect(self, directories: Iterable[str]) -> None:
        """Request these directories ahead. The walk takes them in this order, each with all directories below it before the next."""
        coming = deque(directories)
        first = [coming.popleft() for _ in range(min(AHEAD, len(coming)))]
        for directory in first:
            self._asked[directory] = self._start(directory)
            # Each list that is taken makes room for one more.
            self._siblings[directory] = coming

    def close(self) -> None:
        """Cancel the requests whose lists were not taken."""
        for asked in self._asked.values():
            asked.cancel()
        self._asked.clear()

    def _start(self, directory: str) -> "Future[_Listed]":
        async def ask() -> _Listed:
            return await self._ask(directory)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)


CONNECTIONS: Final = 64  # at most; also the most requests at a time
_TRIES: Final = 3
_CONNECTING: Final = 10.0  # seconds to make a connection
_MOST_DIGITS: Final = 20  # of a number of bytes; 63 bits have 19
_SILENCE: Final = 30.0  # seconds without a byte
_BROKEN: Final = (HTTPClientError, ResponseStreamingError, aiohttp.ClientError, TimeoutError, ConnectionError)


def options() -> dict[str, Any]:
    """The options of s3fs. A request without an answer fails after _TRIES times _SILENCE seconds. The setting FSSPEC_S3 overrides these options."""
    ours = {
        "connect_timeout": _CONNECTING,
        "read_timeout": _SILENCE,
        "max_pool_connections": CONNECTIONS,
        "retries": {"total_max_attempts": _TRIES, "mode": "standard"},
    }
    told = fsspec.config.conf.get("s3", {}).get("config_kwargs")
    theirs = told if isinstance(told, Mapping) else {}
    # No cached instance: it may have another endpoint or other credentials, because the environment may have changed.
    return {"config_kwargs": {**ours, **theirs}, "skip_instance_cache": True}


# Names of objects, each with its attributes in the list, and names of directories.
_Keys: TypeAlias = tuple[dict[str, Mapping[str, Any]], set[str]]


class S3Store(FsspecStore):
    """The tree below s3://BUCKET/PREFIX. It has sizes, versions, and the time when each object was made (exact to 1 s or 1 ms, as the server's)."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        super().__init__(name, filesystem, root)
        self._bucket, prefix, _ = filesystem.split_path(self._root)
        if not self._bucket:
            raise ValueError(f"{name}: names no bucket; write s3://bucket/prefix")
        self._prefix = f"{prefix}/" if prefix else ""

    def tree(self, on_error: Callable[[StoreError], None] = throw) -> Iterator[Entry]:
        """As Store.tree(); lists directories ahead of their turn."""
        with closing(ListsAhead(self._filesystem.loop, self._keys)) as ahead:
            yield from self.walk(lambda path: self._entries(path, ahead, on_error), on_error)

    def full(self, path: str) -> str:
        """The key of the path; for "" the prefix, which ends in a slash or is empty."""
        return self._prefix + path

    def version(self, path: str) -> str:
        """The ETag in the answer to HEAD."""
        with self.complaining(path, "cannot be looked up"):
            version, _ = self._sync(self._head(path))
        return str(version)

    def rights(self, path: str) -> Rights | None:
        """None: S3 has no owners."""
        return None

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """One GET with Range and If-Match, repeated if the connection breaks in the middle."""
        if not length:
            return b""
        with self.complaining(path, "cannot be read", reading=True):
            return self._read(path, offset, length, version, lambda now: now == version)[1]

    def read_if(
        self, path: str, offset: int, length: int, is_wanted: Callable[[str], bool]
    ) -> tuple[str, bytes] | None:
        """One GET with Range; its answer begins with the ETag. None for an empty range."""
        if not length:
            return None
        with self.complaining(path, "cannot be read"):
            return self._read(path, offset, length, None, is_wanted)

    def _read(
        self, path: str, offset: int, length: int, version: str | None, is_wanted: Callable[[str], bool]
    ) -> tuple[str, bytes]:
        for tries_left in reversed(range(_TRIES)):
            try:
                answer: tuple[str, bytes] = self._sync(self._get(path, offset, length, version, is_wanted))
                return answer
            except _BodyBroken as error:
                if not tries_left:
                    cause = str(error.__cause__) or type(error.__cause__).__name__
                    raise StoreError(
                        errno.EIO,
                        f"cannot be read: the connection broke {_TRIES} times: {' '.join(cause.split())}",
                        path,
                    ) from error
        raise AssertionError

    def close(self) -> None:
        """Close the connections."""
        with suppress(Exception):  # a failed close has no consequence
            sync(self._filesystem.loop, self._close, timeout=_CONNECTING)

    @contextmanager
    def complaining(self, path: str, what: str, *, reading: bool = False) -> Iterator[None]:
        """As FsspecStore.complaining(), also for the errors of botocore."""
        with super().complaining(path, what, reading=reading):
            try:
                yield
            except ClientError as error:
                if reading and code_of(error) in CHANGED | GONE:
                    raise changed(self, path) from error
                if code_of(error) in GONE:
                    raise FileNotFoundError from error
                raise self._explained(error, path, what) from error
            except Exception as error:
                raise self._explained(error, path, what) from error

    def _explained(self, error: Exception, path: str, what: str) -> Exception:
        endpoint = "the server"
        with suppress(AttributeError):
            endpoint = self._filesystem._s3.meta.endpoint_url
        return explained(error, path or self.name, what, self._bucket, endpoint) or error

    def _sync(self, coroutine: Any) -> Any:
        return sync(self._filesystem.loop, lambda: coroutine)

    async def _client(self) -> Any:
        return await self._filesystem.set_session()

    async def _close(self) -> None:
        if self._filesystem._s3 is not None:
            await self._filesystem._s3.close()

    async def _head(self, path: str) -> tuple[str, int]:
        """The version, and the size in bytes."""
        client = await self._client()
        answer = await client.head_object(Bucket=self._bucket, Key=self.full(path))
        return _version(answer), int(answer["ContentLength"])

    async def _get(
        self, path: str, offset: int, length: int, version: str | None, is_wanted: Callable[[str], bool]
    ) -> tuple[str, bytes]:
        """The object's version, and the range. `version`: for If-Match, if it is known. Raises StoreChanged if `is_wanted` refuses the version."""
        client = await self._client()
        condition = {} if version is None else {"IfMatch": version.removeprefix(_ETAG)}
        try:
            answer = await client.get_object(
                Bucket=self._bucket,
                Key=self.full(path),
                Range=f"bytes={offset}-{offset + length - 1}",
                **condition,
            )
        except ClientError as error:
            if code_of(error) not in OUT_OF_RANGE:
                raise
            # The range is beyond the end of the object, unless the object is shorter now.
            now, size = await self._head(path)
            if not is_wanted(now):
                raise changed(self, path) from error
            if offset < size:
                raise self._nonsense(path, "no such range, although the object is longer") from error
            return now, b""
        async with answer["Body"] as body:
            now = _version(answer)
            if not is_wanted(now):
                raise changed(self, path)
            expected = self._expected(path, answer, offset, length)
            try:
                data = await _at_most(body, expected + 1)
            except _BROKEN as error:
                raise _BodyBroken from error
        if len(data) != expected:
            raise self._nonsense(path, f"{len(data)} bytes instead of {expected}")
        return now, data

    def _expected(self, path: str, answer: Mapping[str, Any], offset: int, length: int) -> int:
        """The number of bytes that the answer must have. Raises StoreError if it is not for the requested range."""
        told = str(answer.get("ContentRange", ""))
        within, _, total = told.removeprefix("bytes ").partition("/")
        first, _, last = within.partition("-")
        numbers = (first, last, total)
        if (
            not all(number.isdecimal() and len(number) <= _MOST_DIGITS for number in numbers)
            or int(first) != offset
        ):
            raise self._nonsense(path, f"another range: {told or 'all'}")
        expected = min(offset + length, int(total)) - offset
        if int(last) - offset + 1 != expected:
            raise self._nonsense(path, f"a part of the range only: {told}")
        return expected

    def _nonsense(self, path: str, what: str) -> StoreError:
        return StoreError(errno.EIO, f"{self.name} answered with {what}", path)

    def _entries(
        self, path: str, ahead: ListsAhead[_Keys], on_error: Callable[[StoreError], None]
    ) -> Iterator[Entry]:
        """The entries directly below `path`, in any order."""
        above = f"{path}/" if path else ""
        objects, directories = ahead.take(above)
        if not path and self._prefix and not objects and not directories:
            self._expect_no_object()
            raise FileNotFoundError
        ahead.expect(above + name + "/" for name in sorted(directories, key=byte_order) if _is_possible(name))
        for name in directories:
            if _is_possible(name):
                yield Entry(above + name, Kind.DIRECTORY)
            else:
                on_error(_impossible(above + name + "/", "what lies below it is left out"))
        for name, told in objects.items():
            if not name:
                if told["Size"]:
                    on_error(_impossible(above, "its content is left out"))
            elif name in directories:
                why = "is an object and a directory of others; the object is left out; rename one of them"
                on_error(StoreError(errno.EEXIST, why, above + name))
            elif not _is_possible(name):
                on_error(_impossible(above + name, "it is left out"))
            else:
                yield Entry(
                    above + name,
                    Kind.FILE,
                    size=int(told["Size"]),
                    mtime_ns=_nanoseconds(told.get("LastModified")),
                    version=_version(told),
                )

    def _expect_no_object(self) -> None:
        """Raise StoreError ENOTDIR if the root is an object, not a prefix."""
        with suppress(FileNotFoundError):
            with self.complaining("", "cannot be looked up"):
                self._sync(self._head_root())
            raise StoreError(
                errno.ENOTDIR,
                "is a single object; name the prefix (the directory) that it lies in",
                self.name,
            )

    async def _head_root(self) -> None:
        client = await self._client()
        await client.head_object(Bucket=self._bucket, Key=self._prefix.rstrip("/"))

    async def _keys(self, above: str) -> _Keys:
        """The keys directly below `above`, requested in pages of up to a thousand names."""
        start = self.full(above)
        objects: dict[str, Mapping[str, Any]] = {}
        directories: set[str] = set()
        async for page in self._pages(start):
            objects.update({told["Key"][len(start) :]: told for told in page.get("Contents", ())})
            directories.update(told["Prefix"][len(start) : -1] for told in page.get("CommonPrefixes", ()))
        return objects, directories

    async def _pages(self, start: str) -> AsyncIterator[Mapping[str, Any]]:
        client = await self._client()
        pages = client.get_paginator("list_objects_v2")
        async for page in pages.paginate(Bucket=self._bucket, Prefix=start, Delimiter="/"):
            yield page


async def _at_most(body: Any, length: int) -> bytes:
    """The first `length` bytes of an answer: a server may send any number."""
    pieces: list[bytes] = []
    while length and (piece := await body.read(length)):
        length -= len(piece)
        pieces.append(piece)
    return b"".join(pieces)


class _BodyBroken(Exception):
    """The connection broke in the middle of an answer. __cause__ has the error."""


_ETAG: Final = "etag "


def _version(told: Mapping[str, Any]) -> str:
    return f"{_ETAG}{told['ETag']}"


def _is_possible(name: str) -> bool:
    return name not in ("", ".", "..")


def _impossible(key: str, consequence: str) -> StoreError:
    return StoreError(
        errno.EINVAL, f"is a key that no file can have as its path, so {consequence}; rename it", key
    )


def _nanoseconds(time: datetime | None) -> int | None:
    """Nanoseconds since 1970, rounded to milliseconds, because timestamp() is not exact."""
    if time is None:
        return None
    return round(time.timestamp() * 1000) * 1_000_000
