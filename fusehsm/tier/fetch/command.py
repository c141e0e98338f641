"""`fusehsm fetch STORE DST`: serve the stubs of DST from a store, in place, until a signal ends it."""

import errno
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import trio

from fusehsm.backends.base import AT_FDCWD, Group
from fusehsm.backends.opening import DEFAULT_FLAGS, open_group
from fusehsm.control import socket as control_socket
from fusehsm.fanotify.abi import (
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_MOUNT,
    FAN_REPORT_FD_ERROR,
    parse_mask,
)
from fusehsm.handler import GROUP_IS_GONE, serve
from fusehsm.linux import syscalls
from fusehsm.linux.beneath import directories
from fusehsm.linux.mountinfo import read_mounts
from fusehsm.linux.signals import Interrupted, Interruption, interruptible
from fusehsm.text import LineFormatter, shown
from fusehsm.tier.fetch.access_list import Recorder, Touched, read_list, warm_up
from fusehsm.tier.fetch.catalog import where
from fusehsm.tier.fetch.destination import Destination, destination
from fusehsm.tier.fetch.durability import INTERVAL, Keeper
from fusehsm.tier.fetch.evict import Evictor, keep_below
from fusehsm.tier.fetch.failures import passed_over
from fusehsm.tier.fetch.handler import Fetcher, Policy, Totals
from fusehsm.tier.fetch.inventory import Look, has_unbelieved
from fusehsm.tier.fetch.protocol import socket_name
from fusehsm.tier.fetch.server import FetchServer
from fusehsm.tier.fetch.turns import PATIENCE, Stalled, watched
from fusehsm.tier.stores.base import Store
from fusehsm.tier.stores.open import expect_apart, open_store
from fusehsm.tier.stubs.tree import Tree
from fusehsm.tier.text import Progress, parse_seconds, parse_size, size_text

_EVENTS: Final = ("PRE_ACCESS", "MODIFY")
# On the real kernel only the last close of a file tells of a write through a mapping. A mount makes MODIFY of it.
_EVENTS_OF_KERNEL: Final = (*_EVENTS, "CLOSE_WRITE")
_DENIALS: Final = {"EIO": errno.EIO, "EAGAIN": errno.EAGAIN}
_SMALLEST_BLOCK: Final = 4096
_LAST_LOOK: Final = 1.0  # seconds: repeated accesses must not keep fetch from ending
_OTHER_FILES: Final = 32  # descriptors, those of a store over the network included
# On the real kernel an ignore mark costs one system call. On a mount it costs more than the two events of a file that is read once.
_IGNORE_AFTER: Final = 2
_LINE_INTERVAL: Final = 0.2  # seconds between two states of the line that tells the progress
_LONGEST_PATH: Final = 60  # letters of a path in it
_OLD_MARKS: Final = (
    "stubs whose marks were written by an ordinary user or an older fusehsm are refused; end fetch and run `fusehsm populate {} {}` as root, "
    "which takes right marks over without fetching"
)
_STANDSTILL: Final = 20.0  # seconds that the marking of directories may take for one of them
_HANDLERS: Final = 1000  # most events that wait at once

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """The command line of `fusehsm fetch`. Sizes and times are texts, as the user writes them."""

    # Path or URL of the store.
    store: str
    # The directory with the stubs.
    destination: str
    # "auto", "kernel" or "fuse".
    backend: str = "auto"
    # Size of a block, a power of two.
    block_size: str = "1M"
    # The largest prefetch window ahead of a reader.
    read_ahead: str = "32M"
    # Most requests to the store at once.
    jobs: int = 16
    # Time after which an access is refused if the store does not answer.
    deadline: str = "60s"
    # Name of the errno of a refused access.
    on_error: str = "EIO"
    # Bytes a second to read from the store, None without limit.
    limit_rate: str | None = None
    # Disk space of the stubs above which content is evicted, None without limit.
    max_size: str | None = None
    # Path of the list of accesses to write.
    record: str | None = None
    # Path of the list of accesses to fetch ahead.
    prefetch: str | None = None
    # Options for `fusehsm mount`.
    mount_arguments: tuple[str, ...] = ()
    # Seconds between two syncs (Keeper).
    keep_interval: float = INTERVAL

    def policy(self) -> Policy:
        """The parsed options. Raises ValueError with one line for an impossible value."""
        block_size = parse_size("--block-size", self.block_size)
        if block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
            raise ValueError(f"--block-size {self.block_size}: must be a power of two of at least 4K")
        if self.on_error not in _DENIALS:
            raise ValueError(f"--on-error {self.on_error}: choose one of {', '.join(_DENIALS)}")
        if self.jobs < 1:
            raise ValueError(f"--jobs {self.jobs}: at least one request must be allowed")
        rate = None if self.limit_rate is None else parse_size("--limit-rate", self.limit_rate)
        if rate == 0:
            raise ValueError(f"--limit-rate {self.limit_rate}: nothing would ever be fetched")
        return Policy(
            block_size=block_size,
            prefetch_window=parse_size("--read-ahead", self.read_ahead),
            deadline=parse_seconds("--deadline", self.deadline),
            denial=_DENIALS[self.on_error],
            rate=rate,
            connections=self.jobs,
        )


@dataclass(frozen=True, slots=True)
class _Wishes:
    """The tasks beside serving."""

    # Bytes on the disk above which content is evicted.
    max_size: int | None
    # Writes the list of --record.
    recorder: Recorder | None
    # The ranges of --prefetch.
    warm: list[Touched] | None
    # Seconds between two syncs.
    keep_interval: float


def fetch(options: FetchOptions) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP. Returns the exit code.

    Prints `ready` on stderr (and notifies a service manager) once accesses are served, and a summary at the end. Raises ValueError for bad usage.
    Raises OSError with one line for every other error, also if the mount or the group is gone. After an error a mount stays, and refuses access to
    missing content.
    """
    policy = options.policy()
    max_size = None if options.max_size is None else parse_size("--max-size", options.max_size)
    handler = StderrHandler()
    handler.setFormatter(LineFormatter("fusehsm: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Not for the libraries of stores: at this level botocore logs where it found credentials.
    logging.getLogger("fusehsm").setLevel(logging.INFO)
    logging.captureWarnings(True)
    warm = None if options.prefetch is None else read_list(options.prefetch)
    line = None
    try:
        with interruptible() as interruption, suppress(Interrupted), ExitStack() as stack:
            store = stack.enter_context(open_store(options.store))
            expect_apart(store, options.destination)
            recorder = None
            if options.record is not None:
                _expect_outside(options.record, os.path.realpath(options.destination))
                recorder = stack.enter_context(Recorder(options.record, policy.block_size))
            # All checks are done. From here on only an ordered end unmounts.
            place = stack.enter_context(
                destination(options.destination, options.backend, options.mount_arguments)
            )
            if recorder is not None:
                recorder.begin()
            if place.backend == "fuse":
                policy = replace(policy, ignore_after=_IGNORE_AFTER)
            policy = replace(policy, handlers=_handlers(policy))
            wishes = _Wishes(max_size, recorder, warm, options.keep_interval)
            started = time.monotonic()
            totals = trio.run(_serve, store, place, policy, wishes, interruption)
            line = summary(options, totals, time.monotonic() - started)
    finally:
        # Outside the body: a failed write of the summary is no error of the serving.
        if line is not None:
            print(line, flush=True)
    return 0


async def _serve(
    store: Store, place: Destination, policy: Policy, wishes: _Wishes, interruption: Interruption
) -> Totals:
    tree = Tree.of(place.root_fd)
    await _warn_of_old_marks(store, place, tree)
    failures: list[OSError] = []
    events = _EVENTS_OF_KERNEL if place.backend == "kernel" else _EVENTS
    # A filesystem mark also covers the file system's other mounts, and mounts in other namespaces (containers), which have no marks of their own.
    mark = "filesystem" if place.is_whole and place.path != "/" else "mount"
    # With FAN_REPORT_FD_ERROR a file that cannot be opened does not look like an empty queue (_refusing_the_rest).
    flags = DEFAULT_FLAGS | FAN_REPORT_FD_ERROR
    async with (
        open_group(place.path, events, backend=place.backend, flags=flags, mark=mark) as group,
        _refusing_the_rest(group),
    ):
        keeper = None
        try:
            async with trio.open_nursery() as nursery:
                if place.backend == "kernel":
                    mask = parse_mask(events, group.dialect)
                    if mark == "mount":
                        await _watch_directories(group, place.root_fd, mask)
                    await _watch_mounts_below(group, place.path, mask)
                fetcher = Fetcher(store, place.path, tree, policy, nursery, wishes.recorder)
                fetcher.group = group
                keeper = Keeper(fetcher, place.root_fd, wishes.keep_interval)
                evictor = Evictor(fetcher, place, group)

                async def serve_group() -> None:
                    try:
                        await serve(group, fetcher, limit=policy.handlers)
                    except OSError as error:
                        failures.append(error)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(serve_group)
                nursery.start_soon(fetcher.turns.watch)
                nursery.start_soon(keeper.keep)
                nursery.start_soon(show_progress, fetcher)
                await nursery.start(_serve_socket, place, FetchServer(fetcher, evictor, place.root_fd))
                if wishes.max_size is not None:
                    nursery.start_soon(keep_below, evictor, wishes.max_size, _log.warning)
                if wishes.warm is not None:
                    nursery.start_soon(warm_up, place.path, wishes.warm)
                means = "the kernel's own events" if place.backend == "kernel" else "a mount of fusehsm"
                print(f"fusehsm: serving {shown(place.path)} from {store.name} by {means}", file=sys.stderr)
                print("ready", file=sys.stderr, flush=True)
                say_ready()
                try:
                    await interruption.watch()
                except Interrupted:
                    nursery.cancel_scope.cancel()
        finally:
            # At every end, while accesses still wait for the group.
            if keeper is not None:
                with trio.CancelScope(shield=True):
                    await keeper.rest()
    if failures:
        raise failures[0]
    return fetcher.totals


def _expect_outside(record: str, destination: str) -> None:
    """Raise ValueError if the list is in the destination: fetch would wait for itself when it writes the list."""
    place = os.path.realpath(record)
    if os.path.commonpath((place, destination)) == destination:
        raise ValueError(f"--record {shown(record)}: lies in the destination; choose a place outside")


def _handlers(policy: Policy) -> int:
    """The number of events to answer at once: each takes up to four descriptors. Raises the limit of descriptors (RLIMIT_NOFILE) to its maximum."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return _HANDLERS
    return max(min(_HANDLERS, (soft - _OTHER_FILES - policy.connections) // 4), 1)


@asynccontextmanager
async def _refusing_the_rest(group: Group) -> AsyncIterator[None]:
    """At the end, refuse the events that wait. The real kernel allows them when the group is closed, and stubs would be read as zeros."""
    try:
        yield
    finally:
        end = time.monotonic() + _LAST_LOOK
        while time.monotonic() < end:
            try:
                events = group.take_events()
            except BlockingIOError:
                break  # no event is left
            except OSError as error:
                if error.errno in GROUP_IS_GONE:
                    break
                continue  # an event whose file cannot be opened is refused already
            for event in events:
                if event.fd < 0:
                    continue
                os.close(event.fd)
                if event.mask & group.permission_events:
                    with suppress(OSError):  # the accessor has been killed
                        group.answer(event, errno.EIO)


async def _warn_of_old_marks(store: Store, place: Destination, tree: Tree) -> None:
    look = Look()
    try:
        # In a thread: a user can keep a directory locked.
        is_old = await watched(
            partial(has_unbelieved, place.root_fd, tree, look), lambda: look.count, PATIENCE
        )
    except Stalled:
        look.is_abandoned = True  # the first access to such a stub says the same
        return
    if is_old:
        _log.warning("%s", _OLD_MARKS.format(store.name, shown(place.path)))


async def _watch_directories(group: Group, root_fd: int, mask: int) -> None:
    """Mark each directory for its files. Such a mark holds in every mount and namespace. A mount mark holds only in its own mount: containers
    get copies of mounts, without marks."""
    complained = False
    marked = 0

    def complain(error: OSError) -> None:
        nonlocal complained
        if not complained:
            complained = True
            what = "cannot be marked; in other mounts and namespaces its files, and those of other such directories, are read as zeros"
            _log.warning("%s: %s", where(error), what)

    def mark_all() -> None:
        nonlocal marked
        for fd, _ in directories(root_fd, complain):
            marked += 1
            try:
                syscalls.fanotify_mark(group.fileno(), FAN_MARK_ADD, mask | FAN_EVENT_ON_CHILD, fd)
            except OSError as error:
                complain(OSError(error.errno, error.strerror, os.readlink(f"/proc/self/fd/{fd}")))

    try:
        # In a thread: a user can keep a directory locked.
        await watched(mark_all, lambda: marked, _STANDSTILL)
    except Stalled:
        why = "a directory in it does not answer: another process holds its lock; end that process (fuser shows it), and start fetch again"
        raise OSError(errno.EBUSY, why, os.readlink(f"/proc/self/fd/{root_fd}")) from None


async def _watch_mounts_below(group: Group, path: str, mask: int) -> None:
    """Mark the mounts below a directory. On the real kernel each mount needs its own mark; a mount of fusehsm shows all of them as one."""
    prefix = path.rstrip("/") + "/"
    for mount in list(read_mounts()):
        if mount.mount_point.startswith(prefix) and not mount.is_fusehsm:
            try:
                await group.mark(FAN_MARK_ADD | FAN_MARK_MOUNT, mask, AT_FDCWD, mount.mount_point)
            except OSError as error:
                _log.warning(
                    "%s: another file system, which cannot be watched (%s): stubs there are read as zeros",
                    shown(mount.mount_point),
                    error.strerror,
                )


async def _serve_socket(
    place: Destination, server: FetchServer, *, task_status: trio.TaskStatus[None]
) -> None:
    name = await trio.to_thread.run_sync(socket_name, place.path)
    with control_socket.listening_as(name) as listener:
        task_status.started()
        await server.serve(listener)


def summary(options: FetchOptions, totals: Totals, seconds: float) -> str:
    """The line at the end."""
    parts = [
        f"{totals.events:,} events",
        f"{size_text(totals.fetched)} fetched in {totals.requests:,} requests ({size_text(totals.prefetched)} ahead of its readers)",
        f"{totals.completed:,} files complete",
    ]
    if totals.retries:
        parts.append(f"{totals.retries:,} retries")
    if totals.denied:
        parts.append(f"{totals.denied:,} accesses refused")
    return f"served {shown(options.destination)} for {seconds:.1f} s: {', '.join(parts)}"


def say_ready() -> None:
    """Send READY=1 to the service manager (sd_notify(3), Type=notify of systemd.service(5)).

    Does nothing without NOTIFY_SOCKET, or if the manager does not listen.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker, suppress(OSError):
        speaker.setblocking(False)
        speaker.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)


async def show_progress(fetcher: Fetcher) -> None:
    """Keep the line up to date until the terminal fails. Returns at once if stderr is no terminal."""
    if not sys.stderr.isatty():
        return
    meter = Meter(fetcher)
    with passed_over("the progress line ends", _log), Progress(meter.line) as progress:
        while True:
            progress.tick()
            await trio.sleep(_LINE_INTERVAL)


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
