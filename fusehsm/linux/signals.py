"""Turns signals that ask this process to end into an exception, and delays them where they must wait.

trio is imported only inside functions: a program that starts processes without trio starts faster.
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
    """Run the handlers of SIGINT, SIGTERM and SIGHUP after the body, not in it.

    For the start of processes: if a handler raises after Popen has forked and before it returns, nothing knows the child any more. A signal
    mask will not do, because the child would inherit it. Handlers run in the main thread only, so in another thread this does nothing.
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
    """Block every signal in this thread. A thread that the body starts inherits the mask, so no signal of the process goes to it.

    Without this the kernel may deliver the signal to that thread, even if the main thread has blocked it to wait for it, and the process dies.
    """
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)


class Interrupted(BaseException):
    """A signal asks this process to end; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """For a program that must give back its mounts and loop devices, and must not end in the middle of that.

    The first signal counts. Later signals do nothing, so that the program gives everything back.
    """

    def __init__(self) -> None:
        self._number = 0
        self._deaf = False
        self._wake: Callable[[], object] | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal came before watch() began or after it ended."""
        if self._number:
            raise Interrupted(self._number)

    async def watch(self) -> None:
        """Raise Interrupted when a signal comes. Inside trio.run() the handler itself must not raise."""
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
        """Ignore signals from now on."""
        self._deaf = True

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
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
    """Raise Interrupted when a signal comes in the body. A signal that is ignored on entry stays ignored, as nohup(1) wants it."""
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
