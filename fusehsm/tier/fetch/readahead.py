"""Noticing that somebody reads a file from the beginning to the end, and what they will want next."""

from typing import Final

_MOST_STREAMS: Final = 4  # of one file at once; a listener sees no descriptors, only ranges


class _Stream:
    __slots__ = ("ahead", "next", "window")

    def __init__(self, end: int) -> None:
        self.next = end
        self.ahead = end
        self.window = 0


class Streams:
    """The streams of one file. All numbers are bytes."""

    __slots__ = ("_block", "_largest", "_streams")

    def __init__(self, block: int, largest: int) -> None:
        """`block`: of the fetches; `largest` window ahead of a reader, 0 to prefetch nothing."""
        self._block = block
        self._largest = largest
        self._streams: list[_Stream] = []

    def note(self, offset: int, end: int) -> tuple[int, int]:
        """Take note of an access; the range that should be fetched now beyond it, empty for one that belongs to no stream.

        An access that goes on where another ended (or overlaps its end, as readers of pages do) is a stream's second: from then on a window is
        kept filled ahead of it, one block at first and twice as much each time it has been used up. An access elsewhere begins another, and
        the one that was used longest ago is forgotten, with its window: who jumps about gets nothing fetched that they did not ask for.
        """
        if not self._largest or offset >= end:
            return end, end
        for position, stream in enumerate(self._streams):
            if stream.next - self._block <= offset <= stream.next + self._block // 8 and end > stream.next:
                if position:
                    self._streams.insert(0, self._streams.pop(position))
                return self._go_on(stream, end)
            if offset < stream.next and end <= stream.next and offset >= stream.next - 2 * self._block:
                return end, end  # again, or in part: says nothing
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
