"""Unexpected errors: each is one line, and does not end the serving."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fusehsm.tier.fetch.catalog import where


def in_a_line(error: BaseException) -> str:
    """An error in one line. If it is no OSError, the line also names the place in the code, for a bug report."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        text = where(error)
    else:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f" ({_place(trace.tb_frame.f_code.co_filename, trace.tb_lineno)})"
        text = f"{type(error).__name__}: {error}{place}"
    return " ".join(text.split())


def _place(filename: str, line: int) -> str:
    return f"{os.path.basename(filename)}:{line}"


@contextmanager
def passed_over(what: str, log: logging.Logger) -> Iterator[None]:
    """Log an error of the body in one line that begins with `what`, and go on. For tasks beside the serving, which they must never end."""
    try:
        yield
    except Exception as error:
        log.error("%s: %s", what, in_a_line(error))
