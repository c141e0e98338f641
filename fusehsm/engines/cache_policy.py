"""Decides for how long the kernel may cache names and attributes: the timeouts of fuse_lowlevel.h (struct fuse_entry_param)."""

import os
from typing import Final

from fusehsm.emulator.gate import Gate
from fusehsm.emulator.handles import OpenFile
from fusehsm.emulator.page_cache import DROPS_WRITTEN_PAGES
from fusehsm.linux.syscalls import kernel_version
from fusehsm.overlay.overlay import Node

FOREVER: Final = 1e9  # seconds; FUSE has no value for "until it is invalidated"
_SHARED: Final = 1.0  # seconds to cache names and attributes of a backing that other processes change, too


class CachePolicy:
    """The cache policy of one mount. `private`: the backing changes only through the mount or through event fds."""

    def __init__(self, gate: Gate, *, private: bool) -> None:
        self.private = private
        self._gate = gate
        self._longest = FOREVER if private else _SHARED
        self._versions: dict[int, tuple[int, int]] = {}

    def entry_timeout(self) -> float:
        """Seconds for which the kernel may cache that a name leads to a node."""
        return self._longest

    def negative_timeout(self, parent: Node) -> float:
        """Seconds for which the kernel may cache that a name does not exist. 0 where a denied O_CREAT may leave a file unknown to the kernel."""
        return 0.0 if self._gate.may_deny_new(parent) else self._longest

    def attr_timeout(self, node: Node, status: os.stat_result) -> float:
        """Seconds for which the kernel may cache these attributes of a node."""
        return min(self._gate.attributes.attr_timeout(node, status), self._longest)

    def mtime(self, node: Node, status: os.stat_result) -> int:
        """The st_mtime to show to the kernel, in nanoseconds."""
        return self._gate.attributes.shown_mtime(node, status)

    def blocks(self, node: Node, status: os.stat_result) -> int:
        """The st_blocks to show, in blocks of 512 bytes: not 0 for a watched file with content.

        tar -S takes a file without blocks for a hole, and never reads it (docs/facts.md, section 18).
        """
        if status.st_blocks or not status.st_size or not node.is_regular:
            return status.st_blocks
        return int(self._gate.watches(node))

    def keep_cache(self, file: OpenFile[Node]) -> bool:
        """Whether the kernel's pages of a file that is being opened may stay, because it is unchanged since the last open.

        Call it at every open. At the first one there are no pages to drop. A drop then, or while a page waits for a listener, would wait for
        pages that another open file is bringing in.
        """
        if self.private:
            return True
        status = self._gate.file_status(file.handle)
        version = (status.st_mtime_ns, status.st_size)
        known = self._versions.get(file.node.id)
        self._versions[file.node.id] = version
        return known is None or known == version or self._gate.attributes.is_filling(file.node)

    def appends_past_cache(self, file: OpenFile[Node]) -> bool:
        """Whether appending writes of an open file bypass the page cache.

        Where other processes append, too, such a write may go to another offset than the kernel assumes. Without the page cache it comes as
        one piece. Files that are also open for reading are left out, because they may be mapped.
        """
        return (
            not self.private
            and file.appends
            and file.flags & os.O_ACCMODE == os.O_WRONLY
            and kernel_version() >= DROPS_WRITTEN_PAGES
        )

    def forgotten(self, node_id: int) -> None:
        """Forget a node, as the kernel has forgotten it."""
        self._versions.pop(node_id, None)
