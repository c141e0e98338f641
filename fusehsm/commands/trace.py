"""`fusehsm trace`: a listener that prints the events it answers."""

import contextlib
import errno
import fnmatch
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import trio

from fusehsm.backends.base import Group
from fusehsm.backends.opening import open_group
from fusehsm.events import Event
from fusehsm.fanotify.abi import DENY_ERRNOS, mask_names

if TYPE_CHECKING:
    from rich.console import Console

# The errnos of read() for a group that can be used no more. Any other errno is about one event, whose file could not be opened.
_GROUP_IS_GONE = frozenset((errno.EBADF, errno.EINVAL, errno.ENOTCONN))
# The events' descriptors are only for reading their names. Opening a running program's file for writing would fail.
_EVENT_F_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """The command line of `fusehsm trace`. None: the option was not given."""

    #: The file or directory to watch.
    path: str
    #: Names of events; None: the dialect's pre-content events.
    mask: tuple[str, ...] | None = None
    #: inode, children, mount or filesystem.
    mark: str = "mount"
    #: The errno name of a denial.
    deny: str | None = None
    #: The shell pattern of full paths to deny.
    match: str | None = None
    #: Print JSON.
    json: bool = False
    #: auto, kernel or fuse.
    backend: str = "auto"
    #: The number of events after which to end.
    count: int | None = None
    #: The dialect's name; None: the mount's dialect.
    abi: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One event as it is printed. The fields are the keys of `trace --json`."""

    #: Seconds since 1970.
    time: float
    #: The names of the mask's bits, without FAN_.
    event: list[str]
    mask: int
    #: The accessor's process.
    pid: int
    #: The accessor's path.
    path: str
    #: The start of the range in bytes; None for an event without a range.
    offset: int | None
    #: The length of the range in bytes; None for an event without a range.
    count: int | None
    #: ALLOW or DENY; None for an event that needs no answer.
    response: str | None
    #: The name of a denial's errno, else None.
    errno: str | None
    #: Microseconds from reading the event to writing the answer; None for an event that needs no answer.
    latency_us: float | None


@dataclass(frozen=True, slots=True)
class Denial:
    """The events to deny, and the errno of the denial."""

    errno: int
    #: The full paths of the events, as a pattern of fnmatch. `*` matches `/` too.
    pattern: str

    @classmethod
    def parse(cls, deny: str | None, match: str | None) -> "Denial | None":
        """Make it from the texts of --deny (an errno's name) and --match (a pattern). None if neither is given.

        Raises ValueError, with one line as its text, for --match without --deny and for an errno that fanotify cannot deny with.
        """
        if deny is None:
            if match is not None:
                raise ValueError("--match: it selects the events to deny; give --deny ERRNO too")
            return None
        choices = {errno.errorcode[number]: number for number in sorted(DENY_ERRNOS)}
        if deny not in choices:
            raise ValueError(
                f"--deny {deny}: fanotify cannot deny with this errno; choose {', '.join(choices)}"
            )
        return cls(choices[deny], "*" if match is None else match)

    def applies_to(self, path: str) -> bool:
        """Whether an event with this path is denied."""
        return fnmatch.fnmatchcase(path, self.pattern)


class Printer:
    """Writes lines to stdout and flushes each. All modules are imported when it is made.

    A later import could read a watched file (the trace may watch Python's own modules) and then wait for this process itself.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console: Console | None = None
        if not as_json and sys.stdout.isatty():
            import rich.console

            self._console = rich.console.Console(highlight=False, soft_wrap=True)
            with self._console.capture():  # rich loads parts of itself at first use
                self._print_coloured(self._console, Line(0.0, ["é"], 0, 0, "字", 0, 0, "DENY", "EIO", 0.0))

    def print(self, line: Line) -> None:
        """Print one line."""
        if self._console is not None:
            self._print_coloured(self._console, line)
        else:
            print(json.dumps(asdict(line)) if self._as_json else as_text(line), flush=True)

    @staticmethod
    def _print_coloured(console: "Console", line: Line) -> None:
        from rich.text import Text

        call, separator, result = as_text(line).rpartition(" = ")
        if not separator:
            call, result = result, ""
        clock, pid, rest = call.split(" ", 2)
        colour = {"ALLOW": "green", "DENY": "red"}.get(line.response or "", "")
        console.print(
            Text.assemble(
                (clock, "dim"), " ", (pid, "cyan"), " ", rest, (separator, "dim"), (result, colour)
            ),
            end="\n",
        )


def as_text(line: Line) -> str:
    """One line in the style of strace(1): `12:00:00.000000 4711 PRE_ACCESS("/srv/file", 4096, 8192) = ALLOW <35.1 us>`."""
    whole, fraction = divmod(line.time, 1)
    clock = time.strftime("%H:%M:%S", time.localtime(whole)) + f"{fraction:.6f}"[1:]
    arguments = [quote(line.path)] if line.path else []
    if line.offset is not None:
        arguments += [str(line.offset), str(line.count)]
    text = f"{clock} {line.pid} {'|'.join(line.event)}({', '.join(arguments)})"
    if line.response is None:
        return text
    result = line.response if line.errno is None else f"{line.response} {line.errno}"
    return f"{text} = {result} <{line.latency_us:.1f} us>"


def quote(path: str) -> str:
    """A path between quotation marks, with escapes for special characters and for bytes that are not UTF-8."""
    return '"' + "".join(_quote_character(character) for character in path) + '"'


def _quote_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8 (os.fsdecode)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def trace(options: TraceOptions) -> int:
    """Listen and print until `count` events, SIGINT or SIGTERM. Returns the exit code.

    Raises ValueError for bad usage, and OSError with one line if it cannot listen or if the mount ends.
    """
    denial = Denial.parse(options.deny, options.match)
    printer = Printer(options.json)
    trio.run(_listen_until_signal, options, denial, printer)
    return 0


async def _listen_until_signal(options: TraceOptions, denial: Denial | None, printer: Printer) -> None:
    failure: Exception | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def end_by_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(end_by_signal)
            try:
                await _listen(options, denial, printer)
            except (
                OSError,
                ValueError,
            ) as error:  # raised below: the nursery would wrap it in an exception group
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _listen(options: TraceOptions, denial: Denial | None, printer: Printer) -> None:
    async with open_group(
        options.path,
        options.mask,
        backend=options.backend,
        dialect=options.abi,
        mark=options.mark,
        event_f_flags=_EVENT_F_FLAGS,
    ) as group:
        print("ready", file=sys.stderr, flush=True)
        printed = 0
        while options.count is None or printed < options.count:
            await group.wait_readable()
            for line in _answer_batch(group, denial):
                if options.count is None or printed < options.count:
                    printer.print(line)
                    printed += 1


def _answer_batch(group: Group, denial: Denial | None) -> Iterator[Line]:
    """Answer all queued events, then yield their lines: an accessor does not wait for our output."""
    try:
        events = group.take_events()
    except BlockingIOError:
        return
    except OSError as error:
        if error.errno in _GROUP_IS_GONE:
            raise
        print(
            f"fusehsm: an access was denied: its file cannot be opened: {os.strerror(error.errno or 0)}",
            file=sys.stderr,
        )
        return
    taken = time.perf_counter()
    yield from [_answer(group, event, denial, taken) for event in events]


def _answer(group: Group, event: Event, denial: Denial | None, taken: float) -> Line:
    now = time.time()
    response = error_name = latency = None
    if event.mask & group.permission_events:
        error = denial.errno if denial is not None and denial.applies_to(event.path) else 0
        with contextlib.suppress(FileNotFoundError):  # the accessor was killed meanwhile
            group.answer(event, error)
        latency = (time.perf_counter() - taken) * 1e6
        response = "DENY" if error else "ALLOW"
        error_name = errno.errorcode[error] if error else None
    if event.fd >= 0:
        os.close(event.fd)
    return Line(
        time=now,
        event=mask_names(event.mask, group.dialect),
        mask=event.mask,
        pid=event.pid,
        path=event.path,
        offset=event.offset,
        count=event.count,
        response=response,
        errno=error_name,
        latency_us=latency,
    )
