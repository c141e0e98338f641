"""The real kernel behind the tables and scenarios: groups made with the system calls, accessors that are processes."""

import fcntl
import os
import re
import select
import shutil
import stat
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fusehsm.conform.accessor import PATIENCE, Accessor, AccessorDied, PendingCall
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_ALLOW,
    FAN_CLASS_CONTENT,
    FAN_CLASS_MASK,
    FAN_CLASS_PRE_CONTENT,
    FAN_MARK_ADD,
    FAN_MARK_FLUSH,
    FAN_NONBLOCK,
    FAN_OPEN,
    LINUX_6_14,
    RawEvent,
    decode_events,
    encode_response,
)
from fusehsm.linux.syscalls import fanotify_init, fanotify_mark
from tests.support.group_scenarios import QUEUE_LIMIT

MakeAccessor = Callable[[], Accessor]
P = LINUX_6_14.pre_access


class KernelGroup:
    """A group of the running kernel, non-blocking. close() releases the waiting accesses."""

    def __init__(self, flags: int = FAN_CLASS_PRE_CONTENT, event_f_flags: int = os.O_RDONLY) -> None:
        self.fd = fanotify_init(flags | FAN_NONBLOCK, event_f_flags | os.O_CLOEXEC)

    def mark(self, flags: int, mask: int, path: Path) -> None:
        fanotify_mark(self.fd, flags, mask, path=bytes(path))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def queued_bytes(self) -> int:
        (length,) = struct.unpack("=i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))
        return int(length)

    def wait_queued(self, length: int) -> None:
        """Until that many bytes are queued, by FIONREAD."""
        poll = select.epoll()
        try:
            # Edge-triggered: told for every event, also when others are queued already.
            poll.register(self.fd, select.EPOLLIN | select.EPOLLET)
            while self.queued_bytes < length:
                assert poll.poll(PATIENCE), "no event came"
        finally:
            poll.close()

    def marks(self) -> list[tuple[str, int, int, int, int]]:
        """(type, inode, flags, mask, ignored mask) of every mark, from /proc/self/fdinfo."""
        pattern = r"^fanotify (ino|mnt_id|sdev):(\w+) .*?mflags:(\w+) mask:(\w+) ignored_mask:(\w+)"
        types = {"ino": "inode", "mnt_id": "mount", "sdev": "filesystem"}
        found = []
        for line in Path(f"/proc/self/fdinfo/{self.fd}").read_text().splitlines():
            if match := re.match(pattern, line):
                kind, number, *rest = match.groups()
                flags, mask, ignored = (int(text, 16) for text in rest)
                found.append((types[kind], int(number, 16) if kind == "ino" else 0, flags, mask, ignored))
        return sorted(found)

    def events(self) -> list[RawEvent]:
        """What is queued now, possibly nothing."""
        with suppress(BlockingIOError):
            return decode_events(LINUX_6_14, os.read(self.fd, 1 << 16))
        return []


def allow_until(done: Callable[[], bool], *groups: KernelGroup) -> list[list[RawEvent]]:
    """Allow every event of these groups until `done`; the events of each."""
    seen: list[list[RawEvent]] = [[] for _ in groups]
    poll = select.poll()
    for group in groups:
        poll.register(group.fd, select.POLLIN)
    while True:
        finished = done()
        for group, events in zip(groups, seen, strict=True):
            for event in group.events():
                events.append(event)
                if event.mask & LINUX_6_14.permission:
                    os.write(group.fd, encode_response(event.fd, FAN_ALLOW))
                os.close(event.fd)
        if finished:
            return seen
        poll.poll(1)  # milliseconds: no descriptor here tells of the end of what makes the events


class KernelReading:
    """A process that waits in pread(2)."""

    def __init__(self, accessor: Accessor, call: PendingCall, tid: int) -> None:
        self.pid, self.tid = accessor.pid, tid
        self._accessor, self._call = accessor, call

    def result(self) -> int:
        try:
            self._call.result()
        except OSError as error:
            assert error.errno is not None
            return error.errno
        return 0

    def kill(self) -> None:
        self._accessor.kill()
        self._accessor.wait_exit()


class Scene:
    """What groups watch in the scenarios: a file, another file, and a running program. Accessors are kept for the next scenario."""

    def __init__(self, place: Path, make_accessor: MakeAccessor) -> None:
        self.place = place
        self.file, self.other, self.busy = place / "file", place / "other", place / "busy"
        self.file.write_bytes(bytes(8192))
        self.other.write_bytes(b"")
        sleep = shutil.which("sleep")
        assert sleep is not None
        shutil.copy(sleep, self.busy)
        self._make_accessor = make_accessor
        self._idle: list[Accessor] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the busy file is being executed."""
        program = subprocess.Popen([self.busy, "infinity"], stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            program.kill()
            program.wait()

    def accessor(self) -> Accessor:
        return self._idle.pop() if self._idle else self._make_accessor()

    def give_back(self, accessor: Accessor) -> None:
        self._idle.append(accessor)


class KernelSide:
    """One real group in a Scene. It is closed with `stack`; what waits for its accessors to come back goes with `after`.

    The busy file is being executed when event fds are opened for writing, which is when that matters.
    """

    def __init__(
        self, scene: Scene, after: ExitStack, stack: ExitStack, flags: int, event_f_flags: int
    ) -> None:
        self._scene = scene
        self._after = after
        self._stack = stack
        self._group = KernelGroup(flags, event_f_flags)
        stack.callback(self._group.close)
        self._event_fds: set[int] = set()
        stack.callback(self._close_event_fds)
        if event_f_flags & os.O_ACCMODE != os.O_RDONLY:
            # Before anything is marked: executing it is an access too.
            after.enter_context(scene.running())
        content = flags & FAN_CLASS_MASK == FAN_CLASS_CONTENT
        for path in (scene.file, scene.busy):
            self._group.mark(FAN_MARK_ADD, FAN_ACCESS_PERM if content else P, path)
        self._group.mark(FAN_MARK_ADD, FAN_OPEN, scene.other)

    def _close_event_fds(self) -> None:
        for fd in self._event_fds:
            os.close(fd)

    def _begin(self, path: Path) -> KernelReading:
        accessor = self._scene.accessor()
        descriptor = accessor.call("open", str(path), os.O_RDONLY)
        call = accessor.start("pread", descriptor, 100, 0)

        def done_with() -> None:
            try:
                with suppress(OSError):
                    call.result()
                accessor.call("close", descriptor)
            except (AccessorDied, OSError):
                return  # killed by its test
            self._scene.give_back(accessor)

        self._after.callback(done_with)
        return KernelReading(accessor, call, accessor.pid)

    def start_reading(self, *, busy: bool = False) -> KernelReading:
        path = self._scene.busy if busy else self._scene.file
        queued = self._group.queued_bytes
        reading = self._begin(path)
        self._group.wait_queued(queued + 24)
        return reading

    def read_unasked(self) -> int:
        return self._begin(self._scene.file).result()

    def notify(self, *, busy: bool = False) -> None:
        path = self._scene.other
        if busy:
            path = self._scene.busy
            self._group.mark(FAN_MARK_ADD, FAN_OPEN, path)
        os.close(os.open(path, os.O_RDONLY))

    def fill_queue(self) -> None:
        # The kernel merges equal notifications: each open goes by a name of its own.
        links = self._scene.place / "links"
        if not links.exists():
            links.mkdir()
            for number in range(QUEUE_LIMIT):
                os.link(self._scene.other, links / str(number))
        for number in range(QUEUE_LIMIT):
            os.close(os.open(links / str(number), os.O_RDONLY))

    def unmark(self) -> None:
        self._group.mark(FAN_MARK_FLUSH, 0, self._scene.file)

    def read(self, size: int = 4096) -> bytes:
        data = os.read(self._group.fd, size)
        for event in decode_events(LINUX_6_14, data):
            for descriptor in (event.fd, event.pidfd):
                if descriptor is not None and descriptor >= 0:
                    self._event_fds.add(descriptor)
        return data

    def write(self, data: bytes) -> int:
        return os.write(self._group.fd, data)

    def close_event_fd(self, fd: int) -> None:
        self._event_fds.remove(fd)
        os.close(fd)

    @property
    def queued_bytes(self) -> int:
        return self._group.queued_bytes

    def close(self) -> None:
        self._group.close()


def make_targets(place: Path) -> dict[str, Path]:
    """One object of every kind that marks are tried on, under `place`."""
    targets = {name: place / name for name in ("file", "dir", "fifo", "device", "socket", "link")}
    targets["file"].write_bytes(b"x")
    targets["dir"].mkdir()
    os.mkfifo(targets["fifo"])
    os.mknod(targets["device"], 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(targets["socket"], 0o600 | stat.S_IFSOCK)
    targets["link"].symlink_to("file")
    return targets
