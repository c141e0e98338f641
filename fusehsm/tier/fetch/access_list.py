"""Lists of the ranges that a run has accessed, in the order of the accesses. `fetch --record` writes a list, `fetch --prefetch` fetches it ahead.

Each line is a range: offset and length in bytes, and the path below the destination as a JSON string.
"""

import json
import logging
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self, TextIO

import trio

from fusehsm.linux.beneath import components, open_beneath
from fusehsm.linux.ranges import RangeSet
from fusehsm.tier.fetch.failures import passed_over

MOST_LINES: Final = 1_000_000
"""What of a list is written, or read: it is kept in memory."""

_LONGEST_LINE: Final = 1 << 17  # bytes: a path of 16 KiB, of which each byte may take six
_LARGEST: Final = (1 << 63) - 1  # off_t
_AT_ONCE: Final = 8  # files, or parts of one
_PIECE: Final = 4 << 20  # bytes of one read(2)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Touched:
    """One line of a list: a range of a file."""

    # Below the destination.
    path: str
    # Bytes.
    offset: int
    # Bytes.
    length: int

    @classmethod
    def parse(cls, line: str) -> Self:
        """Parse one line of a list. Raises ValueError if it is none."""
        offset, length, name = line.split(" ", 2)
        try:
            path = json.loads(name)
        except RecursionError:
            raise ValueError(line) from None
        first, count = int(offset), int(length)
        if not isinstance(path, str) or first < 0 or count < 0 or first + count > _LARGEST:
            raise ValueError(line)
        components(path)
        os.fsencode(path)
        # As a rule, consecutive lines have the same path: keep it once.
        return cls(sys.intern(path), first, count)

    def __str__(self) -> str:
        return f"{self.offset} {self.length} {json.dumps(self.path)}"


class Recorder:
    """Writes the list: each block once, at its first access. A context manager. Call begin() before the first access."""

    def __init__(self, path: str, block_size: int) -> None:
        """Open the list for writing, without truncating it. `block_size`: bytes. Raises OSError of open(2)."""
        self._path = path
        self._file: TextIO | None = open(path, "w", encoding="ascii", opener=_as_it_is)  # noqa: SIM115 (closed by __exit__)
        self._block_size = block_size
        self._seen: dict[str, RangeSet] = {}  # numbers of blocks
        self._lines = 0

    def begin(self) -> None:
        """Truncate the list. Call it once this run holds the destination: until then the list may belong to a running fetch."""
        if self._file is not None and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.truncate(0)

    def __call__(self, path: str, offset: int, end: int) -> None:
        """Note an access to [offset, end), in bytes, of the file at `path` below the destination."""
        if self._file is None or not path:
            return  # a file without a path below the destination cannot be found next time
        size = self._block_size
        first = offset // size
        seen = self._seen.setdefault(path, RangeSet())
        for start, stop in seen.gaps(first, max(-(-end // size), first + 1)):
            seen.add(start, stop)
            line = str(Touched(path, start * size, min(stop * size, _LARGEST) - start * size))
            if len(line) > _LONGEST_LINE:
                return  # a path that long cannot be opened next time
            if self._lines == MOST_LINES:
                _log.warning(
                    "--record %s: has %d lines, the most that it can have; later uses are not recorded",
                    self._path,
                    MOST_LINES,
                )
                self._close()
                return
            self._lines += 1
            try:
                print(line, file=self._file)
            except OSError as error:
                self._give_up(error)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
                self._file = None
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Stop writing: an error of the list is no reason to refuse an access."""
        _log.error("--record %s: cannot be written, and is not complete: %s", self._path, error.strerror)
        self._file = None


def _as_it_is(path: str, flags: int) -> int:
    return os.open(path, (flags & ~os.O_TRUNC) | os.O_CLOEXEC, 0o666)


def read_list(path: str) -> list[Touched]:
    """The first MOST_LINES ranges of a list. Raises OSError if it cannot be read, ValueError with the number of the line that is no range."""
    found: list[Touched] = []
    with open(path, encoding="ascii", errors="replace") as lines:
        while line := lines.readline(_LONGEST_LINE + 1):
            if len(found) == MOST_LINES:
                _log.warning("--prefetch %s: only its first %d lines are fetched ahead", path, MOST_LINES)
                break
            try:
                if len(line) > _LONGEST_LINE:
                    raise ValueError(line)
                found.append(Touched.parse(line.rstrip("\n")))
            except ValueError:
                number = len(found) + 1
                raise ValueError(f"--prefetch {path}: line {number} is not one of `fetch --record`") from None
    return found


async def warm_up(destination: str, wanted: Sequence[Touched]) -> None:
    """Fetch these ranges in their order, several at a time, by reading them below the directory `destination` as any program does.

    A file that does not exist any more is passed over; a failed range is counted in a warning. A later access fetches it."""
    turns = trio.Semaphore(_AT_ONCE)
    failures = 0

    async def fetch(item: Touched) -> None:
        nonlocal failures
        try:
            await trio.to_thread.run_sync(_read, root_fd, item, abandon_on_cancel=True)
        except FileNotFoundError:
            pass
        except Exception:
            failures += 1
        finally:
            turns.release()

    with passed_over("--prefetch", _log):
        root_fd = await trio.to_thread.run_sync(
            os.open, destination, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        )
        try:
            async with trio.open_nursery() as nursery:
                for item in wanted:
                    await turns.acquire()
                    nursery.start_soon(fetch, item)
        finally:
            os.close(root_fd)
        if failures:
            _log.warning("%d of %d ranges of the list could not be fetched ahead", failures, len(wanted))


def _read(root_fd: int, item: Touched) -> None:
    fd = open_beneath(root_fd, item.path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        offset, end = item.offset, item.offset + item.length
        while offset < end and (data := os.pread(fd, min(end - offset, _PIECE), offset)):
            offset += len(data)
    finally:
        os.close(fd)
