"""Requests that a kernel would not send, and some that it would, from a random number generator."""

import os
import random
import stat
import sys
from collections.abc import Callable

from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.fuse_protocol import Opcode
from fusehsm.overlay import ioctls
from tests.support.fuse_fuzz import Target, message
from tests.support.fuse_fuzz_server import LARGEST_FILE

UNKNOWN_OPCODES = (0, 7, 19, 54, 70, 4096, 1 << 31, (1 << 32) - 1)
NUMBERS = (0, 1, 2, 7, 4095, 4096, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LARGE_NUMBERS = (*NUMBERS, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
NAMES = (
    b"anchored",
    b"empty",
    b"large",
    b"directory",
    b"below",
    b"other",
    b"up",
    b"away",
    b"fifo",
    b"new",
    b"newer",
    b"user.one",
    b"user.two",
    b"system.posix_acl_access",
    b"security.capability",
    b"security.selinux",
    b"trusted.overlay.opaque",
    b"\xff\xfe",
    b"%s%n",
    b"line\nbreak",
)
ODD_NAMES = (
    b"",
    b".",
    b"..",
    b"/",
    b"a/b",
    b"../outside",
    b"../outside/file",
    b"directory/file",
    b"/etc/passwd",
    b"../../../../../../etc/passwd",
    b"n" * 255,
    b"n" * 256,
    b"n" * 4096,
    b"./anchor",
    b"up/..",
)
# Not those that change flags: a file that is immutable or append-only would survive the test.
IOCTLS = (
    ioctls.FS_IOC_GETFLAGS,
    ioctls.FS_IOC_FSGETXATTR,
    ioctls.FS_IOC_GETVERSION,
    ioctls.FS_IOC_GETFSLABEL,
    ioctls.FS_IOC32_GETFLAGS,
)
_KILL_INIT = 0.9  # of the INITs are left out, or nothing but INIT's defaults would be attacked


class Requests:
    """Requests for one target. The same seed and answers give the same requests."""

    def __init__(self, target: Target, seed: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._pids = (0, os.getpid(), 1, (1 << 31) - 1, (1 << 32) - 1)

    def next(self) -> bytes:
        """One more."""
        chance = self._random.random()
        opcode = self._opcode()
        body = self.body(opcode)
        if chance < 0.25:
            body = self._damaged(body)
        elif chance < 0.30:
            body = self._random.randbytes(self._random.choice((0, 1, 8, 40, 64, 200, 5000, 70000)))
        request = self._message(opcode, _harmless(opcode, body))
        if 0.30 <= chance < 0.33:
            return request[: self._random.randrange(1, len(request) + 1)]
        if 0.33 <= chance < 0.36:
            length = self._random.choice((0, 1, 39, 40, 41, len(request) - 1, len(request) + 1, *NUMBERS))
            return length.to_bytes(4, sys.byteorder) + request[4:]
        if 0.36 <= chance < 0.38:
            words = self._random.choice((1, 2, len(request) // 8, 0xFFFF))
            return request[:36] + words.to_bytes(2, sys.byteorder) + request[38:]
        return request

    def _opcode(self) -> int:
        chance = self._random.random()
        if chance < 0.06:
            return self._random.choice(UNKNOWN_OPCODES)
        while True:
            opcode = self._random.choice(list(Opcode))
            if opcode is not Opcode.INIT or self._random.random() > _KILL_INIT:
                return opcode

    def _message(self, opcode: int, body: bytes) -> bytes:
        pick = self._random.random()
        return message(
            opcode,
            body,
            unique=self._target.next_unique(),
            node_id=self._node(),
            uid=0 if pick < 0.7 else self._random.choice((1000, 65534, (1 << 32) - 1)),
            gid=0 if pick < 0.8 else self._random.choice((1000, 65534, (1 << 32) - 1)),
            pid=self._random.choice(self._pids),
        )

    def _node(self) -> int:
        chance = self._random.random()
        if chance < 0.25 or not self._target.nodes:
            return protocol.ROOT_ID
        if chance < 0.9:
            return self._random.choice(self._target.nodes)
        return self._random.choice(LARGE_NUMBERS)

    def _damaged(self, body: bytes) -> bytes:
        kind = self._random.randrange(4)
        if kind == 0:
            return body[: self._random.randrange(len(body) + 1)]
        if kind == 1:
            return body + self._random.randbytes(self._random.choice((1, 3, 8, 4096)))
        if kind == 2:
            return body.rstrip(b"\0")
        damaged = bytearray(body)
        for _ in range(self._random.randrange(1, 5)):
            if damaged:
                damaged[self._random.randrange(len(damaged))] = self._random.randrange(256)
        return bytes(damaged)

    # Bodies

    def _number(self) -> int:
        return self._random.choice(NUMBERS)

    def _large(self) -> int:
        chance = self._random.random()
        return self._random.choice(LARGE_NUMBERS) if chance < 0.5 else self._random.randrange(LARGEST_FILE)

    def _file(self) -> int:
        return self._known(self._target.files)

    def _directory(self) -> int:
        return self._known(self._target.directories)

    def _known(self, numbers: "object") -> int:
        known = list(numbers)  # type: ignore[call-overload]
        chance = self._random.random()
        if chance < 0.6 and known:
            return int(self._random.choice(known))
        return 0 if chance < 0.8 else self._large()

    def _name(self) -> bytes:
        return self._random.choice(NAMES if self._random.random() < 0.8 else ODD_NAMES) + b"\0"

    def _mode(self) -> int:
        kind = self._random.choice((0, stat.S_IFREG, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR))
        return kind | self._random.choice((0, 0o644, 0o755, 0o6777, 1 << 31, 0xFFFFFFFF))

    def _open_flags(self) -> int:
        if self._random.random() < 0.2:
            return self._number()
        return self._random.randrange(4) | self._random.choice((0, os.O_TRUNC, os.O_APPEND, os.O_EXCL, 0x20))

    def body(self, opcode: int) -> bytes:
        """What follows the header, of the right form."""
        make = self._makers().get(opcode)
        return self._random.randbytes(self._random.choice((0, 8, 16, 40))) if make is None else make()

    def _makers(self) -> dict[int, Callable[[], bytes]]:
        p, n, large, name = protocol, self._number, self._large, self._name
        data = self._random.randbytes
        copy: Callable[[], bytes] = lambda: p.COPY_FILE_RANGE_IN.pack(  # noqa: E731
            self._file(), large(), self._node(), self._file(), large(), large(), n()
        )
        read: Callable[[int], bytes] = lambda handle: p.READ_IN.pack(  # noqa: E731
            handle, large(), n(), self._random.randrange(4), 0, 0, 0
        )

        def setattr_() -> bytes:
            valid = self._random.randrange(1 << 9) if self._random.random() < 0.8 else n()
            times = (large(), large(), large(), n(), n(), n())
            return p.SETATTR_IN.pack(valid, 0, self._file(), large(), large(), *times, n(), 0, n(), n(), 0)

        def write() -> bytes:
            content = data(self._random.choice((0, 1, 4096, 70000)))
            size = len(content) if self._random.random() < 0.8 else n()
            flags = self._random.choice((0, os.O_SYNC, os.O_DSYNC))
            return p.WRITE_IN.pack(self._file(), large(), size, n() & 7, 0, flags, 0) + content

        def setxattr() -> bytes:
            value = data(self._random.choice((0, 5, 300)))
            size = len(value) if self._random.random() < 0.7 else n()
            return p.SETXATTR_IN.pack(size, self._random.choice((0, 1, 2, n()))) + name() + value

        def batch_forget() -> bytes:
            entries = [p.FORGET_ONE.pack(self._node(), large()) for _ in range(self._random.randrange(3))]
            count = len(entries) if self._random.random() < 0.5 else n()
            return p.BATCH_FORGET_IN.pack(count, 0) + b"".join(entries)

        def init() -> bytes:
            fields = (self._random.choice((6, 7, 8)), self._random.choice((0, 12, 30, 31, 36, 45, 99)))
            return p.INIT_IN.pack(*fields, n(), n()) + data(self._random.choice((0, 4, 48)))

        def interrupt() -> bytes:
            return p.INTERRUPT_IN.pack(self._random.choice((self._target.unique, large())))

        def ioctl() -> bytes:
            command = self._random.choice((*IOCTLS, n()))
            argument = data(self._random.choice((0, 4, 8, 28)))
            takes = len(argument) if self._random.random() < 0.7 else n()
            gives = self._random.choice((0, 4, 8, 28, 256, n()))
            flags = self._random.choice((0, 0, p.IOCTL_DIR, n()))
            return p.IOCTL_IN.pack(self._file(), flags, command, large(), takes, gives) + argument

        def lock() -> bytes:
            start, end = sorted((large(), large()))
            kind = self._random.choice((0, 1, 2, n()))
            owner = self._random.randrange(4)
            return p.LK_IN.pack(self._file(), owner, start, end, kind, n(), self._random.choice((0, 0, 1)), 0)

        return {
            Opcode.GETLK: lock,
            Opcode.SETLK: lock,
            Opcode.SETLKW: lock,
            Opcode.IOCTL: ioctl,
            Opcode.LOOKUP: name,
            Opcode.FORGET: lambda: p.FORGET_IN.pack(self._random.choice((0, 1, large()))),
            Opcode.BATCH_FORGET: batch_forget,
            Opcode.GETATTR: lambda: data(16),
            Opcode.SETATTR: setattr_,
            Opcode.READLINK: lambda: b"",
            Opcode.SYMLINK: lambda: name() + name(),
            Opcode.MKNOD: lambda: p.MKNOD_IN.pack(self._mode(), n(), n(), 0) + name(),
            Opcode.MKDIR: lambda: p.MKDIR_IN.pack(self._mode(), n()) + name(),
            Opcode.UNLINK: name,
            Opcode.RMDIR: name,
            Opcode.RENAME: lambda: p.RENAME_IN.pack(self._node()) + name() + name(),
            Opcode.RENAME2: lambda: (
                p.RENAME2_IN.pack(self._node(), self._random.choice((0, 1, 2, 3, n())), 0) + name() + name()
            ),
            Opcode.LINK: lambda: p.LINK_IN.pack(self._node()) + name(),
            Opcode.OPEN: lambda: p.OPEN_IN.pack(self._open_flags(), 0),
            Opcode.OPENDIR: lambda: p.OPEN_IN.pack(self._open_flags(), 0),
            Opcode.CREATE: lambda: p.CREATE_IN.pack(self._open_flags(), self._mode(), n(), 0) + name(),
            Opcode.TMPFILE: lambda: p.CREATE_IN.pack(self._open_flags(), self._mode(), n(), 0) + name(),
            Opcode.READ: lambda: read(self._file()),
            Opcode.READDIR: lambda: read(self._directory()),
            Opcode.READDIRPLUS: lambda: read(self._directory()),
            Opcode.WRITE: write,
            Opcode.STATFS: lambda: b"",
            Opcode.RELEASE: lambda: p.RELEASE_IN.pack(self._file(), n(), 0, 0),
            Opcode.RELEASEDIR: lambda: p.RELEASE_IN.pack(self._directory(), n(), 0, 0),
            Opcode.FSYNC: lambda: p.FSYNC_IN.pack(self._file(), n(), 0),
            Opcode.FSYNCDIR: lambda: p.FSYNC_IN.pack(self._directory(), n(), 0),
            Opcode.SETXATTR: setxattr,
            Opcode.GETXATTR: lambda: p.GETXATTR_IN.pack(n(), 0) + name(),
            Opcode.LISTXATTR: lambda: p.GETXATTR_IN.pack(n(), 0),
            Opcode.REMOVEXATTR: name,
            Opcode.INIT: init,
            Opcode.ACCESS: lambda: p.ACCESS_IN.pack(self._random.choice((0, 4, 7, n())), 0),
            Opcode.INTERRUPT: interrupt,
            Opcode.FALLOCATE: lambda: p.FALLOCATE_IN.pack(
                self._file(), large(), large(), self._random.choice((0, 1, 3, 16, n())), 0
            ),
            Opcode.LSEEK: lambda: p.LSEEK_IN.pack(
                self._file(), large() >> 1, self._random.choice((3, 4, n())), 0
            ),
            Opcode.COPY_FILE_RANGE: copy,
            Opcode.COPY_FILE_RANGE_64: copy,
            Opcode.STATX: lambda: p.STATX_IN.pack(0, 0, self._file(), n(), n()),
        }


def _harmless(opcode: int, body: bytes) -> bytes:
    """A request that does not fill this machine's disk, should it be taken: what is allocated beyond a file's end no limit of files' sizes
    stops. What is longer than any file can be stays."""
    if opcode != Opcode.FALLOCATE or len(body) < protocol.FALLOCATE_IN.size:
        return body
    handle, offset, length, mode, padding = protocol.FALLOCATE_IN.unpack_from(body)
    if LARGEST_FILE < length < 1 << 63:
        length |= 1 << 63
    if LARGEST_FILE < offset < 1 << 63:
        offset |= 1 << 63
    return (
        protocol.FALLOCATE_IN.pack(handle, offset, length, mode, padding) + body[protocol.FALLOCATE_IN.size :]
    )
