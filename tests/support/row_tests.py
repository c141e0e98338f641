"""Small help for tests that are tables."""

from collections.abc import Callable
from typing import Protocol


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def row_names(row: _Named) -> str:
    """A test's id: its row's name."""
    return row.name.replace(" ", "-")


def error_of(function: Callable[..., object], *arguments: object, **more: object) -> int:
    """The errno that a call fails with; 0 if it does not."""
    try:
        function(*arguments, **more)
    except OSError as error:
        return error.errno or 0
    return 0
