"""A handler in the mount's own process that touches its own mount from the event loop: it would wait for itself, for ever.

What it does from another thread is answered, and content is refused there with EDEADLK (emulator/listeners.py). From the event loop's own thread
nothing can be answered while it waits, so two things stand between that and a hang. `refuse_calls` makes Python's own calls that name a
path under the mount fail with EDEADLK before they reach the kernel: open(), listdir(), rename() and all others that raise auditing events
(sys.addaudithook). stat() and some others raise none: for those `Watchdog`, a thread, sees the event loop wait for a FUSE answer that
cannot come, names the line of code in the log, and ends the mount by closing its /dev/fuse: every waiting accessor then gets an error.
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

_INTERVAL: Final = 0.5  # seconds between two looks of the watchdog
_PATIENCE: Final = 6  # looks in a row at one and the same wait
_FUSE_WAIT: Final = "request_wait_answer"  # fs/fuse/dev.c: where the kernel waits for the answer to a request
_OURS: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARY: Final = sysconfig.get_path("stdlib") + os.sep
_PACKAGES: Final = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")}
)  # may lie in the library's directory


def refuse_calls(destination: str, thread: int) -> Callable[[], None]:
    """From now on calls of that thread (threading.get_ident()) that name an absolute path under the mount raise OSError EDEADLK, until the
    function that this returns is called.

    By name only: looking where a symbolic link leads would ask the mount. An auditing hook stays as long as the process.
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
    """Ends the mount when its event loop waits for itself; to be made in the event loop's thread, and started by `with`.

    It must be the handler that waits, not the server for its backing (which may be FUSE too, and slow), and a request must wait unread at
    our own /dev/fuse.
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
        """What the event loop waits in, equal as long as it goes on; None unless it waits for FUSE."""
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
        """The lines of code that wait; None when they are ours."""
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
    """Our descriptors of /dev/fuse."""
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
    """Let go of /dev/fuse: the kernel then fails every request. Its numbers stay taken, because libfuse will close them."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in _connections():
        os.dup2(null, descriptor, inheritable=False)
    os.close(null)
