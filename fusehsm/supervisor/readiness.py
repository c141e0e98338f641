"""A group's descriptor in the command: an epoll(7) file that watches a pipe with one byte for each event that waits.

So poll(2), select(2) and epoll(7) need no help, and no call gets a byte of the pipe: the kernel refuses read(2), write(2) and io_uring's reads of
an epoll file with EINVAL. Both ends of the pipe stay with the supervisor. The sender of an event (the mount's server) writes a byte, and the reader
of an event takes one.

Each copy of the descriptor that the supervisor hands over is an epoll file of its own, and copies of the kernel's making share one. The supervisor
keeps none of them, so that their last close ends them (docs/facts.md, section 20).
"""

import contextlib
import errno
import fcntl
import os
import re
import select
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fusehsm.linux.syscalls import add_to_epoll

_INT: Final = struct.Struct("=i")
_ALL: Final = 1 << 16  # the most bytes that a pipe holds
_LATEST_RING: Final = 50  # milliseconds
_PAUSE: Final = 0.1  # seconds between two looks for closed descriptors
_TARGET: Final = re.compile(rb"^tfd:.* data: *([0-9a-f]+) ", re.MULTILINE)
_LONGEST_LINE: Final = 160  # bytes of fdinfo; usual are 80
_OTHER_LINES: Final = 8  # besides one for each watched file


class Bell:
    """The pipe of one group."""

    def __init__(self, closings: "Closings", unheard: Callable[[], None]) -> None:
        """Make the pipe. No process holds a descriptor yet: see descriptor(). `unheard` is called, in any thread, after the close of the last one.

        Raises OSError EMFILE.
        """
        self._closings = closings
        self._unheard: Callable[[], None] | None = unheard
        self._copies = 0  # epoll files that are open; the lock of `closings` guards it
        self.reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """The write end."""
        return self._writing

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """A descriptor to hand over. Raises OSError EMFILE."""
        with select.epoll() as epoll:
            try:
                epoll.register(self.reading, select.EPOLLIN)
                self._closings.watch(epoll.fileno(), self)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # The kernel allows about 500 ways to one pipe (reverse_path_check()).
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None
            yield epoll.fileno()

    def add_copy(self) -> None:
        """Count one more epoll file. With the lock of the closings."""
        self._copies += 1

    def remove_copy(self) -> bool:
        """Count one epoll file less; returns whether none is left. With the lock of the closings."""
        self._copies -= 1
        return not self._copies

    def tell_unheard(self) -> None:
        """Call `unheard`, unless the bell is closed."""
        if self._unheard is not None:
            self._unheard()

    def ring(self) -> None:
        """Write a byte, because one more event waits."""
        with contextlib.suppress(OSError):  # full of bytes, which say as much
            os.write(self._writing, b"!")

    def take(self, events: int) -> None:
        """Take the bytes of events that wait no more. A sender writes its byte a moment after the event, and this waits for that moment."""
        while events > 0:
            try:
                events -= len(os.read(self.reading, events))
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.reading, select.POLLIN)
                if not poll.poll(_LATEST_RING):
                    return  # tidy() will take it

    def tidy(self, waits: Callable[[], bool]) -> None:
        """Empty the pipe after a read that found no event, unless `waits` says that there is one now."""
        (rung,) = _INT.unpack(fcntl.ioctl(self.reading, termios.FIONREAD, bytes(_INT.size)))
        if not rung or waits():
            return
        with contextlib.suppress(BlockingIOError):
            os.read(self.reading, _ALL)
        if waits():  # an event has come meanwhile, and its byte is gone
            self.ring()

    @property
    def is_unheard(self) -> bool:
        """Whether no process holds a descriptor."""
        return not self._copies

    def close(self) -> None:
        """Close the pipe. `unheard` is not called any more."""
        self._unheard = None
        os.close(self._writing)
        os.close(self.reading)


class Closings:
    """Notices, in a thread of its own, when no process holds a descriptor of a bell any more.

    An epoll file of this process watches those of the bells, without keeping them open: the kernel forgets a watched file with its last close, and
    fdinfo shows that. No kernel wakes anybody for it, so the thread looks ten times a second while there is any.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._list = os.open(f"/proc/self/fdinfo/{self._epoll.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._watched: dict[int, Bell] = {}
        self._last = 0
        self._text = b""
        self._some = threading.Event()
        threading.Thread(target=self._look_again_and_again, name="closings", daemon=True).start()

    def watch(self, epoll: int, bell: Bell) -> None:
        """Watch an epoll file that is about to be handed over. Raises OSError."""
        with self._lock:
            self._last += 1
            add_to_epoll(self._epoll.fileno(), epoll, 0, self._last)
            self._watched[self._last] = bell
            bell.add_copy()
            self._text = b""  # it may be closed again before a look
            self._some.set()

    def look(self) -> None:
        """Look for closed descriptors now."""
        with self._lock:
            text = os.pread(self._list, _LONGEST_LINE * (len(self._watched) + _OTHER_LINES), 0)
            if text == self._text:
                return
            self._text = text
            standing = {int(number, 16) for number in _TARGET.findall(text)}
            gone = [self._watched.pop(number) for number in self._watched.keys() - standing]
            unheard = [bell for bell in gone if bell.remove_copy()]
            if not self._watched:
                self._some.clear()
        for bell in unheard:
            bell.tell_unheard()

    def _look_again_and_again(self) -> None:
        while True:
            self._some.wait()
            time.sleep(_PAUSE)
            self.look()
