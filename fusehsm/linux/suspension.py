"""Noticing that a coroutine has to wait, and that what ends it is its surroundings' end."""

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
