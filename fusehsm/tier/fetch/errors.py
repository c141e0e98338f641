"""Errors that nobody expected: each as one line, and kept from ending what goes on beside it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fusehsm.tier.fetch.catalog import where


def in_a_line(error: BaseException) -> str:
    """What went wrong, in one line. For what is no OSError it names the place in the code as well, which a report of the mistake needs."""
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
    """Log an error of the body in one line that begins with `what`, and go on: for what is done beside the serving, which it must never end."""
    try:
        yield
    except Exception as error:
        log.error("%s: %s", what, in_a_line(error))
