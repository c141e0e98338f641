"""Keeps files that have no name any more but that the kernel still knows. Without a pin their content would be gone.

A descriptor pins a file, but descriptors are few: the limit of a process may be 1024. Beyond them a mapping pins a regular file. It needs no
descriptor, and /proc/self/map_files/ leads back from it to the file. Only processes with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE may use that
(proc(5)). Without these, the files that have had no name for the longest are given up.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from contextlib import suppress

from fusehsm.linux import syscalls
from fusehsm.overlay.nodes import Node


class Pins:
    """The pins, one for each pinned node. At most `limit` of them hold a descriptor."""

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._descriptors: OrderedDict[Node, int] = OrderedDict()  # the most recently used last; O_PATH
        self._mappings: dict[Node, int] = {}  # addresses

    def __contains__(self, node: Node) -> bool:
        return node in self._descriptors or node in self._mappings

    def keep(self, node: Node, descriptor: int) -> None:
        """Pin a node by a descriptor (O_PATH) of it. The table owns the descriptor from now on."""
        self.drop(node)
        self._descriptors[node] = descriptor
        while len(self._descriptors) > self._limit:
            oldest, its_descriptor = self._descriptors.popitem(last=False)
            address = _mapped(its_descriptor)
            os.close(its_descriptor)
            if address:
                self._mappings[oldest] = address

    def get(self, node: Node) -> int | None:
        """A descriptor (O_PATH) of a pinned node, valid until the next call; None for other nodes."""
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
        """Remove the pin of a node, if it has one."""
        descriptor = self._descriptors.pop(node, None)
        if descriptor is not None:
            os.close(descriptor)
        address = self._mappings.pop(node, None)
        if address is not None:
            syscalls.unmap_page(address)

    def close(self) -> None:
        """Remove all pins."""
        for node in [*self._descriptors, *self._mappings]:
            self.drop(node)


def _mapped(descriptor: int) -> int:
    """Map a file, and return the address from which it can be opened again; 0 where that is impossible."""
    try:
        # Regular files only: open(2) of others may wait, or have an effect.
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
