"""Keeps a handler in the mount's process from waiting for ever: an access to its own mount from the event loop would wait for itself.

Accesses from another thread are answered, and content is refused there with EDEADLK (emulator/listeners.py). While the event loop's own thread
waits, nothing can be answered. Two things prevent a hang. `refuse_calls` makes Python's own calls that name a path under the mount fail with
EDEADLK before they reach the kernel: open(), listdir(), rename() and all others that raise auditing events (sys.addaudithook). stat() and some
others raise none. For those there is `Watchdog`, a thread: it sees the event loop wait for a FUSE answer that cannot come, logs the line of
code, and closes /dev/fuse. That ends the mount, and every waiting accessor gets an error.
"""

import errno
import logging
import os
import select
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

log = logging.getLogger(__name__)

_INTERVAL: Final = 0.5  # seconds between two checks of the watchdog
_PATIENCE: Final = 6  # consecutive checks that find the same wait
_FUSE_WAIT: Final = (
    "request_wait_answer"  # fs/fuse/dev.c: the function that waits for the answer to a request
)
_OURS: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARY: Final = sysconfig.get_path("stdlib") + os.sep
_PACKAGES: Final = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")}
)  # may lie in the library's directory


def refuse_calls(destination: str, thread: int) -> Callable[[], None]:
    """Make calls of one thread that name an absolute path under the mount raise OSError EDEADLK.

    `thread` is its threading.get_ident(). The returned function ends this. Only the name counts: to resolve a symbolic link would send requests to
    the mount. The auditing hook stays for the life of the process.
    """
    refusing = True

    def end() -> None:
        nonlocal refusing
        refusing = False

    text = destination.rstrip("/") or "/"
    raw = os.fsencode(text)
    below, raw_below = text.rstrip("/") + "/", raw.rstrip(b"/") + b"/"

    def is_own(path: object) -> bool:
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        if isinstance(path, str):
            return path.startswith(below) or path == text
        return isinstance(path, bytes) and (path.startswith(raw_below) or path == raw)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" and not event.startswith(("os.", "shutil.")):
            return
        if not refusing or threading.get_ident() != thread:
            return
        for path in arguments[:2]:
            if is_own(path):
                message = f"{os.strerror(errno.EDEADLK)}: the handler touches its own mount, from the event loop that serves it"
                raise OSError(errno.EDEADLK, message, path)

    sys.addaudithook(hook)
    return end


class Watchdog:
    """Ends the mount when its event loop waits for itself. Make it in the event loop's thread; `with` starts it.

    It acts only if the handler waits, not the server for its backing (which may be slow, or FUSE too), and only if a request waits unread at this
    process's /dev/fuse.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._tid = threading.get_native_id()
        self._stopping = threading.Event()
        self.has_ended_it = False
        self._runner = threading.Thread(target=self._run, name="fusehsm-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._runner.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._runner.join()

    def _run(self) -> None:
        seen: tuple[str, int] | None = None
        count = 0
        while not self._stopping.wait(_INTERVAL):
            wait = self._look()
            count = count + 1 if wait is not None and wait == seen else 0
            seen = wait
            if count < _PATIENCE:
                continue
            culprit = self._culprit()
            if culprit is not None and _requests_wait():
                log.critical(
                    "the handler waits for its own mount, in the event loop that serves it: a deadlock, so the mount ends; "
                    "use a thread (trio.to_thread.run_sync). It was at:\n%s",
                    culprit,
                )
                self.has_ended_it = True
                _end_connection()
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _look(self) -> tuple[str, int] | None:
        """The wait that the event loop is in, equal as long as that wait goes on; None unless it waits for FUSE."""
        place = f"/proc/self/task/{self._tid}"
        try:
            with open(f"{place}/wchan", encoding="ascii") as file:
                if file.read().strip() != _FUSE_WAIT:
                    return None
            with open(f"{place}/syscall", encoding="ascii") as file:
                call = file.read()
            with open(f"{place}/status", encoding="utf-8", errors="replace") as file:
                switches = sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
        except OSError:
            return None
        return call, switches

    def _culprit(self) -> str | None:
        """The lines of code that wait; None if they are fusehsm's."""
        frame = sys._current_frames().get(self._thread)
        stack = traceback.extract_stack(frame)
        for call in reversed(stack):
            if not call.filename.startswith((_LIBRARY, "<frozen")) or call.filename.startswith(_PACKAGES):
                break
        else:
            return None
        return (
            None if call.filename.startswith(_OURS) else "".join(traceback.format_list(stack[-3:])).rstrip()
        )


def _connections() -> list[int]:
    """This process's descriptors of /dev/fuse."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.append(int(name))
    return found


def _requests_wait() -> bool:
    poll = select.poll()
    for descriptor in _connections():
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _end_connection() -> None:
    """Close /dev/fuse, so that the kernel fails every request. The numbers stay in use, because libfuse will close them."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in _connections():
        os.dup2(null, descriptor, inheritable=False)
    os.close(null)
