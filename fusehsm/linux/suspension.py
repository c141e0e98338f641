"""A coroutine that has to wait: noticing it, letting another task read meanwhile, and knowing a cancellation from the end of its surroundings."""

import math
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, cast

import trio

_Result = TypeVar("_Result")


def is_cancellation(failure: BaseException) -> bool:
    """Whether the surroundings of the running task have been cancelled, which that exception tells and which is to be raised on. A
    Cancelled of some other scope, that somebody has kept, is a failure like others."""
    return isinstance(failure, trio.Cancelled) and trio.current_effective_deadline() == -math.inf


@types.coroutine
def noting_suspension(
    coroutine: Coroutine[Any, Any, _Result], note: Callable[[], None]
) -> Generator[Any, Any, _Result]:
    """Await `coroutine`, calling `note` when it suspends for the first time (and never when it does not)."""
    try:
        trap = coroutine.send(None)
    except StopIteration as stop:
        return cast(_Result, stop.value)
    note()
    # What `yield from` does (PEP 380), begun in the middle.
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
    """One of several tasks reads; it also handles what it has read, and another task reads only when that handling has to wait.

    So what needs no waiting costs no switch of tasks, and any number of tasks may wait. Each task reads only while it is the `reader`:

        while turn.reader is not me:
            if not await turn.wait(me): return
    """

    def __init__(self, start_task: Callable[[], None], *, most_idle: int | None = None) -> None:
        """`start_task` starts one more task, if one more is allowed; `most_idle`: how many tasks may wait for the turn (None: all)."""
        self.reader: object | None = None
        self._start_task = start_task
        self._most_idle = most_idle
        self._idle = trio.lowlevel.ParkingLot()

    async def wait(self, task: object) -> bool:
        """Wait for the turn; the task may still not be the reader then. False: enough others wait, the task is to end."""
        if self.reader is None:
            self.reader = task
        elif self._most_idle is not None and len(self._idle) >= self._most_idle:
            return False
        else:
            await self._idle.park()
        return True

    def pass_on(self) -> None:
        """The reader has to wait: let an idle task read, or a new one."""
        self.reader = None
        if self._idle:
            self._idle.unpark()
        else:
            self._start_task()
