"""A mirror: it fills stubs, when a process touches them, from the files of the same names in another directory.

Inside the mount's own process:

    export MIRROR_ORIGIN=/srv/origin MIRROR_ROOT=/mnt
    fusehsm mount /srv/stubs /mnt --handler examples.mirror:handler --handler-path .

or as a separate listener, for the real kernel or for a mount of fusehsm:

    python -m examples.mirror /srv/origin /mnt

MIRROR_ROOT is the directory in which accessors see the stubs: the mount point, or on the real kernel the stubs' own directory.
A hole in a stub means "not fetched yet", so the file system must report holes (ext4, xfs, btrfs and tmpfs do). A restarted mirror goes on where the
last one stopped. fanotify does not report two things, so the mirror cannot see them: a stub that is renamed before its first use, and a truncation
that happens exactly during a fill.
"""

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

import fusehsm

PAGE = os.sysconf("SC_PAGESIZE")
CHUNK = 256 * PAGE
FS_IOC_GETVERSION = 0x80087601  # linux/fs.h; a reused inode number has another version


@dataclass(slots=True, eq=False)
class Inode:
    """The state of one stub."""

    # The path of the file with its content.
    origin: str
    # The smallest size that the stub ever had, in bytes: content beyond it was made here and does not come from the origin.
    limit: int
    # The numbers of the pages that must not be filled any more, because they were filled or written.
    settled: set[int] = field(default_factory=set)
    # Held during a fill: truncations of the file wait for its end.
    lock: trio.Lock = field(default_factory=trio.Lock)


class Mirror:
    """An event handler that fills stubs under `root` from `origin`. It counts events and fetched bytes."""

    def __init__(self, origin: str, root: str) -> None:
        self.origin, self.root = os.path.abspath(origin), os.path.abspath(root)
        self.inodes: dict[tuple[int, int, bytes], Inode] = {}
        self.events = self.fetched = 0

    async def __call__(self, event: fusehsm.Event) -> None:
        """Fill the missing part of the event's range. An OSError denies the access."""
        self.events += 1
        status = os.fstat(event.fd)
        if event.offset is None or event.count is None or not stat.S_ISREG(status.st_mode):
            return
        key = (status.st_dev, status.st_ino, version(event.fd))
        inode = self.inodes.get(key) or Inode(self.origin_of(event.path, status), status.st_size)
        self.inodes[key] = inode
        # Every call that makes a file grow makes an event first, so growth after a truncation cannot hide the truncation from this line.
        inode.limit = min(inode.limit, status.st_size)
        # A clone of a whole file has the empty range at 0. Ranges are not clipped to the end of the file (docs/facts.md, section 9).
        end = min(event.offset + event.count or inode.limit, inode.limit)
        if inode.settled.issuperset(pages_of(event.offset, end)) and not inode.lock.locked():
            return
        async with inode.lock:
            for start in range(event.offset, end, CHUNK):
                self.fill(event.fd, inode, start, min(start + CHUNK, end, inode.limit))
                await trio.lowlevel.checkpoint()

    def fill(self, event_fd: int, inode: Inode, start: int, end: int) -> None:
        """Fill the pages of [start, end) that were not filled or written yet."""
        for hole, hole_end in holes(event_fd, start, end):
            missing = [page for page in pages_of(hole, hole_end) if page not in inode.settled]
            for _, run in itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
                pages = [page for _, page in run]
                first, last = max(hole, pages[0] * PAGE), min(hole_end, (pages[-1] + 1) * PAGE)
                self.fetched += copy(inode.origin, event_fd, first, last)
        inode.settled.update(pages_of(start, end))

    def origin_of(self, path: str, status: os.stat_result) -> str:
        """The file of the origin for the stub at `path`. Raises OSError EIO if `path` is not under the root."""
        if not status.st_nlink:
            path = path.removesuffix(
                " (deleted)"
            )  # the kernel adds this to the path of an open file without a name
        relative = os.path.relpath(path, self.root)
        if relative.startswith("../"):
            raise OSError(errno.EIO, f"is not under {self.root}", path)
        return os.path.join(self.origin, relative)


def pages_of(start: int, end: int) -> range:
    """The numbers of the pages that the bytes [start, end) touch."""
    return range(start // PAGE, -(-end // PAGE))


def copy(origin: str, event_fd: int, start: int, end: int) -> int:
    """Copy the bytes [start, end) of `origin` into the event's file, but never past its end. Returns the number of bytes.

    Raises OSError EIO if the origin is shorter, ENOSPC if the bytes do not fit.
    """
    with open(origin, "rb", buffering=0) as source:
        data = os.pread(source.fileno(), end - start, start)
    if len(data) < end - start:
        raise OSError(errno.EIO, "shorter than its stub", origin)
    before = os.fstat(event_fd)
    data = data[: max(0, before.st_size - start)]
    if data and os.pwrite(event_fd, data, start) < len(data):
        raise OSError(errno.ENOSPC, "no room to fill the stub of", origin)
    os.utime(event_fd, ns=(before.st_atime_ns, before.st_mtime_ns))  # a fill is no modification
    return len(data)


def holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The holes of a file within the bytes [start, end)."""
    while (hole := seek(fd, start, os.SEEK_HOLE, end)) < end:
        start = seek(fd, hole, os.SEEK_DATA, end)
        yield hole, start


def seek(fd: int, start: int, whence: int, end: int) -> int:
    """lseek(2). Returns `end` if there is no such place before `end`."""
    try:
        return min(os.lseek(fd, start, whence), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end


def version(fd: int) -> bytes:
    """The inode's generation; empty on a file system without generations (it does not reuse inode numbers)."""
    try:
        return fcntl.ioctl(fd, FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return b""


@functools.cache
def from_environment() -> Mirror:
    """The mirror that MIRROR_ORIGIN and MIRROR_ROOT describe."""
    return Mirror(os.environ["MIRROR_ORIGIN"], os.environ["MIRROR_ROOT"])


async def handler(event: fusehsm.Event) -> None:
    """For `fusehsm mount --handler examples.mirror:handler`."""
    await from_environment()(event)


async def listen(origin: str, root: str) -> None:
    """Serve the stubs under `root` until Ctrl-C."""
    async with fusehsm.open_group(root) as group:
        print("ready", file=sys.stderr, flush=True)
        await fusehsm.serve(group, Mirror(origin, root))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(listen, sys.argv[1], sys.argv[2])
