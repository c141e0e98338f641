"""Reports the files of which a listener allows a range that is a hole: the accessor reads zeros.

This is what one sees of a listener that fills another file than it was asked for, or that takes the file for one that it need not fill.
"""

import errno
import os
from collections.abc import Callable
from typing import Final

from fusehsm.events import Access, AccessKind, EventShape
from fusehsm.overlay.overlay import Node, Overlay
from fusehsm.text import shown

_MOST_FILES: Final = 100_000  # beyond them a file may be reported again
_READING: Final = frozenset((AccessKind.READ, AccessKind.MAP, AccessKind.FAULT, AccessKind.FILL))


class UnfilledFiles:
    """Reports files of the mount at `destination`, each once.

    `descriptor_of` gives an open file's descriptor, which stays its owner's. `tell` gets the line.
    """

    def __init__(
        self,
        overlay: Overlay,
        destination: str,
        descriptor_of: Callable[[Node], int | None],
        tell: Callable[[str], None],
    ) -> None:
        self._overlay = overlay
        self._destination = destination
        self._descriptor_of = descriptor_of
        self._tell = tell
        self._told: set[int] = set()

    def allowed(self, access: Access, shape: EventShape, node: object) -> None:
        """A listener has allowed the access after a pre-content event. Raises nothing."""
        assert isinstance(node, Node)
        if access.kind not in _READING or shape.offset is None or not shape.count or node.id in self._told:
            return
        try:
            if self._has_hole(node, shape.offset, shape.offset + shape.count):
                if len(self._told) >= _MOST_FILES:
                    self._told.clear()
                self._told.add(node.id)
                path = os.path.join(self._destination, os.fsdecode(self._overlay.relative_path(node)))
                self._tell(
                    f"{shown(path)}: allowed at {shape.offset} ({shape.count} bytes), where it has a hole: the accessor reads zeros; if the "
                    "command fills files in another way than through the event's descriptor, start it with fusehsm run --listener "
                    "(--quiet hides this line)"
                )
        except OSError:
            return  # nothing can be told of a file that cannot be opened

    def _has_hole(self, node: Node, start: int, end: int) -> bool:
        descriptor = self._descriptor_of(node)
        opened = self._overlay.open(node, os.O_RDONLY) if descriptor is None else descriptor
        try:
            hole = os.lseek(opened, start, os.SEEK_HOLE)
            # The end of the file counts as a hole.
            return hole < end and hole < os.fstat(opened).st_size
        except OSError as error:
            if error.errno != errno.ENXIO:  # `start` is at or after the end of the file
                raise
            return False
        finally:
            if descriptor is None:
                os.close(opened)
