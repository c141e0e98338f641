"""What the kernel may believe of the attributes of watched files, which a listener can change behind its back."""

import math
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fusehsm.emulator.listeners import Listeners
from fusehsm.emulator.page_cache import StalePages
from fusehsm.fanotify.marks import Subject
from fusehsm.linux.suspension import noting_suspension
from fusehsm.overlay.overlay import Node, Overlay

_Result = TypeVar("_Result")

# From when on a file that has been quiet is looked at more closely: most fills are soon over, and the look costs more than a stat.
_SETTLING_SECONDS = 0.5
_TICK_NANOSECONDS = 20_000_000  # twice the longest that Linux offers


class AttributeCache:
    """The kernel's cache of one mount's attributes."""

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
        # By node id: how many of its pages wait for their listener.
        self._filling: dict[int, int] = {}
        # By node id: the nanoseconds that the kernel was last told, of nodes that somebody may watch.
        self._mtimes: dict[int, int] = {}
        # Monotonic seconds of a node's last event, inf while it is asked about; and how many accesses of it are being asked about.
        self._events: dict[int, float] = {}
        self._asking: dict[int, int] = {}
        # Nodes of which the kernel may have attributes that a listener could have changed.
        self._believed: set[int] = set()

    def forgotten(self, node_id: int) -> None:
        """The kernel has forgotten a node."""
        self._events.pop(node_id, None)
        self._mtimes.pop(node_id, None)
        self._believed.discard(node_id)

    # What the kernel is told

    def attr_timeout(self, node: Node, status: os.stat_result) -> float:
        """For how many seconds the kernel may believe these attributes: inf where no listener can change them behind its back.

        A listener may go on filling a file through its event fd when it has answered, which nobody tells us. As acregmin and acregmax in
        nfs(5), a file is believed for as long as it has been quiet; for ever (inf) once nobody can be filling it any more.
        """
        if self._listeners.idle or not self._listeners.watches(self._subject_of(node)):
            return math.inf
        last = self._events.get(node.id)
        if last is None:
            self._believed.add(node.id)
            return math.inf
        quiet = time.monotonic() - last
        if quiet <= 0:
            return 0.0  # it is being asked about
        self._believed.add(node.id)
        if quiet > _SETTLING_SECONDS and self._stays(node, status.st_ctime_ns):
            del self._events[node.id]
            return math.inf
        return quiet

    def shown_mtime(self, node: Node, status: os.stat_result) -> int:
        """The time of modification (ns) to tell the kernel of a node whose status that is: while a page of it waits for its listener, the
        one it was told before. At a new one it would drop the node's pages, so that whoever asked would wait for that answer."""
        node.told_size = status.st_size
        if node.id in self._filling:
            return self._mtimes.get(node.id, status.st_mtime_ns)
        if node.is_regular and not self._listeners.idle:
            self._mtimes[node.id] = status.st_mtime_ns
        return status.st_mtime_ns

    def told(self, node: Node, status: os.stat_result) -> None:
        """The kernel is about to be told of a time that somebody has set, for which it drops nothing."""
        if node.id in self._mtimes:
            self._mtimes[node.id] = status.st_mtime_ns

    # What happens meanwhile

    async def asking(self, node: Node, question: Coroutine[Any, Any, _Result]) -> _Result:
        """Await a question to listeners about an access of a node. If one has to be waited for, the kernel believes nothing of the node's
        attributes meanwhile, nor what has changed by it."""
        was = self._overlay.change_time(node) if node.id in self._believed else None
        waits = False

        def wait() -> None:
            nonlocal waits
            waits = True
            self._events[node.id] = math.inf
            self._asking[node.id] = self._asking.get(node.id, 0) + 1
            self._doubt(node)

        try:
            return await noting_suspension(question, wait)
        finally:
            if waits:
                if not _one_less(self._asking, node.id):
                    self._events[node.id] = time.monotonic()
            elif was is None or not self._stays(node, was):
                if node.id not in self._asking:
                    self._events[node.id] = time.monotonic()
                if node.id in self._believed:
                    self._believed.discard(node.id)
                    # Whoever gets this answer may look at once.
                    await self._stale.drop_attributes(node)

    def notified(self, node: Node) -> None:
        """A listener has been told of an access of a node: with a descriptor of the file, through which it may change it."""
        if node.id not in self._asking:
            self._events[node.id] = time.monotonic()
            self._doubt(node)

    def _stays(self, node: Node, was: int) -> bool:
        """Whether a node has not been changed since its change time was `was` (nanoseconds), and nobody can be about to."""
        # What reopens a descriptor that can only read cannot be seen in between.
        if any(group.event_f_flags & os.O_ACCMODE == os.O_RDONLY for group in self._listeners.groups):
            return False
        # In this order: the last writer may just be closing. Two changes within a tick of the clock can leave the same time.
        return (
            not self._overlay.is_being_written(node)
            and self._overlay.change_time(node) == was
            and time.time_ns() - was > _TICK_NANOSECONDS
        )

    def _doubt(self, node: Node) -> None:
        if node.id in self._believed:
            self._believed.discard(node.id)
            # Not waited for: the kernel may be about to free the inode, and wait for our answer to do so.
            self._stale.drop_attributes_soon(node)

    # Pages that wait for their listener

    def begin_filling(self, node: Node) -> None:
        """A page of the node is about to wait for its listener."""
        self._filling[node.id] = self._filling.get(node.id, 0) + 1
        if node.id not in self._mtimes:
            with suppress(OSError):
                self._mtimes[node.id] = self._overlay.getattr(node).st_mtime_ns

    def end_filling(self, node: Node) -> None:
        """It waits no more."""
        _one_less(self._filling, node.id)

    def is_filling(self, node: Node) -> bool:
        """Whether a page of the node waits for its listener: until it is answered the kernel has it locked, and who drops it waits too."""
        return node.id in self._filling


def _one_less(counts: dict[int, int], node_id: int) -> int:
    """Count a node down, which is not in there any more at 0; how many are left."""
    left = counts.pop(node_id) - 1
    if left:
        counts[node_id] = left
    return left
