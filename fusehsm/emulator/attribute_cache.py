"""What the kernel may cache of the attributes of watched files, which a listener can change behind its back.

The kernel asks for attributes (LOOKUP, GETATTR, READDIRPLUS), and the answer says for how long it may keep them. That is when it is decided: not
at all while a listener is asked about the file or has just been asked, for as long as the file has been quiet, or for ever. An event about a file of
which the kernel has nothing to lose costs nothing here. Where it has, the file is looked at, a few times; then the attributes are taken back, so
that a file with many events costs one notification and no looks.
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

# From when on a file that has been quiet is looked at more closely: most fills are soon over, and the look costs more than a stat.
_SETTLING_SECONDS: Final = 0.5
# Twice the longest tick of a clock that Linux offers. Two changes within a tick can leave the same time, and the kernel rounds timeouts up to ticks.
_TICK_NANOSECONDS: Final = 20_000_000
_TICK_SECONDS: Final = _TICK_NANOSECONDS / 1e9
# How many events may find a file as it was before the kernel is asked to forget its attributes all the same: about as many looks cost as much as
# one more GETATTR. A file that is read once or twice keeps them, one that is read piece by piece does not.
_LOOKS: Final = 4


class _Kept(NamedTuple):
    """What the kernel keeps of a node: attributes with this change time (nanoseconds), and for so many looks more."""

    change_time: int
    looks: int


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
        # By node id: the attributes that the kernel may have, and a listener could have changed.
        self._kept: dict[int, _Kept] = {}

    def forgotten(self, node_id: int) -> None:
        """The kernel has forgotten a node."""
        self._events.pop(node_id, None)
        self._mtimes.pop(node_id, None)
        self._kept.pop(node_id, None)

    # What the kernel is told

    def attr_timeout(self, node: Node, status: os.stat_result) -> float:
        """For how many seconds the kernel may keep these attributes: inf where no listener can change them behind its back.

        A listener may go on filling a file through its event fd when it has answered, which nobody tells us. As acregmin and acregmax in
        nfs(5), attributes are kept for as long as the file has been quiet; for ever (inf) once nobody can be filling it any more.
        """
        if self._listeners.idle or not self._listeners.watches(self._subject_of(node)):
            return math.inf
        timeout = math.inf
        last = self._events.get(node.id)
        if last is not None:
            timeout = time.monotonic() - last
            if timeout < _TICK_SECONDS:
                return 0.0  # a listener is being asked, or has just been asked
            if timeout > _SETTLING_SECONDS and self._is_unchanged(node, status.st_ctime_ns):
                del self._events[node.id]
                timeout = math.inf
        kept = self._kept.get(node.id)
        # The kernel asks again whenever a read has changed the time of access: that is no reason to begin the looks anew.
        self._kept[node.id] = _Kept(status.st_ctime_ns, _LOOKS if kept is None else kept.looks)
        return timeout

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
        """Await a question to listeners about an access of a node. While it waits for one of them, the kernel keeps none of the node's
        attributes; afterwards, none that a listener has changed."""
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
        """A listener was asked about a node, and has answered before anything else could happen."""
        kept = self._kept.get(node.id)
        if kept is not None and kept.looks and self._is_unchanged(node, kept.change_time):
            self._kept[node.id] = kept._replace(looks=kept.looks - 1)
            return
        if node.id not in self._asking:
            self._events[node.id] = time.monotonic()
        if kept is not None:
            del self._kept[node.id]
            # Whoever gets this answer may look at once.
            await self._stale.inval_attributes(node)

    def notified(self, node: Node) -> None:
        """A listener has been told of an access of a node: with a descriptor of the file, through which it may change it."""
        if node.id not in self._asking:
            self._events[node.id] = time.monotonic()
            self._take_back(node)

    def _is_unchanged(self, node: Node, change_time: int) -> bool:
        """Whether a node has not been changed since it had that change time (nanoseconds), and nobody can be about to."""
        # What reopens a descriptor that can only read cannot be seen in between.
        if any(group.event_f_flags & os.O_ACCMODE == os.O_RDONLY for group in self._listeners.groups):
            return False
        # In this order: the last writer may just be closing.
        return (
            not self._overlay.is_being_written(node)
            and self._overlay.change_time(node) == change_time
            and time.time_ns() - change_time > _TICK_NANOSECONDS
        )

    def _take_back(self, node: Node) -> None:
        if self._kept.pop(node.id, None) is not None:
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
