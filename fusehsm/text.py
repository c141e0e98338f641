"""Text that others have named, made safe to print in one line."""

import logging
import os
from types import TracebackType
from typing import TypeAlias

_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


def shown(path: str) -> str:
    """A path or a message, for one line: undecodable bytes, control characters and marks of direction as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


class LineFormatter(logging.Formatter):
    """Formats a log record as one line, whatever names it contains; the lines of a traceback follow."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: _ExcInfo) -> str:
        return "\n".join(map(shown, super().formatException(ei).split("\n")))
