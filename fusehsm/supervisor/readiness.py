"""A group's descriptor in the command: the read end of a pipe that holds one byte for each event that waits.

So poll(2), select(2) and epoll(7) need no help. The sender of an event (the mount's server) writes a byte, and the reader of an event takes one.
The write end tells when the last copy of the read end is closed, by close(2), exec or death.
"""

import contextlib
import fcntl
import os
import select
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_INT: Final = struct.Struct("=i")
_ALL = 1 << 16  # the most bytes that a pipe holds
_LATEST_RING = 50  # milliseconds


class Bell:
    """The pipe. `name` is the text that readlink(2) gives for both ends in /proc/PID/fd."""

    def __init__(self) -> None:
        """Make the pipe; no process holds a read end yet: see reading_end(). Raises OSError EMFILE."""
        reading, self._descriptor = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.name = os.readlink(f"/proc/self/fd/{reading}")
        self._first: int | None = reading

    def fileno(self) -> int:
        """The write end."""
        return self._descriptor

    @contextmanager
    def reading_end(self) -> Iterator[int]:
        """A read end to hand over. The first time it is the pipe's original one."""
        if self._first is None:
            reading = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        else:
            reading, self._first = self._first, None
        try:
            yield reading
        finally:
            os.close(reading)

    def ring(self) -> None:
        """Write a byte, because one more event waits."""
        with contextlib.suppress(OSError):  # no process holds a read end any more
            os.write(self._descriptor, b"!")

    def take(self, events: int) -> None:
        """Take the bytes of events that wait no more. A sender writes its byte a moment after the event, and this waits for that moment."""
        with self.reading_end() as reading:
            while events > 0:
                try:
                    events -= len(os.read(reading, events))
                except BlockingIOError:
                    poll = select.poll()
                    poll.register(reading, select.POLLIN)
                    if not poll.poll(_LATEST_RING):
                        return  # tidy() will take it

    def tidy(self, waits: Callable[[], bool]) -> None:
        """Empty the pipe after a read that found no event, unless `waits` says that there is one now."""
        (rung,) = _INT.unpack(fcntl.ioctl(self._descriptor, termios.FIONREAD, bytes(_INT.size)))
        if not rung or waits():
            return
        with self.reading_end() as reading, contextlib.suppress(BlockingIOError):
            os.read(reading, _ALL)
        if waits():  # an event has come meanwhile, and its byte is gone
            self.ring()

    @property
    def unheard(self) -> bool:
        """Whether no process holds a read end."""
        poll = select.poll()
        poll.register(self._descriptor, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    def close(self) -> None:
        """Close this process's ends."""
        os.close(self._descriptor)
        if self._first is not None:
            os.close(self._first)


class Closings:
    """Notices, in a thread of its own, when no process holds a bell's read end any more."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        threading.Thread(target=self._watch, name="closings", daemon=True).start()

    def watch(self, bell: Bell, closed: Callable[[], None]) -> None:
        """Call `closed` once, in that thread. The bell must stay open until then."""
        self._watched[bell.fileno()] = closed
        self._epoll.register(bell.fileno(), select.EPOLLONESHOT)  # EPOLLERR always comes

    def _watch(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                self._epoll.unregister(descriptor)
                self._watched.pop(descriptor)()
