"""The kernel's cache of the attributes of watched files, which a listener can change without the kernel's knowledge.

The kernel asks for attributes (LOOKUP, GETATTR, READDIRPLUS), and the answer carries attr_timeout. It is 0 while a listener is asked about the
file and shortly afterwards. Later it is as long as the file has been quiet, and at last it has no limit.

An event about a file costs nothing here if the kernel has none of its attributes cached. Otherwise the first few events check whether the file
has changed. After these the attributes are invalidated, so that a file with many events costs one notification and no more checks.
"""

import math
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeVar

from fusehsm.emulator.listeners import Listeners
from fusehsm.emulator.page_cache import StalePages
from fusehsm.fanotify.marks import Subject
from fusehsm.linux.suspension import noting_suspension
from fusehsm.overlay.overlay import Node, Overlay

_Result = TypeVar("_Result")

# A file that has been quiet for longer is checked for changes. Most fills end sooner, and the check costs more than a stat.
_SETTLING_SECONDS: Final = 0.5
# Twice the longest tick of a clock that Linux offers. Two changes within a tick can leave the same time, and the kernel rounds timeouts up to ticks.
_TICK_NANOSECONDS: Final = 20_000_000
_TICK_SECONDS: Final = _TICK_NANOSECONDS / 1e9
# So many events may find a file unchanged before its attributes are invalidated all the same: about so many checks cost as much as one more
# GETATTR. A file that is read once or twice keeps its attributes cached, one that is read piece by piece does not.
_LOOKS: Final = 4


class _Kept(NamedTuple):
    """The attributes of one node that the kernel may have cached."""

    #: Their st_ctime, in nanoseconds.
    change_time: int
    #: How many more events may find the file unchanged before the attributes are invalidated.
    looks: int


class AttributeCache:
    """The kernel's attribute cache of one mount. `stale` invalidates attributes; `subject_of` gives a node as marks see it."""

    def __init__(
        self,
        overlay: Overlay,
        listeners: Listeners,
        stale: StalePages,
        subject_of: Callable[[Node], Subject],
    ) -> None:
        self._overlay = overlay
        self._listeners = listeners
        self._stale = stale
        self._subject_of = subject_of
        # By node id: the ranges in bytes [start, end) of its pages that wait for a listener.
        self._filling: dict[int, list[tuple[int, int]]] = {}
        # By node id, while there are listeners: the st_mtime (nanoseconds) that the kernel was last told.
        self._mtimes: dict[int, int] = {}
        # By node id: the time of its last event (monotonic seconds), inf while an access of it waits for an answer.
        self._events: dict[int, float] = {}
        # By node id: how many accesses of it wait for an answer.
        self._asking: dict[int, int] = {}
        # By node id: the attributes that the kernel may have cached, and that a listener could change.
        self._kept: dict[int, _Kept] = {}

    def forgotten(self, node_id: int) -> None:
        """Forget a node, as the kernel has forgotten it."""
        self._events.pop(node_id, None)
        self._mtimes.pop(node_id, None)
        self._kept.pop(node_id, None)

    # Answers to the kernel

    def attr_timeout(self, node: Node, status: os.stat_result) -> float:
        """For how many seconds the kernel may cache these attributes; inf where no listener can change the file.

        A listener may continue to fill a file through its event fd after its answer, which the emulator cannot see. So attributes are cached
        for as long as the file has been quiet, as with acregmin and acregmax in nfs(5), and without limit once no process can be filling it.
        """
        if self._listeners.idle or not self._listeners.watches(self._subject_of(node)):
            return math.inf
        timeout = math.inf
        last = self._events.get(node.id)
        if last is not None:
            timeout = time.monotonic() - last
            if timeout < _TICK_SECONDS:
                return 0.0  # an access waits for an answer, or has just been answered
            if timeout > _SETTLING_SECONDS and self._is_unchanged(node, status.st_ctime_ns):
                del self._events[node.id]
                timeout = math.inf
        kept = self._kept.get(node.id)
        # The kernel also asks again after every read that has changed st_atime. That does not restart the count of checks.
        self._kept[node.id] = _Kept(status.st_ctime_ns, _LOOKS if kept is None else kept.looks)
        return timeout

    def shown_mtime(self, node: Node, status: os.stat_result) -> int:
        """The st_mtime (nanoseconds) to show to the kernel for a node with that status.

        While a page of the node waits for a listener, it is the one that the kernel was told before. At a new one the kernel drops the node's
        pages (AUTO_INVAL_DATA; docs/facts.md, section 16), and the process that asked for the attributes would wait for the listener, too.
        """
        node.told_size = status.st_size
        if node.id in self._filling:
            return self._mtimes.get(node.id, status.st_mtime_ns)
        if node.is_regular and not self._listeners.idle:
            self._mtimes[node.id] = status.st_mtime_ns
        return status.st_mtime_ns

    def told(self, node: Node, status: os.stat_result) -> None:
        """Record an st_mtime that a SETATTR has set. The kernel is about to be told of it, and drops no pages for it."""
        if node.id in self._mtimes:
            self._mtimes[node.id] = status.st_mtime_ns

    async def changed(self, node: Node) -> None:
        """An accessor has changed attributes of which the kernel does not know."""
        await self._stale.inval_attributes(node)

    # Events

    async def asking(self, node: Node, question: Coroutine[Any, Any, _Result]) -> _Result:
        """Await a question to listeners about an access of a node; returns its result.

        While it waits for a listener, the kernel caches none of the node's attributes. Afterwards it caches none that a listener has changed.
        """
        questions = self._listeners.questions
        waits = False

        def wait() -> None:
            nonlocal waits
            waits = True
            self._events[node.id] = math.inf
            self._asking[node.id] = self._asking.get(node.id, 0) + 1
            self._take_back(node)

        try:
            return await noting_suspension(question, wait)
        finally:
            if waits:
                if not _one_less(self._asking, node.id):
                    self._events[node.id] = time.monotonic()
            elif self._listeners.questions != questions:
                await self._answered_at_once(node)

    async def _answered_at_once(self, node: Node) -> None:
        """A listener was asked about a node, and has answered without a wait."""
        kept = self._kept.get(node.id)
        if kept is not None and kept.looks and self._is_unchanged(node, kept.change_time):
            self._kept[node.id] = kept._replace(looks=kept.looks - 1)
            return
        if node.id not in self._asking:
            self._events[node.id] = time.monotonic()
        if kept is not None:
            del self._kept[node.id]
            # The accessor that gets this answer may ask for the attributes at once.
            await self._stale.inval_attributes(node)

    def notified(self, node: Node) -> None:
        """A listener has got a notification about a node, with a descriptor through which it may change the file."""
        if node.id not in self._asking:
            self._events[node.id] = time.monotonic()
            self._take_back(node)

    def _is_unchanged(self, node: Node, change_time: int) -> bool:
        """Whether a node still has that change time (nanoseconds), and no process can be about to change it."""
        # A listener may reopen a read-only event fd for writing. It cannot be seen before that.
        if any(group.event_f_flags & os.O_ACCMODE == os.O_RDONLY for group in self._listeners.groups):
            return False
        # First the check for writers: the last one may write and close the file between the two checks.
        return (
            not self._overlay.is_being_written(node)
            and self._overlay.change_time(node) == change_time
            and time.time_ns() - change_time > _TICK_NANOSECONDS
        )

    def _take_back(self, node: Node) -> None:
        if self._kept.pop(node.id, None) is not None:
            # Without waiting: the kernel may be freeing the inode, and may need an answer of this mount to finish that.
            self._stale.drop_attributes_soon(node)

    # Pages that wait for a listener

    def begin_filling(self, node: Node, offset: int, size: int) -> None:
        """Pages of the node, `size` bytes at `offset`, are about to wait for a listener."""
        self._filling.setdefault(node.id, []).append((offset, offset + size))
        if node.id not in self._mtimes:
            with suppress(OSError):
                self._mtimes[node.id] = self._overlay.getattr(node).st_mtime_ns

    def end_filling(self, node: Node, offset: int, size: int) -> None:
        """Those pages wait no more."""
        ranges = self._filling[node.id]
        ranges.remove((offset, offset + size))
        if not ranges:
            del self._filling[node.id]

    def filling(self, node: Node) -> list[tuple[int, int]]:
        """The ranges in bytes [start, end) of the node's pages that wait for a listener."""
        return list(self._filling.get(node.id, ()))

    def is_filling(self, node: Node) -> bool:
        """Whether a page of the node waits for a listener. The kernel keeps that page locked until the answer, and dropping it waits, too."""
        return node.id in self._filling


def _one_less(counts: dict[int, int], node_id: int) -> int:
    """Decrement a node's count, and remove it at 0; returns the new count."""
    left = counts.pop(node_id) - 1
    if left:
        counts[node_id] = left
    return left
