"""Noticing that a coroutine has to wait."""

import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar, cast

_Result = TypeVar("_Result")


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
