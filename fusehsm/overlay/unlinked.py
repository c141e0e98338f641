"""Files that have no name any more, but that the kernel still knows: something must keep them, or their content is gone.

A descriptor does, but these are few (design: the limit may be 1024). Beyond them a mapping keeps a regular file as well: it needs no
descriptor, and /proc/self/map_files/ leads back from it to the file. That way is open to CAP_SYS_ADMIN and CAP_CHECKPOINT_RESTORE only
(proc(5)); without them the files that have been without a name for the longest are given up.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from contextlib import suppress

from fusehsm.linux import syscalls
from fusehsm.overlay.nodes import Node


class Pins:
    """One for each node that is pinned; at most `limit` of them hold a descriptor."""

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._descriptors: OrderedDict[Node, int] = OrderedDict()  # the most recently used last; O_PATH
        self._mappings: dict[Node, int] = {}  # addresses

    def __contains__(self, node: Node) -> bool:
        return node in self._descriptors or node in self._mappings

    def keep(self, node: Node, descriptor: int) -> None:
        """Pin a node by a descriptor (O_PATH) of it, which is owned from now on."""
        self.drop(node)
        self._descriptors[node] = descriptor
        while len(self._descriptors) > self._limit:
            oldest, its_descriptor = self._descriptors.popitem(last=False)
            address = _mapped(its_descriptor)
            os.close(its_descriptor)
            if address:
                self._mappings[oldest] = address

    def get(self, node: Node) -> int | None:
        """A descriptor (O_PATH) of a pinned node, good until the next call; None for others."""
        descriptor = self._descriptors.get(node)
        if descriptor is not None:
            self._descriptors.move_to_end(node)
            return descriptor
        address = self._mappings.get(node)
        if address is None:
            return None
        descriptor = os.open(_name_of(address), os.O_PATH | os.O_CLOEXEC)
        self.keep(node, descriptor)
        return descriptor

    def drop(self, node: Node) -> None:
        """It needs no pin any more; nothing happens where there is none."""
        descriptor = self._descriptors.pop(node, None)
        if descriptor is not None:
            os.close(descriptor)
        address = self._mappings.pop(node, None)
        if address is not None:
            syscalls.unmap_page(address)

    def close(self) -> None:
        """Drop all."""
        for node in [*self._descriptors, *self._mappings]:
            self.drop(node)


def _mapped(descriptor: int) -> int:
    """The address of a mapping of that file from which it can be found again; 0 where that cannot be had."""
    try:
        # Nothing but regular files: opening others may wait, or do something.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        readable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        address = syscalls.map_page(readable)
    except OSError:
        return 0
    finally:
        os.close(readable)
    with suppress(OSError):
        os.close(os.open(_name_of(address), os.O_PATH | os.O_CLOEXEC))
        return address
    syscalls.unmap_page(address)
    return 0


def _name_of(address: int) -> str:
    return f"/proc/self/map_files/{address:x}-{address + syscalls.PAGE_SIZE:x}"
