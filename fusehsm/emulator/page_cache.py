"""Drops cached pages that entered the kernel's page cache without a question to a listener, once accesses of their files must be asked for.

A cached page outlives the open file that brought it in (docs/facts.md, section 13). A stub's zeros that were read unwatched would be shown,
without any request, to every accessor after the mark. So this module remembers every node of which pages may have entered unasked ("tainted").
It drops their pages when their accesses become heard: by a mark, the end of an ignore mark, a name in a marked directory, or a listener's
death where accesses are then refused or held.
"""

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

import trio

from fusehsm.emulator.group import Group
from fusehsm.emulator.listeners import Listeners
from fusehsm.fanotify.marks import Subject
from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.overlay.overlay import Node, Overlay

log = logging.getLogger(__name__)

# How long a mark waits until stale pages are dropped. The drop blocks while a fill of the inode waits for its answer.
_DROP_DEADLINE = 1.0  # seconds
# How long the answer to a request waits for that. The request may have locked more than its own pages.
_MOMENT = 0.1  # seconds
# The first Linux whose direct writes drop the cached pages of the bytes that they write.
DROPS_WRITTEN_PAGES: Final = (6, 6)
_MOST_THREADS = 1024  # for drops that are made at once

Drop = Callable[[], None]
Tell = Callable[[OSError | None], None]


class CacheControl(Protocol):
    """An engine's control of the kernel's caches. All methods raise OSError, ENOENT when the kernel knows no such node."""

    def inval_inode(self, node_id: int) -> None:
        """Drop the cached pages and attributes of a node. Blocks while a fill of it waits for its answer."""

    def inval_attributes(self, node_id: int) -> None:
        """Drop the cached attributes of a node. Blocks while the kernel frees the inode, which may wait for a fill."""

    def inval_range(self, node_id: int, offset: int, size: int) -> None:
        """Drop the cached pages of a range in bytes (`size` 0: to the end), and the attributes. Blocks like inval_inode."""

    def set_page_exact(self, exact: bool) -> None:
        """Make a page fault bring in one page only (`exact`), or let the kernel read ahead again. Best effort: raises nothing."""


class StalePages:
    """The tainted nodes of one mount. `cache` is None until the mount exists."""

    def __init__(self, overlay: Overlay, listeners: Listeners, subject_of: Callable[[Node], Subject]) -> None:
        self.cache: CacheControl | None = None
        self._overlay = overlay
        self._listeners = listeners
        self._subject_of = subject_of
        self._tainted: set[int] = set()
        self._asked: set[int] = set()
        # Drops to be made, each with the callback for its result.
        self._waiting: deque[tuple[Drop, Tell]] = deque()

    def __contains__(self, node: Node) -> bool:
        return node.id in self._tainted

    def taint(self, node_id: int) -> None:
        """Note that pages of a node may enter the cache unasked. They are dropped once a listener hears accesses of the node."""
        self._tainted.add(node_id)

    def asked_for(self, node_id: int) -> None:
        """Note that pages of a node enter the cache with a listener's leave.

        They stay while a listener hears the node. Where none did for a time, they are dropped when one hears it again (unheard(), drop()).
        """
        self._asked.add(node_id)

    def forget(self, node_id: int) -> None:
        """Forget a node, as the kernel has forgotten it and its pages."""
        self._tainted.discard(node_id)
        self._asked.discard(node_id)

    def unheard(self, node: Node | None) -> list[Node]:
        """The nodes that may have cached pages, and whose accesses no listener hears now: among `node`, or all for None or a directory.

        When a mark comes to cover them, their pages must go. This includes pages that a listener allowed once: it may have evicted them since.
        """
        if node is not None and not node.is_dir:
            nodes = [node] if node.id in self._tainted or node.id in self._asked else []
        else:
            nodes = list(self._known(self._tainted | self._asked))
        return [found for found in nodes if not self._is_heard(found)]

    def _known(self, node_ids: Iterable[int]) -> Iterator[Node]:
        for node_id in node_ids:
            with suppress(OSError):
                yield self._overlay.node(node_id)

    def covered_by(self, group: Group, node: Node | None) -> list[Node]:
        """The nodes that a changed mark of the group on that node (None: on any) may concern."""
        nodes = self._overlay.known_nodes() if node is None or node.is_dir else [node]
        if group.marks.watched(Subject(-1, (), False)):
            return nodes
        return [found for found in nodes if group.marks.watched(self._subject_of(found))]

    async def drop(self, nodes: Iterable[Node], unheard: Iterable[Node] = ()) -> None:
        """Drop the nodes' cached attributes, and the pages of those that are tainted, or that were `unheard` and are heard now.

        Returns when they are dropped, or after one second.
        """
        attributes = [node.id for node in nodes]
        pages = self._taken(attributes)
        newly_heard = {node.id for node in unheard if self._is_heard(node)}
        self._tainted -= newly_heard
        self._asked -= newly_heard
        await self._drop(attributes, list(newly_heard.union(pages)))

    async def drop_heard(self, nodes: Iterable[Node]) -> None:
        """drop(), for those of the nodes that are tainted and heard now."""
        await self.drop([node for node in nodes if node in self and self._is_heard(node)])

    def drop_heard_soon(self) -> None:
        """Begin to drop the pages of every tainted node that is heard now; does not wait."""
        cache = self.cache
        if cache is None or not self._tainted:
            return
        self._begin([partial(cache.inval_inode, node_id) for node_id in self._tainted_and_heard()])

    async def drop_heard_but(self, written: Node, start: int, end: int) -> None:
        """drop_heard_soon(), but waits until the pages are dropped, or for 0.1 seconds.

        It does not wait for the pages of `written` in [`start`, `end`): the kernel has them locked until the write is answered.
        """
        cache = self.cache
        if cache is None or not self._tainted:
            return
        first, beyond = start - start % PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE
        drops: list[Drop] = []
        for node_id in self._tainted_and_heard():
            if node_id != written.id or first == beyond:
                drops.append(partial(cache.inval_inode, node_id))
                continue
            if first:
                drops.append(partial(cache.inval_range, node_id, 0, first))
            drops.append(partial(cache.inval_range, node_id, beyond, 0))
            self._begin([partial(cache.inval_range, node_id, first, beyond - first)])
        # The write has been made: a failure of a drop is logged, but is no reason to deny the write.
        with suppress(OSError):
            await self._dropped(drops, _MOMENT)

    async def drop_but(self, node: Node, kept: Iterable[tuple[int, int]]) -> None:
        """Drop a node's cached pages except those in the ranges in bytes [start, end) of `kept`.

        Returns when they are dropped, or after 0.1 seconds.
        """
        cache = self.cache
        if cache is None:
            return
        drops: list[Drop] = []
        position = 0
        for start, end in sorted(kept):
            first = start - start % PAGE_SIZE
            if position < first:
                drops.append(partial(cache.inval_range, node.id, position, first - position))
            position = max(position, -(-end // PAGE_SIZE) * PAGE_SIZE)
        drops.append(partial(cache.inval_range, node.id, position, 0))
        with suppress(OSError):
            await self._dropped(drops, _MOMENT)

    async def drop_written(self, node: Node, start: int, end: int) -> None:
        """Drop a node's cached pages of [`start`, `end`), which a write has changed past the page cache, for those who have it open otherwise.

        Returns when they are dropped, or after 0.1 seconds. Only kernels before DROPS_WRITTEN_PAGES need it.
        """
        cache = self.cache
        if cache is None or not (node.id in self._tainted or node.id in self._asked):
            return
        with suppress(OSError):
            await self._dropped([partial(cache.inval_range, node.id, start, end - start)], _MOMENT)

    def inval_range_later(self, node: Node, offset: int, size: int, delay: float) -> None:
        """Drop a node's cached pages of a range after `delay` seconds. The READ of that range is about to be answered."""
        cache = self.cache
        if cache is None:
            return

        def drop() -> None:
            time.sleep(delay)
            _ignore_unknown(cache.inval_range, node.id, offset, size)

        trio.lowlevel.start_thread_soon(drop, lambda outcome: None)

    async def drop_changed(self, node: Node) -> None:
        """Drop the kernel's cached pages and attributes of a node that has changed; returns when they are dropped, or after 0.1 seconds."""
        if self.cache is not None:
            with suppress(OSError):
                await self._dropped([partial(self.cache.inval_inode, node.id)], _MOMENT)

    def drop_changed_soon(self, node: Node, offset: int = 0, size: int = 0) -> None:
        """Begin to drop a node's cached attributes, and its pages in that range in bytes (`size` 0: to the end); does not wait."""
        if self.cache is not None:
            self._begin([partial(self.cache.inval_range, node.id, offset, size)])

    def drop_attributes_soon(self, node: Node) -> None:
        """Begin to drop a node's cached attributes; does not wait."""
        if self.cache is not None:
            self._begin([partial(self.cache.inval_attributes, node.id)])

    async def inval_attributes(self, node: Node) -> None:
        """Drop a node's cached attributes; returns when they are dropped, or after 0.1 seconds."""
        if self.cache is not None:
            with suppress(OSError):
                await self._dropped([partial(self.cache.inval_attributes, node.id)], _MOMENT)

    async def drop_all_of(self, node: Node) -> None:
        """Drop all of a node's cached pages, tainted or not; returns when they are dropped.

        Raises OSError EBUSY after one second, if a page of the node still waits for a listener. The pages are dropped after its answer.
        """
        self._tainted.discard(node.id)
        self._asked.discard(node.id)
        cache = self.cache
        if cache is None:
            return
        if not await self._dropped([partial(cache.inval_inode, node.id)], _DROP_DEADLINE):
            raise OSError(errno.EBUSY, "a page of the file waits for its listener; it is dropped after that")

    def _is_heard(self, node: Node) -> bool:
        return self._listeners.hears_content(self._subject_of(node))

    def _tainted_and_heard(self) -> list[int]:
        """The ids of the nodes that are tainted and heard now. Their taint is removed."""
        return self._taken([node.id for node in self._known(self._tainted) if self._is_heard(node)])

    def _taken(self, node_ids: list[int]) -> list[int]:
        taken = [node_id for node_id in node_ids if node_id in self._tainted]
        self._tainted.difference_update(taken)
        return taken

    async def _drop(self, attributes: list[int], pages: list[int]) -> None:
        cache = self.cache
        if cache is None:
            return

        def inval_attributes() -> None:
            for node_id in attributes:
                _ignore_unknown(cache.inval_attributes, node_id)

        drops: list[Drop] = [inval_attributes, *(partial(cache.inval_inode, node_id) for node_id in pages)]
        await self._dropped(drops, _DROP_DEADLINE)

    async def _dropped(self, drops: list[Drop], seconds: float) -> bool:
        """Make these drops, and wait at most `seconds`; returns whether all are made. The others continue after that.

        Raises OSError when one has failed.
        """
        if not drops:
            return True
        token = trio.lowlevel.current_trio_token()
        made = trio.Event()
        left = len(drops)
        failures: list[OSError] = []

        def count(failure: OSError | None) -> None:
            nonlocal left
            left -= 1
            if failure is not None:
                failures.append(failure)
            if not left:
                made.set()

        def tell(failure: OSError | None) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(count, failure)

        self._begin(drops, tell)
        with trio.move_on_after(seconds):
            await made.wait()
        for failure in failures:
            raise failure
        return made.is_set()

    def _begin(self, drops: list[Drop], tell: Tell = lambda failure: None) -> None:
        """Start these drops, each in a thread, as it may block; `tell` is called in that thread after each.

        No drop may be lost when its caller stops waiting: the nodes are not tainted any more.
        """
        self._waiting.extend((drop, tell) for drop in drops)
        for _ in range(min(len(drops), _MOST_THREADS)):
            try:
                trio.lowlevel.start_thread_soon(self._make_drops, lambda outcome: None)
            except RuntimeError as error:
                log.error("cached pages are dropped late: %s", error)
                return

    def _make_drops(self) -> None:
        while True:
            try:
                drop, tell = self._waiting.popleft()
            except IndexError:
                return
            failure = None
            try:
                _ignore_unknown(drop)
            except OSError as error:
                log.error("cached pages or attributes were not dropped: %s", error.strerror)
                failure = error
            tell(failure)


def _ignore_unknown(drop: Callable[..., None], *arguments: int) -> None:
    try:
        drop(*arguments)
    except OSError as error:
        # ENOSYS: the kernel has not had its answer to INIT yet, so it has cached nothing of this mount.
        if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.EBADF, errno.ENOSYS):
            raise
