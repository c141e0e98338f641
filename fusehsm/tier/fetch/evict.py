"""Eviction: punches content that the store has as well, while no process has the file open.

`fusehsm evict`, `fusehsm pin` and `fusehsm unpin` ask a running fetch for it.
"""

import errno
import logging
import math
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Final

import trio

from fusehsm.backends.base import Group
from fusehsm.backends.punch import leased
from fusehsm.fanotify.abi import (
    FAN_CLOSE_WRITE,
    FAN_MARK_ADD,
    FAN_MARK_EVICTABLE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_REMOVE,
    FAN_MODIFY,
)
from fusehsm.linux.beneath import open_beneath
from fusehsm.text import shown
from fusehsm.tier.fetch.catalog import where
from fusehsm.tier.fetch.destination import Destination
from fusehsm.tier.fetch.failures import in_a_line, passed_over
from fusehsm.tier.fetch.handler import Fetcher
from fusehsm.tier.fetch.inventory import Item, Look, items
from fusehsm.tier.fetch.protocol import Complaint, Evict, Pin, found
from fusehsm.tier.fetch.served import Served
from fusehsm.tier.fetch.turns import PATIENCE, Stalled, opened, watched
from fusehsm.tier.stubs.mark import Key, key_of
from fusehsm.tier.stubs.stub import StubFile
from fusehsm.tier.text import parse_seconds, parse_size, size_text

_ADD = FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY | FAN_MARK_EVICTABLE
_LOOKS: Final = 1000  # checks for events, a millisecond each
_REMOVE = FAN_MARK_REMOVE | FAN_MARK_IGNORED_MASK


_MOST_LEFT_ALONE: Final = 16
_MOST_OF_ONE: Final = 4  # files of one owner that do not answer, before all files of that owner are left out
_SHORTEST: Final = 0.5  # seconds until files that were in use are tried again
_AFTER_TROUBLE: Final = 30.0  # seconds until a failed look at the tree is tried again

_log = logging.getLogger(__name__)


class Kept(Enum):
    """The reason for which content stays."""

    MODIFIED = "modified"
    PINNED = "pinned"
    IN_USE = "in use"
    RECENT = "recently used"
    FAILED = "failed"


@dataclass(slots=True)
class Outcome:
    """The result of an eviction of many files."""

    # Number of files evicted.
    evicted: int = 0
    # Bytes that became free on the disk.
    freed: int = 0
    # Number of files that stay, by reason.
    kept: Counter[Kept] = field(default_factory=Counter)
    # (path, cause) of files that stay because of an error.
    complaints: list[tuple[str, str]] = field(default_factory=list)


class Evictor:
    """Evicts files that a fetcher serves."""

    def __init__(self, fetcher: Fetcher, place: Destination, group: Group) -> None:
        self.fetcher = fetcher
        self._place = place
        self._group = group
        self._has_left_out = False
        # Walks that were left alone in the middle, where a file or directory did not answer.
        self._left_alone: list[Look] = []

    async def inventory(self, path: str) -> list[Item]:
        """items() at or below a path, made in a thread. Files that do not answer are left out: another process holds their lock.

        Raises as items(), and OSError EBUSY if too many files do not answer.
        """
        for _ in range(_MOST_LEFT_ALONE):
            self._left_alone = [look for look in self._left_alone if not look.has_ended]
            owners = Counter(look.uid for look in self._left_alone)
            look = Look(
                {look.path for look in self._left_alone},
                {uid for uid, count in owners.items() if uid > 0 and count >= _MOST_OF_ONE},
            )
            try:
                return await watched(partial(self._list, path, look), lambda: look.count, PATIENCE)  # noqa: B023
            except Stalled:
                look.is_abandoned = True
                self._left_alone.append(look)
                self._leave_out(
                    OSError(errno.EBUSY, "does not answer: another process holds its lock", look.path)
                )
        raise OSError(errno.EBUSY, "too many files do not answer: other processes hold their locks", path)

    def _list(self, path: str, look: Look) -> list[Item]:
        place = self._place.root_fd
        try:
            return list(items(place, path, self.known, self._leave_out, self.fetcher.tree, look))
        finally:
            look.has_ended = True

    def _leave_out(self, error: OSError) -> None:
        # Once: there may be many such directories, and the tree is read again and again.
        if not self._has_left_out:
            self._has_left_out = True
            _log.warning("%s; it and others like it are not counted, evicted or pinned", where(error))

    def known(self, key: Key) -> StubFile | None:
        """The served stub with that key, or None."""
        served = self.fetcher.served.get(key)
        return None if served is None else served.file

    async def evict_many(
        self, candidates: Sequence[Item], *, older_than: float | None = None, free: int | None = None
    ) -> Outcome:
        """Evict the candidates that were not used for `older_than` seconds, in their order, until `free` bytes have become free."""
        outcome = Outcome()
        youngest = time.time_ns() - int((older_than or 0) * 1e9)
        for item in candidates:
            if not item.stub or not item.resident or not item.disk:
                continue
            if free is not None and outcome.freed >= free:
                break
            if item.modified:
                outcome.kept[Kept.MODIFIED] += 1
            elif item.pinned:
                outcome.kept[Kept.PINNED] += 1
            elif older_than is not None and item.used_ns > youngest:
                outcome.kept[Kept.RECENT] += 1
            else:
                await self._evict_one(item.path, outcome)
        return outcome

    async def _evict_one(self, path: str, outcome: Outcome) -> None:
        try:
            outcome.freed += await self.evict(path)
            outcome.evicted += 1
        except BlockingIOError:
            outcome.kept[Kept.IN_USE] += 1
        except OSError as error:
            modified = error.errno == errno.EBUSY
            outcome.kept[Kept.MODIFIED if modified else Kept.FAILED] += 1
            if not modified and error.errno != errno.ENOENT:
                outcome.complaints.append((path, error.strerror or str(error)))
        except Exception as error:  # a bug of ours: evict the other files all the same
            outcome.kept[Kept.FAILED] += 1
            outcome.complaints.append((path, in_a_line(error)))

    async def evict(self, path: str) -> int:
        """Evict one file. Returns the number of bytes that became free. Raises BlockingIOError (EAGAIN) while it is in use, OSError EBUSY if it must
        stay, ESTALE if another file is at that path by now."""
        fd = await opened(partial(open_beneath, self._place.root_fd, path, os.O_RDONLY | os.O_NONBLOCK), path)
        target: int | str
        try:
            status = os.fstat(fd)
            key = key_of(fd, status)
            served = await self.fetcher.meet(key, status.st_uid, fd, path, PATIENCE)
            if self._place.backend == "kernel":
                # Not by the path: that could wait for the lock of a directory.
                target = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
            else:
                target = os.path.join(self._place.path, path)
        finally:
            os.close(fd)
        try:
            return await self._evict_met(path, target, key, served)
        finally:
            if isinstance(target, int):
                os.close(target)

    async def _evict_met(self, path: str, target: int | str, key: Key, served: Served) -> int:
        file = served.file
        if file is None:
            raise OSError(errno.EBUSY, "is no stub: its content could not be fetched again", path)
        file.expect_evictable()
        if served.active or served.fills or served.evicting is not None:
            raise BlockingIOError(errno.EAGAIN, "is being read", path)
        served.evicting = trio.Event()
        try:
            async with self.fetcher.turns.turn(key, served.uid, path):
                return await self._evict_leased(path, target, key, served, file)
        finally:
            served.evicting.set()
            served.evicting = None

    async def _evict_leased(
        self, path: str, target: int | str, key: Key, served: Served, file: StubFile
    ) -> int:
        # During the lease the group cannot read events of this file (docs/facts.md, section 17).
        await self._hear_of_changes()
        async with leased(target) as lease:
            fd = lease.descriptor
            if self._place.backend == "kernel" and self._is_told():
                raise BlockingIOError(errno.EAGAIN, "too many events are waiting", path)
            status = os.fstat(fd)
            if key_of(fd, status) != key:
                raise OSError(errno.ESTALE, "is another file by now", path)
            # A punch on a watched descriptor makes events, which cannot be read during the lease.
            if self._place.backend == "kernel":
                served.ignored |= self._group.dialect.pre_content | FAN_MODIFY | FAN_CLOSE_WRITE
                await self._group.mark(_ADD, served.ignored, fd)
            else:
                await self._unignore(served, fd)
            freed = await trio.to_thread.run_sync(file.punch, fd, partial(os.fsync, fd))
            if self._place.backend == "kernel":
                await self._unignore(served, fd)
            served.origin = served.version = None
        return freed

    async def _hear_of_changes(self) -> None:
        """Wait until the fetcher has read all events so far, for example the close of a writable descriptor. Raises BlockingIOError if there are too
        many events."""
        for _ in range(_LOOKS):
            if not self._is_told():
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                return
            await trio.sleep(0.001)
        raise BlockingIOError(errno.EAGAIN, "too many events are waiting")

    def _is_told(self) -> bool:
        """Whether there are events that the fetcher has not read."""
        waiting = select.poll()
        waiting.register(self._group.fileno(), select.POLLIN)
        return bool(waiting.poll(0))

    async def _unignore(self, served: Served, fd: int) -> None:
        """Remove the ignore mark: the file makes events again."""
        if served.ignored:
            with suppress(FileNotFoundError):  # the kernel has forgotten the inode, and the mark with it
                await self._group.mark(_REMOVE, served.ignored, fd)
        served.ignored = 0


async def keep_below(evictor: Evictor, most: int, complain: Callable[[str], None]) -> None:
    """Whenever the stubs take more than `most` bytes on the disk, evict the least recently used, down to nine tenths of `most`. Never returns.

    Files in use stay, so the size may be larger for a while. If nothing can be evicted, `complain` gets one message, and the next one only after the
    size was below `most` again. An error is logged, and the eviction is tried again later.
    """
    fetcher = evictor.fetcher
    is_said = False

    async def look() -> int:
        """Evict if necessary. Returns the bytes left below `most`; negative if there are too many."""
        nonlocal is_said
        taken = await evictor.inventory("")
        total = sum(item.disk for item in taken if item.stub)
        if total > most:
            taken.sort(key=lambda item: item.used_ns)
            outcome = await evictor.evict_many(taken, free=total - most * 9 // 10)
            total -= outcome.freed
            if total > most and not is_said:
                complain(
                    f"more than --max-size is here ({total:,} bytes), and none of it can be evicted: {kept_text(outcome)}"
                )
            is_said = total > most
        return most - total

    while True:
        started = trio.current_time()
        filled = fetcher.totals.filled
        room = None
        with passed_over("--max-size: nothing was evicted this time", _log):
            room = await look()
        if room is None:
            await trio.sleep(_AFTER_TROUBLE)
            continue
        # Not at every block, because each look reads the whole tree. No event tells that a file is not in use any more, so wait a while.
        patience = max(10 * (trio.current_time() - started), _SHORTEST) if room < 0 else math.inf
        with trio.move_on_after(patience):
            while fetcher.totals.filled - filled <= max(room, most // 20):
                await fetcher.filled.wait()


def kept_text(outcome: Outcome) -> str:
    """The files that stay and the reasons, in words."""
    return (
        ", ".join(f"{count:,} {reason.value}" for reason, count in outcome.kept.items())
        or "all of it is being fetched"
    )


def evict(paths: Sequence[str], *, older_than: str | None, free: str | None, user: int | None = None) -> int:
    """Evict the files at or below the paths, and print a summary. `older_than`, `free`: texts of the options. `user`: whose fetch does it.

    Returns the exit code: 1 if a named file stays, if less became free than `free`, or after an error. Raises ValueError for bad usage, OSError
    ENOENT if a path does not exist, ENOTCONN if no fetch serves it.
    """
    seconds = None if older_than is None else parse_seconds("--older-than", older_than)
    wanted = None if free is None else parse_size("--free", free)
    counts: Counter[str] = Counter()
    failed = False
    for path in paths:
        left = None if wanted is None else max(wanted - counts["freed"], 0)
        fetch = found(path, user)
        names = ("evicted", "freed", *(reason.name.lower() for reason in Kept))
        answer = fetch.ask(Evict(fetch.path, seconds, left), Complaint, names)
        for line in answer:
            _complain(f"{fetch.root.rstrip('/')}/{line.path}", line.why)
            failed = True
        counts.update(answer.counts)
        if fetch.is_file and (why := _why(answer.counts)):
            _complain(path, why)
            failed = True
    kept = ", ".join(f"{counts[k.name.lower()]:,} {k.value}" for k in Kept if counts[k.name.lower()])
    print(
        f"evicted {counts['evicted']:,} files, {size_text(counts['freed'])} freed"
        + (f"; stay: {kept}" if kept else "")
    )
    if wanted is not None and counts["freed"] < wanted:
        _complain("--free", f"only {size_text(counts['freed'])} could be freed")
        failed = True
    return int(failed)


def pin(paths: Sequence[str], *, pinned: bool, user: int | None = None) -> int:
    """Pin or unpin the files at or below the paths, and print a summary. Raises OSError as evict(). Returns 0."""
    changed = 0
    for path in paths:
        fetch = found(path, user)
        answer = fetch.ask(Pin(fetch.path, pinned), Complaint, ("changed",))
        for line in answer:
            _complain(f"{fetch.root.rstrip('/')}/{line.path}", line.why)
        changed += answer.counts["changed"]
    print(f"{'pinned' if pinned else 'unpinned'} {changed:,} files")
    return 0


def _why(result: dict[str, int]) -> str:
    for reason, why in _REASONS.items():
        if result[reason.name.lower()]:
            return why
    return ""


def _complain(path: str, why: str) -> None:
    print(f"fusehsm: {shown(path)}: {shown(why)}", file=sys.stderr, flush=True)


_REASONS = {
    Kept.MODIFIED: "is modified: the store does not have its content",
    Kept.PINNED: "is pinned; `fusehsm unpin` it first",
    Kept.IN_USE: "is in use; close it first (fuser shows by whom)",
}
