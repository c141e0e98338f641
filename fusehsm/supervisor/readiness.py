"""A group's descriptor in the command: the reading end of a pipe that holds a byte for every event that waits.

So poll(2), select(2) and epoll(7) need nobody in between; who queues an event (the mount's server) rings for it, and whoever takes one takes
its byte. When the last copy of that end is closed, by close(2), exec or death, the writing end tells.
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
_ALL = 1 << 16  # a pipe holds no more
_LATEST_RING = 50  # milliseconds


class Bell:
    """The pipe. `name` is what readlink(2) tells of either end in /proc/PID/fd."""

    def __init__(self) -> None:
        """Made without anybody listening: see reading_end(). Raises OSError EMFILE."""
        reading, self._descriptor = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.name = os.readlink(f"/proc/self/fd/{reading}")
        self._first: int | None = reading

    def fileno(self) -> int:
        """The writing end."""
        return self._descriptor

    @contextmanager
    def reading_end(self) -> Iterator[int]:
        """A reading end to hand over; the first time it is the one that the pipe was made with."""
        if self._first is None:
            reading = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        else:
            reading, self._first = self._first, None
        try:
            yield reading
        finally:
            os.close(reading)

    def ring(self) -> None:
        """One event more waits."""
        with contextlib.suppress(OSError):  # nobody is there any more
            os.write(self._descriptor, b"!")

    def take(self, events: int) -> None:
        """So many events wait no more. Who has sent one rings a moment later, and that moment is waited for."""
        with self.reading_end() as reading:
            while events > 0:
                try:
                    events -= len(os.read(reading, events))
                except BlockingIOError:
                    poll = select.poll()
                    poll.register(reading, select.POLLIN)
                    if not poll.poll(_LATEST_RING):
                        return  # tidy() will find it

    def tidy(self, waits: Callable[[], bool]) -> None:
        """Nothing was found to read: let nobody be told otherwise, unless `waits` says that there is something now."""
        (rung,) = _INT.unpack(fcntl.ioctl(self._descriptor, termios.FIONREAD, bytes(_INT.size)))
        if not rung or waits():
            return
        with self.reading_end() as reading, contextlib.suppress(BlockingIOError):
            os.read(reading, _ALL)
        if waits():  # it has come meanwhile, and its byte is gone
            self.ring()

    @property
    def unheard(self) -> bool:
        """Whether nobody holds a reading end."""
        poll = select.poll()
        poll.register(self._descriptor, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    def close(self) -> None:
        """Close both ends that are ours."""
        os.close(self._descriptor)
        if self._first is not None:
            os.close(self._first)


class Closings:
    """Notices, in a thread of its own, when nobody listens to a bell any more."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        threading.Thread(target=self._watch, name="closings", daemon=True).start()

    def watch(self, bell: Bell, closed: Callable[[], None]) -> None:
        """`closed` is called once, in that thread; the bell is not to be closed before."""
        self._watched[bell.fileno()] = closed
        self._epoll.register(bell.fileno(), select.EPOLLONESHOT)  # EPOLLERR comes unasked

    def _watch(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                self._epoll.unregister(descriptor)
                self._watched.pop(descriptor)()
