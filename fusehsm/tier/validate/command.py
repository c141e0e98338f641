"""`fusehsm validate STORE DST`: checks that the bytes read through DST are the store's.

It reads random ranges of every file as programs do, with read calls and with page faults, and compares them. A read may fail, kill its process or
never return. So processes of their own make the reads (tier/validate/reader.py), and validate goes on.
"""

import errno
import json
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from fusehsm.text import shown
from fusehsm.tier.stores.base import Entry, Kind, Store, StoreChanged, StoreError
from fusehsm.tier.stores.open import open_store
from fusehsm.tier.text import Progress
from fusehsm.tier.validate.plan import BY, Window, plan, windows
from fusehsm.tier.validate.reader import Reader
from fusehsm.tier.validate.report import Failed, FileFindings, Report, progress_line
from fusehsm.tier.validate.trees import Pair, listed_within, pairs

_BACKLOG: Final = 64  # listed files that wait to be read
_LOOK: Final = 0.1  # seconds between two updates of the progress line


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """The command line of `fusehsm validate`."""

    # Path or URL of the store.
    store: str
    # The directory to compare.
    destination: str
    # Random ranges of each file in each way.
    reads: int = 8
    # Seed of the random ranges, None: a new one.
    seed: int | None = None
    # Files that are read at a time.
    jobs: int = 4
    # The ways to read, of BY.
    by: tuple[str, ...] = BY
    # Seconds for one read.
    timeout: float = 120.0
    # Print one JSON object.
    json: bool = False


def validate(options: ValidateOptions) -> int:
    """Compare, and print a line for each finding and a summary, or one JSON object. Returns the exit code: 1 unless everything agrees.

    Raises ValueError for impossible options, OSError if the store or the destination cannot be listed at all.
    """
    unknown = [way for way in options.by if way not in BY]
    if unknown or not options.by:
        raise ValueError(f"--by {','.join(options.by)}: choose among {', '.join(BY)}")
    if not options.timeout > 0:
        raise ValueError(f"--timeout {options.timeout:g}: give a number of seconds, more than 0")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    started = time.monotonic()

    def tell(path: str, what: str) -> None:
        if not options.json:
            place = os.path.join(options.destination, path)
            print(f"fusehsm: {shown(place)}: {what}", file=sys.stderr, flush=True)

    report = Report(tell, options.timeout)

    def unlisted(side: str, error: StoreError) -> None:
        name = errno.errorcode.get(error.errno or errno.EINVAL, str(error.errno))
        report.fail(Failed(os.fsdecode(error.filename or ""), "list", name, why=f"{side}: {error.strerror}"))

    def counts() -> tuple[int, int, int]:
        return report.reads.total(), report.compared, report.problems

    with (
        open_store(options.store) as store,
        _directory(options.destination) as root_fd,
        Progress(lambda seconds: progress_line(*counts(), seconds)) as progress,
        closing(Crew(store, root_fd, report, options, seed)) as crew,
    ):
        listing = partial(listed_within, options.destination, options.timeout)
        for pair in pairs(store.tree, listing, unlisted):
            if (both := _files(report, pair)) is not None:
                while not crew.take(both):
                    progress.tick()
            progress.tick()
        while not crew.is_done():
            progress.tick()
    _print(options, report, seed, time.monotonic() - started)
    return 1 if report.problems else 0


def _print(options: ValidateOptions, report: Report, seed: int, seconds: float) -> None:
    rates = {
        "reads_per_second": round(report.reads.total() / max(seconds, 1e-3), 1),
        "bytes_per_second": round(report.compared / max(seconds, 1e-3)),
    }
    if options.json:
        where = {"store": options.store, "destination": options.destination, "seed": seed}
        print(json.dumps({**where, **report.as_json(), "seconds": round(seconds, 3), **rates}))
        return
    verdict = f"differs: {report.problems_text()}" if report.problems else "agrees with the store"
    rate = f"{seconds:.1f} s ({rates['reads_per_second']:,.0f} reads a second)"
    print(f"{shown(options.destination)} {verdict}; {report.counts_text()}; {rate}; --seed {seed}")


def _files(report: Report, pair: Pair) -> Entry | None:
    """The file to read, if both sides have one of the same size; else None, and differences are reported."""
    theirs, ours = pair.theirs, pair.ours
    if theirs is None or ours is None:
        # Special files have no content to fetch, so populate makes no stubs of them.
        if theirs is None or theirs.kind is not Kind.OTHER:
            report.add_missing(theirs, ours)
        return None
    path = theirs.path
    if theirs.kind is not ours.kind:
        report.add_unlike(path, "type", theirs.kind.value, ours.kind.value)
    elif theirs.kind is Kind.SYMLINK and theirs.target != ours.target:
        report.add_unlike(path, "target", theirs.target, ours.target)
    elif theirs.kind is Kind.FILE:
        if theirs.size is None:
            report.fail(Failed(path, "store", "EINVAL", why="it does not tell the size"))
        elif theirs.size != ours.size:
            report.add_unlike(path, "size", theirs.size, ours.size)
        else:
            return theirs
    return None


@contextmanager
def _directory(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class Crew:
    """Threads that read files, each with a reader process of its own. Only one thread may call the methods."""

    def __init__(
        self, store: Store, root_fd: int, report: Report, options: ValidateOptions, seed: int
    ) -> None:
        self._store = store
        self._root_fd = root_fd
        self._report = report
        self._options = options
        self._seed = seed
        self._files: queue.Queue[Entry | None] = queue.Queue(_BACKLOG)
        self._failure: BaseException | None = None
        self._stopped = False
        self._told_the_end = 0
        # Daemon threads: a thread that waits for its store must not keep an interrupted command from ending.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(options.jobs)]
        for thread in self._threads:
            thread.start()

    def take(self, entry: Entry | None) -> bool:
        """Queue a file; False if the queue is full, and the caller must try again. Raises the error of a failed thread."""
        self._raise_failure()
        try:
            self._files.put(entry, timeout=_LOOK)
        except queue.Full:
            return False
        return True

    def is_done(self) -> bool:
        """Whether all files are read; waits a moment. Call it after the last file. Raises the error of a failed thread."""
        while self._told_the_end < len(self._threads):
            if not self.take(None):
                return False
            self._told_the_end += 1
        for thread in self._threads:
            thread.join(_LOOK)
            if thread.is_alive():
                return False
        self._raise_failure()
        return True

    def close(self) -> None:
        """Stop, although files may be left. A thread that cannot stop at once is left behind."""
        self._stopped = True
        for thread in self._threads:
            thread.join(_LOOK)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            with closing(Reader(self._root_fd, self._options.timeout)) as reader:
                while (entry := self._files.get()) is not None:
                    self._read(reader, entry)
                    if self._stopped:
                        return
        except BaseException as error:
            self._failure = error

    def _read(self, reader: Reader, entry: Entry) -> None:
        found = FileFindings(entry.path)
        changed = False
        try:
            version = entry.version or self._version(entry.path)
            self._compare(reader, entry, version, found)
            # Other bytes may be newer ones.
            changed = bool(found.differences) and self._version(entry.path) != version
        except StoreChanged:
            changed = True
        except StoreError as error:
            name = errno.errorcode.get(error.errno or errno.EIO, str(error.errno))
            found.fail("store", name, error.strerror)
        self._report.add_file(found, changed=changed)

    def _compare(self, reader: Reader, entry: Entry, version: str, found: FileFindings) -> None:
        """Read and compare one file. Raises StoreError if the store cannot be read, StoreChanged if the file has changed there."""
        path, size = entry.path, entry.size
        assert size is not None
        reads = plan(path, size, seed=self._seed, reads=self._options.reads, by=self._options.by)
        for window in windows(reads, size):
            data = self._content(path, window, version)
            for read, outcome in reader.read(path, size, window, data):
                found.add(read.by, outcome)
                if outcome.gave_up or self._stopped:
                    return

    # All errors of the store become StoreErrors, to tell them apart from the reader's errors.

    def _version(self, path: str) -> str:
        try:
            return self._store.version(path)
        except FileNotFoundError as error:
            raise StoreChanged(error.errno, error.strerror, path) from error
        except OSError as error:
            raise _store_error(error, path) from error

    def _content(self, path: str, window: Window, version: str) -> bytes:
        try:
            data = self._store.read(path, window.offset, window.length, version)
        except OSError as error:
            raise _store_error(error, path) from error
        if len(data) != window.length:
            raise StoreError(errno.EIO, f"gave {len(data)} bytes where {window.length} were asked for", path)
        return data


def _store_error(error: OSError, path: str) -> StoreError:
    return error if isinstance(error, StoreError) else StoreError(error.errno, error.strerror, path)
