"""Moments in which a signal that asks for the end must wait, and threads that get none."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
