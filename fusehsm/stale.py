"""Pages that the kernel caches of files that nobody was asked about, and how they go when somebody is to be asked.

A cached page outlives the open file that brought it in: a stub's zeros that were read while nobody watched would be shown, without any
request, to everybody who comes after the mark. So every node of which pages may have got in unasked ("tainted") is remembered, and its
pages are dropped at whatever makes its accesses heard: a mark, an ignore mark that goes, a name in a marked directory, a listener's death
where accesses are then refused or held.
"""

import errno
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from fusehsm.group import Group
from fusehsm.listeners import Listeners
from fusehsm.marks import Subject
from fusehsm.overlay import Node, Overlay

# How long a mark waits for stale pages to go: dropping the pages of an inode blocks while a fill of it waits for its answer.
_DROP_DEADLINE = 1.0  # seconds


class CacheControl(Protocol):
    """What an engine offers to keep the kernel's caches honest. All raise OSError; ENOENT when the kernel knows no such node."""

    def drop_pages(self, node_id: int) -> None:
        """Drop the cached pages and attributes of a node. Blocks while a fill of it is unanswered."""

    def drop_attributes(self, node_id: int) -> None:
        """Drop the cached attributes of a node; never blocks."""

    def set_page_exact(self, exact: bool) -> None:
        """Whether the kernel should read ahead of a page fault; best effort."""


class StalePages:
    """The tainted nodes of one mount. `cache` is None until it stands."""

    def __init__(self, overlay: Overlay, listeners: Listeners, subject_of: Callable[[Node], Subject]) -> None:
        self.cache: CacheControl | None = None
        self._overlay = overlay
        self._listeners = listeners
        self._subject_of = subject_of
        self._tainted: set[int] = set()
        self._limiter = trio.CapacityLimiter(1024)

    def __contains__(self, node: Node) -> bool:
        return node.id in self._tainted

    def taint(self, node_id: int) -> None:
        """Pages of it may be about to enter the cache, and nobody was asked."""
        self._tainted.add(node_id)

    def forget(self, node_id: int) -> None:
        """The kernel has forgotten the node, its pages with it."""
        self._tainted.discard(node_id)

    def covered_by(self, group: Group, node: Node | None) -> list[Node]:
        """The nodes that may be heard otherwise since a mark of the group on that node (None: any) has changed."""
        if group.marks.watched(Subject(-1, (), False)):
            return self._overlay.known_nodes()
        nodes = self._overlay.known_nodes() if node is None or node.is_dir else [node]
        return [found for found in nodes if group.marks.watched(self._subject_of(found))]

    async def drop(self, nodes: Iterable[Node]) -> None:
        """Drop the nodes' cached attributes, and the pages of those that are tainted; returns when they have gone or after a second."""
        attributes = [node.id for node in nodes]
        await self._drop(attributes, self._taken(attributes))

    async def drop_heard(self, nodes: Iterable[Node]) -> None:
        """drop(), for those of the nodes whose accesses would be asked for now."""
        await self.drop([node for node in nodes if node in self and self._is_heard(node)])

    def drop_heard_soon(self) -> None:
        """Begin to drop the pages of every tainted node whose accesses would be asked for now; waits for nothing."""
        cache = self.cache
        if cache is None or not self._tainted:
            return
        heard = []
        for node_id in self._tainted:
            try:
                node = self._overlay.node(node_id)
            except OSError:
                continue
            if self._is_heard(node):
                heard.append(node_id)
        for node_id in self._taken(heard):
            trio.lowlevel.start_thread_soon(
                lambda node_id=node_id: _ignore_unknown(cache.drop_pages, node_id),  # type: ignore[misc]
                lambda outcome: None,
            )

    async def drop_all_of(self, node: Node) -> None:
        """Drop all of a node's cached pages, however they got there; returns when they have gone."""
        self._tainted.discard(node.id)
        cache = self.cache
        if cache is not None:
            await self._in_thread(lambda: _ignore_unknown(cache.drop_pages, node.id))

    def _is_heard(self, node: Node) -> bool:
        return self._listeners.hears_content(self._subject_of(node))

    def _taken(self, node_ids: list[int]) -> list[int]:
        taken = [node_id for node_id in node_ids if node_id in self._tainted]
        self._tainted.difference_update(taken)
        return taken

    async def _drop(self, attributes: list[int], pages: list[int]) -> None:
        cache = self.cache
        if cache is None:
            return

        def drop_attributes() -> None:
            for node_id in attributes:
                _ignore_unknown(cache.drop_attributes, node_id)

        async def drop_pages(node_id: int) -> None:
            await self._in_thread(lambda: _ignore_unknown(cache.drop_pages, node_id))

        with trio.move_on_after(_DROP_DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._in_thread, drop_attributes)
                for node_id in pages:
                    nursery.start_soon(drop_pages, node_id)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)


def _ignore_unknown(drop: Callable[[int], None], node_id: int) -> None:
    try:
        drop(node_id)
    except OSError as error:
        # ENOSYS: the kernel has not begun to talk to this mount (INIT), so it has cached nothing of it.
        if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.EBADF, errno.ENOSYS):
            raise
