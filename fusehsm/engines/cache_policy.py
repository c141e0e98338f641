"""How long the kernel may cache what an engine tells it of names and attributes: the timeouts of fuse_lowlevel.h (struct fuse_entry_param)."""

import os
from typing import Final

from fusehsm.emulator.gate import Gate
from fusehsm.emulator.handles import OpenFile
from fusehsm.linux.kernel_version import kernel_version
from fusehsm.overlay.overlay import Node

FOREVER: Final = 1e9  # seconds; FUSE has no other word for "until I say so"
_DROPS_WRITTEN_PAGES: Final = (6, 6)  # the Linux whose direct writes drop the pages that they write beside
_SHARED: Final = 1.0  # seconds for which a backing that others change too is believed


class CachePolicy:
    """One mount's. `private` tells that the backing changes only through the mount or through event fds."""

    def __init__(self, gate: Gate, *, private: bool) -> None:
        self.private = private
        self._gate = gate
        self._longest = FOREVER if private else _SHARED
        self._versions: dict[int, tuple[int, int]] = {}

    def entry_timeout(self) -> float:
        """Seconds for which the kernel may cache that a name leads to a node."""
        return self._longest

    def negative_timeout(self, parent: Node) -> float:
        """Seconds for which the kernel may cache that there is no such name: 0 where a denied O_CREAT would leave a file that it never hears of."""
        return 0.0 if self._gate.may_deny_new(parent) else self._longest

    def attr_timeout(self, node: Node, status: os.stat_result) -> float:
        """Seconds for which the kernel may cache these attributes of a node."""
        return min(self._gate.attributes.attr_timeout(node, status), self._longest)

    def mtime(self, node: Node, status: os.stat_result) -> int:
        """st_mtime to show, in nanoseconds."""
        return self._gate.attributes.shown_mtime(node, status)

    def blocks(self, node: Node, status: os.stat_result) -> int:
        """st_blocks to show: tar -S takes a file without a single block for one hole and never reads it."""
        if status.st_blocks or not status.st_size or not node.is_regular:
            return status.st_blocks
        return int(self._gate.watches(node))

    def keep_cache(self, file: OpenFile[Node]) -> bool:
        """Whether the kernel's pages of a file that is being opened may stay: it is as it was at the last open. To be asked at every one.

        At the first there are no pages. To drop them then, or while one of them waits for its listener, would wait for those that another
        open is just bringing in.
        """
        if self.private:
            return True
        status = self._gate.file_status(file.handle)
        version = (status.st_mtime_ns, status.st_size)
        known = self._versions.get(file.node.id)
        self._versions[file.node.id] = version
        return known is None or known == version or self._gate.attributes.is_filling(file.node)

    def appends_past_cache(self, file: OpenFile[Node]) -> bool:
        """Whether what an open file appends goes past the kernel's pages: where others append, too, it may go elsewhere than the kernel thinks,
        and comes in one piece then. Not what can also read: it may be mapped."""
        return (
            not self.private
            and file.appends
            and file.flags & os.O_ACCMODE == os.O_WRONLY
            and kernel_version() >= _DROPS_WRITTEN_PAGES
        )

    def forgotten(self, node_id: int) -> None:
        """The kernel has forgotten a node."""
        self._versions.pop(node_id, None)
