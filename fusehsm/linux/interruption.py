"""What has mounts and loop devices to give back is not to be ended in the middle: a signal that asks for the end becomes an exception."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """Somebody wants this process to end; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """The first signal counts. Those after it do nothing: what is given back then must be given back to the end."""

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
        import trio  # not before: who has no event loop starts faster without

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
