"""Detection of sequential readers of a file, and of the range that they need next."""

from typing import Final

_MOST_STREAMS: Final = 4  # of one file at once; a listener sees ranges, not the descriptors of the readers


class _Stream:
    """One sequential reader."""

    __slots__ = ("ahead", "next", "window")

    def __init__(self, end: int) -> None:
        # Offset of the next access.
        self.next = end
        # Offset up to which content is fetched ahead.
        self.ahead = end
        # Size of the window.
        self.window = 0


class Streams:
    """The streams of one file. All numbers are bytes."""

    __slots__ = ("_block", "_largest", "_streams")

    def __init__(self, block: int, largest: int) -> None:
        """`block`: size of a block; `largest`: size of the largest window ahead of a reader, 0 to prefetch nothing."""
        self._block = block
        self._largest = largest
        self._streams: list[_Stream] = []

    def note(self, offset: int, end: int) -> tuple[int, int]:
        """Note an access. Returns the range to fetch now beyond it; empty if the access continues no stream.

        An access that begins at the end of another one (or overlaps it, as readers of pages do) continues a stream. From then on a window is kept
        filled ahead of the stream: one block at first, and doubled each time it has been used up. An access elsewhere begins a new stream, and the
        least recently used one is forgotten with its window. So a reader at random offsets causes no prefetch.
        """
        if not self._largest or offset >= end:
            return end, end
        for position, stream in enumerate(self._streams):
            if stream.next - self._block <= offset <= stream.next + self._block // 8 and end > stream.next:
                if position:
                    self._streams.insert(0, self._streams.pop(position))
                return self._go_on(stream, end)
            if offset < stream.next and end <= stream.next and offset >= stream.next - 2 * self._block:
                return end, end  # a repeated access: no sign of a stream
        self._streams.insert(0, _Stream(end))
        del self._streams[_MOST_STREAMS:]
        return end, end

    def _go_on(self, stream: _Stream, end: int) -> tuple[int, int]:
        stream.next = end
        if end + stream.window // 2 < stream.ahead:
            return end, end
        stream.window = min(max(2 * stream.window, self._block), self._largest)
        start = max(stream.ahead, end)
        stream.ahead = end + stream.window
        return start, max(start, stream.ahead)
