"""Runs coroutines that may have to wait: notes the wait, lets another task read meanwhile, and recognises a cancellation."""

import math
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, cast

import trio

_Result = TypeVar("_Result")


def is_cancellation(failure: BaseException) -> bool:
    """Whether `failure` means that the scope around the running task is cancelled; the caller then raises it again.

    A Cancelled that was kept from another scope is a failure like others.
    """
    return isinstance(failure, trio.Cancelled) and trio.current_effective_deadline() == -math.inf


@types.coroutine
def noting_suspension(
    coroutine: Coroutine[Any, Any, _Result], note: Callable[[], None]
) -> Generator[Any, Any, _Result]:
    """Await `coroutine`; call `note` when it suspends for the first time, and never if it does not suspend."""
    try:
        trap = coroutine.send(None)
    except StopIteration as stop:
        return cast(_Result, stop.value)
    note()
    # The steps of `yield from` (PEP 380), begun in the middle.
    while True:
        try:
            value = yield trap
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as exception:
            try:
                trap = coroutine.throw(exception)
            except StopIteration as stop:
                return cast(_Result, stop.value)
        else:
            try:
                trap = coroutine.send(value)
            except StopIteration as stop:
                return cast(_Result, stop.value)


class ReadingTurn:
    """Lets one of several tasks read. That task also handles its input; another task reads only when the handling has to wait.

    So work that does not wait costs no switch of tasks, and any number of tasks may wait. Each task reads only while it is the `reader`:

        while turn.reader is not me:
            if not await turn.wait(me): return
    """

    def __init__(self, start_task: Callable[[], None], *, most_idle: int | None = None) -> None:
        """`start_task` starts one more task, if one more is allowed. `most_idle`: how many tasks may wait for the turn (None: no limit)."""
        self.reader: object | None = None
        self._start_task = start_task
        self._most_idle = most_idle
        self._idle = trio.lowlevel.ParkingLot()

    async def wait(self, task: object) -> bool:
        """Wait for the turn; afterwards the task may still not be the reader. False: enough tasks wait already, and this task ends."""
        if self.reader is None:
            self.reader = task
        elif self._most_idle is not None and len(self._idle) >= self._most_idle:
            return False
        else:
            await self._idle.park()
        return True

    def pass_on(self) -> None:
        """The reader has to wait: let an idle task read, or start a new one."""
        self.reader = None
        if self._idle:
            self._idle.unpark()
        else:
            self._start_task()
