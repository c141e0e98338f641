"""Making what has been filled last: records that say so once the disk has it, and records at rest when serving ends."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import trio

from fusehsm.linux import syscalls
from fusehsm.linux.beneath import open_beneath
from fusehsm.linux.walk import directories
from fusehsm.tier.fetch.errors import passed_over
from fusehsm.tier.fetch.handler import Fetcher
from fusehsm.tier.stubs.identity import Key, key_of
from fusehsm.tier.stubs.stub import StubFile

INTERVAL: Final = 5.0  # seconds
_LONGEST: Final = 6  # intervals for which files that are being filled all the time are let off

_NOT_KEPT: Final = "what was fetched is not known to be on the disk"
_NOT_CLOSED: Final = "the record of a file is not closed, as if fetch had been killed"

_log = logging.getLogger(__name__)


class Keeper:
    """Of the files that a fetcher serves, below `root_fd`."""

    def __init__(self, fetcher: Fetcher, root_fd: int, interval: float = INTERVAL) -> None:
        """`interval`: seconds between two looks at whether something is to be brought to the disk."""
        self._fetcher = fetcher
        self._root_fd = root_fd
        self._interval = interval
        self._put_off = 0

    async def keep(self) -> None:
        """Bring content to the disk every now and then, while nothing is on its way, and say so in the records. Never returns: what goes wrong is
        logged, and tried again the next time."""
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
                await trio.to_thread.run_sync(self._sync, abandon_on_cancel=True)

    def _sync(self) -> None:
        files = [
            (key, file, file.changes)
            for key, served in list(self._fetcher.served.items())
            if (file := served.file) is not None and file.recorded and not file.synced
        ]
        if not files:
            return
        try:
            syscalls.syncfs(self._root_fd)
        except OSError as error:
            _log.error("the disk does not take what was fetched: %s", error.strerror)
            return
        for key, file, changes in files:
            with self.opened(key, file) as fd:
                if fd is not None:
                    with suppress(OSError):
                        file.seal(fd, changes)

    def rest(self) -> None:
        """At the end: everything on the disk, every record closed. To be called when nothing is filled any more and nobody is let go on yet: what
        is done afterwards is not explained by these records."""
        with passed_over(_NOT_KEPT, _log):
            self._sync()
        moved: dict[Key, StubFile] = {}
        # A thread that nobody waits for any more may still meet files.
        for key, served in list(self._fetcher.served.items()):
            if served.file is None or not served.file.recorded:
                continue
            with passed_over(_NOT_CLOSED, _log), self.opened(key, served.file) as fd:
                if fd is None:
                    moved[key] = served.file
                else:
                    _rest(served.file, fd)
        if moved:
            with passed_over(_NOT_CLOSED, _log):
                _rest_moved(self._root_fd, moved)

    @contextmanager
    def opened(self, key: Key, file: StubFile) -> Iterator[int | None]:
        """A descriptor of the file by the path where it was seen; None if it is not there any more, which costs nothing but time later."""
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


def _rest(file: StubFile, fd: int) -> None:
    with suppress(OSError):  # the disk is full: it stays as when somebody was killed
        file.rest(fd)


def _rest_moved(root_fd: int, files: dict[Key, StubFile]) -> None:
    """Of files that are not where they were seen: renamed ones have to be looked for."""
    numbers = {key[:2] for key in files}
    for directory_fd, names in directories(root_fd, _pass_over):
        for name in names:
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


def _pass_over(_: OSError) -> None:
    """A directory that cannot be looked at: its files stay as when somebody was killed."""
