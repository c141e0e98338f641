"""The output of a running fetch: a line on a terminal that changes, log lines, and the message that it serves (sd_notify(3))."""

import logging
import os
import socket
import sys
from contextlib import suppress
from typing import Final

import trio

from fusehsm.text import shown
from fusehsm.tier.fetch.errors import passed_over
from fusehsm.tier.fetch.handler import Fetcher
from fusehsm.tier.text import Progress, size_text

# The message to the service manager that fetch serves now (sd_notify(3), Type=notify of systemd.service(5)).


def say_ready() -> None:
    """Send READY=1 to the service manager. Does nothing without NOTIFY_SOCKET, or if the manager does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker, suppress(OSError):
        speaker.setblocking(False)
        speaker.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)


_INTERVAL: Final = 0.2  # seconds
_LONGEST_PATH: Final = 60  # letters

_log = logging.getLogger(__name__)


async def show_progress(fetcher: Fetcher) -> None:
    """Keep the line up to date until the terminal fails. Returns at once if stderr is no terminal."""
    if not sys.stderr.isatty():
        return
    meter = Meter(fetcher)
    with passed_over("no more is shown of how far it is", _log), Progress(meter.line) as progress:
        while True:
            progress.tick()
            await trio.sleep(_INTERVAL)


class Meter:
    """Makes the line; keeps the values that it needs for the rate."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._seconds = 0.0
        self._fetched = 0
        self._rate = 0.0

    def line(self, seconds: float) -> str:
        """The line after `seconds` of the run."""
        totals = self._fetcher.totals
        if seconds > self._seconds:
            rate = (totals.fetched - self._fetched) / (seconds - self._seconds)
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
            self._seconds, self._fetched = seconds, totals.fetched
        text = f"{size_text(totals.fetched)} fetched"
        if not self._fetcher.under_way:
            return f"{text}, nothing under way"
        text += f", {size_text(round(self._rate))}/s, {len(self._fetcher.under_way):,} requests under way"
        file = next(iter(self._fetcher.under_way.values()))
        share = 100 * file.resident // file.size if file.size else 100
        path = shown(file.path)
        return f"{text}: {path if len(path) <= _LONGEST_PATH else '...' + path[-_LONGEST_PATH:]} ({share} %)"


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to the present sys.stderr. The changing line replaces sys.stderr, so that log lines do not end up in the middle of it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr
