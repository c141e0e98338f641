"""Signals that ask this process for its end: they become an exception, and at some moments they must wait.

trio is imported only inside functions: a program that starts processes without it starts faster.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let the handlers of what asks for the end run after the body, not in it.

    For starting processes: a handler that raises while Popen has forked and not returned yet loses the child, and what it does goes on unseen.
    Not by the signal mask, which the child would inherit. Handlers run in the main thread alone, so elsewhere there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    kept = {number: signal.getsignal(number) for number in _SIGNALS}
    held = {number: handler for number, handler in kept.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for arrived in came:
            signal.raise_signal(arrived)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block every signal in this thread. A thread that is started in the body inherits that: what comes to the process never goes to it.

    Otherwise the kernel may choose it, also where the main thread has blocked a signal to wait for it, and the process dies.
    """
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)


class Interrupted(BaseException):
    """Somebody wants this process to end; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """For a program that has mounts and loop devices to give back, and must not end in the middle of that.

    The first signal counts. Those after it do nothing: what is given back then must be given back to the end.
    """

    def __init__(self) -> None:
        self._number = 0
        self._deaf = False
        self._wake: Callable[[], object] | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal came while watch() had not begun yet, or did not any more."""
        if self._number:
            raise Interrupted(self._number)

    async def watch(self) -> None:
        """Raise Interrupted when a signal comes: inside a trio.run() the handler must not."""
        import trio

        news = trio.Event()
        token = trio.lowlevel.current_trio_token()
        self._wake = lambda: token.run_sync_soon(news.set)
        try:
            if not self._number:
                await news.wait()
        finally:
            self._wake = None
        self.check()

    def ignore(self) -> None:
        """Let signals do nothing from now on."""
        self._deaf = True

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        if self._number or self._deaf:
            return
        self._number = number
        trio = sys.modules.get("trio")
        if trio is None or not trio.lowlevel.in_trio_run():
            self.check()
        if self._wake is not None:
            self._wake()


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Raise Interrupted where a signal comes in the body, but for a signal that is ignored, as nohup(1) has it."""
    import trio  # noqa: F401 (so that the handler finds it imported)

    interruption = Interruption()
    kept = {
        number: signal.signal(number, interruption.handle)
        for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield interruption
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
