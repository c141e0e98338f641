"""Making fills durable: records say SYNCED once the content is on the disk, and are closed when serving ends."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

import trio

from fusehsm.linux import syscalls
from fusehsm.linux.beneath import directories, open_beneath
from fusehsm.tier.fetch.catalog import where
from fusehsm.tier.fetch.failures import passed_over
from fusehsm.tier.fetch.handler import Fetcher
from fusehsm.tier.fetch.served import Served
from fusehsm.tier.fetch.turns import PATIENCE, Stalled, Stuck, watched
from fusehsm.tier.stubs.mark import Key, key_of
from fusehsm.tier.stubs.stub import StubFile, may_be_written

INTERVAL: Final = 5.0  # seconds
_LONGEST: Final = 6  # intervals after which a sync happens although fills go on

_MOST_STUCK: Final = 8  # files that the end waits for

_NOT_KEPT: Final = "fetched content may not be on the disk yet"
_NOT_CLOSED: Final = "the record of a file is not closed, as if fetch had been killed"

_log = logging.getLogger(__name__)


class Keeper:
    """Keeps the records of the files that a fetcher serves, below `root_fd`."""

    def __init__(self, fetcher: Fetcher, root_fd: int, interval: float = INTERVAL) -> None:
        """`interval`: seconds between two checks for content to sync."""
        self._fetcher = fetcher
        self._root_fd = root_fd
        self._interval = interval
        self._put_off = 0

    async def keep(self) -> None:
        """Sync the content from time to time, when there were no requests for an interval, and set SYNCED in the records. Never returns. An error is
        logged, and the sync tried again after the next interval."""
        last = -1
        while True:
            await trio.sleep(self._interval)
            is_busy = self._fetcher.totals.requests != last
            last = self._fetcher.totals.requests
            self._put_off += 1
            if is_busy and self._put_off < _LONGEST:
                continue
            self._put_off = 0
            with passed_over(_NOT_KEPT, _log):
                await self._sync()

    async def _sync(self) -> None:
        files = [
            (served, file, file.changes)
            for served in self._fetcher.served.values()
            if (file := served.file) is not None and file.recorded and not file.synced
        ]
        if not files:
            return
        try:
            await trio.to_thread.run_sync(syscalls.syncfs, self._root_fd, abandon_on_cancel=True)
        except OSError as error:
            _log.error("fetched content cannot be written to the disk: %s", error.strerror)
            return
        for served, file, changes in files:
            with suppress(Stuck):  # the next sync tries again
                await self._on_file(
                    served, file, partial(file.seal, changes=changes, may_be_written=_may_be_written)
                )

    async def rest(self) -> None:
        """At the end, sync all content and close every record. Call it when no fill is under way and all accesses still wait: the records do not
        explain later changes."""
        with passed_over(_NOT_KEPT, _log):
            await self._sync()
        moved: dict[Key, StubFile] = {}
        stuck = 0
        for key, served in list(self._fetcher.served.items()):
            if served.file is None or not served.file.recorded:
                continue
            with passed_over(_NOT_CLOSED, _log):
                try:
                    if not await self._on_file(served, served.file, partial(_rest, served.file)):
                        moved[key] = served.file
                except Stuck as error:
                    stuck += 1
                    _log.warning("%s: %s", _NOT_CLOSED, where(error))
                    if stuck == _MOST_STUCK:
                        return
        if moved:
            with passed_over(_NOT_CLOSED, _log):
                await self._rest_moved(moved)

    async def _on_file(self, served: Served, file: StubFile, call: Callable[[int], None]) -> bool:
        """call(descriptor) for a file at its last known path. Returns False if the file is not there any more. Raises Stuck."""

        def perform() -> bool:
            with self.opened(served.key, file) as fd:
                if fd is None:
                    return False
                with suppress(OSError):  # the disk is full: the record stays as it is
                    call(fd)
                return True

        return await self._fetcher.turns.run(served.key, served.uid, file.path, perform, PATIENCE)

    async def _rest_moved(self, files: dict[Key, StubFile]) -> None:
        """Close the records of files that are not at their last known path: search the tree for them."""
        looks = 0

        def count() -> int:
            return looks

        def search() -> None:
            nonlocal looks
            numbers = {key[:2] for key in files}
            for directory_fd, names in directories(self._root_fd, _pass_over):
                looks += 1
                for name in names:
                    looks += 1
                    with suppress(OSError):
                        status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
                        if (status.st_dev, status.st_ino) not in numbers:
                            continue
                        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
                        try:
                            if file := files.pop(key_of(fd, status), None):
                                _rest(file, fd)
                        finally:
                            os.close(fd)
                if not files:
                    return

        try:
            await watched(search, count, PATIENCE)
        except Stalled:
            _log.warning("%s: a file does not answer, because another process holds its lock", _NOT_CLOSED)

    @contextmanager
    def opened(self, key: Key, file: StubFile) -> Iterator[int | None]:
        """A descriptor of the file at its last known path; None if the file is not there any more. Fetch then only does more work later."""
        fd = None
        with suppress(OSError, ValueError):
            fd = open_beneath(self._root_fd, file.path, os.O_RDONLY | os.O_NONBLOCK) if file.path else None
        try:
            if fd is not None:
                status = os.fstat(fd)
                if key_of(fd, status) != key:
                    yield None
                    return
            yield fd
        finally:
            if fd is not None:
                os.close(fd)


def _may_be_written(fd: int) -> bool:
    """may_be_written() in the event loop, so that it does not read an event of the file meanwhile: that access would be denied."""
    return trio.from_thread.run_sync(may_be_written, fd)


def _rest(file: StubFile, fd: int) -> None:
    with suppress(OSError):  # the disk is full: the record stays as after a kill
        file.rest(fd)


def _pass_over(_: OSError) -> None:
    """Ignore a directory that cannot be read: the records of its files stay as after a kill."""
