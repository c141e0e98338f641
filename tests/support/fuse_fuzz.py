"""Fuzzing the devfuse engine: a world to attack, the kernel's end of its socket, and what every answer must be like."""

import os
import re
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.fuse_protocol import Opcode
from tests.support import harness
from tests.support.fuse_fuzz_server import LARGEST_FILE

PATIENCE = 20.0  # seconds for one answer, on a busy machine
#: In the content of a file, and in the name of another, both outside the source: no answer may ever hold it.
SECRET = b"what-nobody-may-see"
SILENT = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY)
_BUFFER = 1 << 22  # bytes: no message is larger
_PROBE = 1 << 63  # set in the uniques of probes
# Bytes of an answer's body, where they do not depend on the request.
_SIZES = {
    Opcode.LOOKUP: 128,
    Opcode.GETATTR: 104,
    Opcode.SETATTR: 104,
    Opcode.STATX: 288,
    Opcode.SYMLINK: 128,
    Opcode.MKNOD: 128,
    Opcode.MKDIR: 128,
    Opcode.LINK: 128,
    Opcode.OPEN: 16,
    Opcode.OPENDIR: 16,
    Opcode.CREATE: 144,
    Opcode.TMPFILE: 144,
    Opcode.WRITE: 8,
    Opcode.STATFS: 80,
    Opcode.LSEEK: 8,
    Opcode.COPY_FILE_RANGE: 8,
    Opcode.COPY_FILE_RANGE_64: 8,
    Opcode.INIT: 64,
    **dict.fromkeys(
        (
            Opcode.UNLINK,
            Opcode.RMDIR,
            Opcode.RENAME,
            Opcode.RENAME2,
            Opcode.RELEASE,
            Opcode.RELEASEDIR,
            Opcode.FSYNC,
            Opcode.FSYNCDIR,
            Opcode.FALLOCATE,
            Opcode.ACCESS,
            Opcode.SETXATTR,
            Opcode.REMOVEXATTR,
            Opcode.DESTROY,
        ),
        0,
    ),
}
_WORD = struct.Struct("=I")
_NAME_LENGTH = 128 + 16  # where it is in a fuse_direntplus, in bytes
_NAME = 128 + 24
_MAKE_ENTRIES = (Opcode.LOOKUP, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.LINK)


def message(
    opcode: int,
    body: bytes,
    *,
    unique: int,
    node_id: int,
    uid: int = 0,
    gid: int = 0,
    pid: int = 0,
    length: int | None = None,
    extension_words: int = 0,
) -> bytes:
    """A request; `length` is what its header says, None for the truth."""
    said = protocol.IN_HEADER.size + len(body) if length is None else length
    return protocol.IN_HEADER.pack(said, opcode, unique, node_id, uid, gid, pid, extension_words, 0) + body


@dataclass(slots=True)
class Answer:
    """What came back: `error` is an errno or 0."""

    error: int
    body: bytes


@dataclass
class Target:
    """The engine's process, and the socket that it takes for /dev/fuse.

    `nodes`, `files` and `directories` are the numbers that it has told, the latest last; `known` and `opened` are all that it must keep,
    the latter by the opcode that lets it go.
    """

    process: "subprocess.Popen[str]"
    socket: socket.socket
    log: Path
    outer: Path
    nodes: deque[int] = field(default_factory=lambda: deque(maxlen=48))
    files: deque[int] = field(default_factory=lambda: deque(maxlen=32))
    directories: deque[int] = field(default_factory=lambda: deque(maxlen=8))
    known: set[int] = field(default_factory=set)
    opened: set[tuple[Opcode, int]] = field(default_factory=set)
    history: deque[bytes] = field(default_factory=lambda: deque(maxlen=8))
    sent: int = 0
    unique: int = 2

    def next_unique(self) -> int:
        """As the kernel numbers its requests."""
        self.unique += 2
        return self.unique

    # Requests

    def ask(self, opcode: int, body: bytes = b"", node_id: int = protocol.ROOT_ID) -> Answer:
        """A request that has an answer."""
        unique = self.next_unique()
        self.send(message(opcode, body, unique=unique, node_id=node_id))
        return self.answer(unique)

    def send(self, request: bytes) -> None:
        """Whatever it is."""
        self.history.append(request)
        self.sent += 1
        self.socket.send(request)

    def answer(self, unique: int) -> Answer:
        """The next message, which must be the answer of that request, and well-formed."""
        while True:
            readable, _, _ = select.select([self.socket], [], [], PATIENCE)
            assert readable, f"no answer within {PATIENCE:.0f} s: {self.story()}"
            try:
                data = self.socket.recv(_BUFFER)
            except ConnectionResetError:
                data = b""
            assert data, f"the engine has gone: {self.story()}"
            assert len(data) >= protocol.OUT_HEADER.size, self.story()
            length, error, answered = protocol.OUT_HEADER.unpack_from(data)
            assert length == len(data), f"an answer of {len(data)} bytes says {length}: {self.story()}"
            assert SECRET not in data, f"bytes from outside the source: {self.story()}"
            if answered == 0 and error > 0:
                assert error in (protocol.NOTIFY_INVAL_INODE, protocol.NOTIFY_INVAL_ENTRY), self.story()
                continue
            assert answered == unique, f"an answer for {answered} instead of {unique}: {self.story()}"
            # fuse_dev_do_write() takes no others.
            assert -512 < error <= 0, f"errno {error}: {self.story()}"
            body = data[protocol.OUT_HEADER.size :]
            assert not (error and body), f"an errno with a body: {self.story()}"
            return Answer(-error, body)

    def attack(self, request: bytes) -> Answer | None:
        """Send a request of any kind; its answer, if it must have one, has been checked. The engine serves as before."""
        self.send(request)
        answer = None
        if len(request) >= protocol.IN_HEADER.size:
            length, opcode, unique, node_id, *_, extension_words, _ = protocol.IN_HEADER.unpack_from(request)
            if opcode not in SILENT:
                answer = self.answer(unique)
                end = length - 8 * extension_words
                if length != len(request) or end < protocol.IN_HEADER.size:
                    assert answer.error, f"taken: {self.story()}"
                elif not answer.error:
                    self._check(opcode, node_id, request[protocol.IN_HEADER.size : end], answer.body)
        self.probe()
        return answer

    def _check(self, opcode: int, node_id: int, sent: bytes, got: bytes) -> None:
        """The body of an answer, from which numbers are learnt too."""
        if opcode in _SIZES:
            assert len(got) == _SIZES[Opcode(opcode)], f"{len(got)} bytes: {self.story()}"
        if opcode in (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS):
            assert len(got) <= protocol.READ_IN.unpack_from(sent)[2], self.story()
        if opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
            size, _ = protocol.GETXATTR_IN.unpack_from(sent)
            assert len(got) <= size if size else len(got) == protocol.SIZE_OUT.size, self.story()
        if opcode in (Opcode.WRITE, Opcode.COPY_FILE_RANGE):
            asked = protocol.COPY_FILE_RANGE_IN.unpack_from(sent)[5] if opcode != Opcode.WRITE else len(sent)
            assert protocol.SIZE_OUT.unpack(got)[0] <= asked, self.story()
        self._learn(opcode, sent, got)

    def _learn(self, opcode: int, sent: bytes, got: bytes) -> None:
        if opcode in (*_MAKE_ENTRIES, Opcode.CREATE, Opcode.TMPFILE):
            self.know(_node_in(got))
        if opcode == Opcode.READDIRPLUS:
            while got:
                self.know(_node_in(got))
                (length,) = _WORD.unpack_from(got, _NAME_LENGTH)
                got = got[_NAME + (length + 7) // 8 * 8 :]
        if opcode in (Opcode.OPEN, Opcode.CREATE, Opcode.TMPFILE):
            self._open(Opcode.RELEASE, self.files, got)
        if opcode == Opcode.OPENDIR:
            self._open(Opcode.RELEASEDIR, self.directories, got)
        if opcode in (Opcode.RELEASE, Opcode.RELEASEDIR):
            self.opened.discard((Opcode(opcode), protocol.RELEASE_IN.unpack_from(sent)[0]))

    def know(self, node_id: int) -> None:
        """It has told of a node; 0 is none."""
        if node_id:
            self.nodes.append(node_id)
            self.known.add(node_id)

    def _open(self, closing: Opcode, numbers: deque[int], got: bytes) -> None:
        (handle, _, _) = protocol.OPEN_OUT.unpack(got[-protocol.OPEN_OUT.size :])
        if handle:
            numbers.append(handle)
            self.opened.add((closing, handle))

    def probe(self) -> None:
        """The engine still serves: what is in the source is found, nothing else has been answered meanwhile, and nothing twice."""
        for opcode, body in ((Opcode.LOOKUP, b"anchor\0"), (Opcode.GETATTR, bytes(16))):
            unique = _PROBE | self.next_unique()
            self.socket.send(message(opcode, body, unique=unique, node_id=protocol.ROOT_ID))
            answer = self.answer(unique)
            assert answer.error == 0, f"errno {answer.error} for a probe: {self.story()}"
            assert len(answer.body) == _SIZES[opcode]

    # Looking at it

    def story(self) -> str:
        """What was sent last, for a message."""
        lines = [f"{len(request)} bytes: {request[:120].hex()}" for request in self.history]
        return (
            f"after {self.sent} requests, the last of them\n" + "\n".join(lines) + f"\n{self.words()[-3000:]}"
        )

    def words(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def descriptors(self) -> list[str]:
        """Where those lead to in the source that it holds."""
        found = []
        source = str(self.outer / "source")
        for number in os.listdir(f"/proc/{self.process.pid}/fd"):
            with suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{self.process.pid}/fd/{number}"))
        return sorted(path for path in found if path == source or path.startswith(f"{source}/"))

    def peak(self) -> int:
        """The most memory that it ever had, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def let_go(self) -> None:
        """Close everything that is open and forget every node, as the kernel does when a filesystem is unmounted."""
        for opcode, handle in sorted(self.opened):
            self.ask(opcode, protocol.RELEASE_IN.pack(handle, 0, 0, 0))
        for node_id in sorted(self.known - {protocol.ROOT_ID}):
            request = protocol.FORGET_IN.pack((1 << 64) - 1)
            self.send(message(Opcode.FORGET, request, unique=self.next_unique(), node_id=node_id))
        self.probe()


def _node_in(entry: bytes) -> int:
    return int(protocol.OFFSET_OUT.unpack_from(entry)[0])


def _fill(source: Path) -> None:
    (source / "anchor").write_bytes(b"anchor" * 700)
    (source / "empty").touch()
    (source / "large").write_bytes(bytes(range(256)) * (LARGEST_FILE // 512))
    for name in ("directory", "directory/below", "other"):
        (source / name).mkdir()
    (source / "directory/file").write_bytes(b"below")
    (source / "up").symlink_to("../outside/file")
    (source / "away").symlink_to(source.parent / "outside")
    (source / "directory/loop").symlink_to("..")
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "socket"))
    os.link(source / "anchor", source / "other/hard")
    os.setxattr(source / "empty", "user.one", b"value")


def outside(outer: Path) -> dict[str, tuple[object, ...]]:
    """What must not change: everything beside the source."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (outer / "outside", *sorted((outer / "outside").iterdir())):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else sorted(os.listdir(path))
        found[str(path)] = (status.st_mode, status.st_nlink, status.st_uid, status.st_ctime_ns, content)
    return found


@contextmanager
def attacked(world: str) -> Iterator[Target]:
    """An engine over a directory of every kind of file, initialised. What it must never do is checked at the end."""
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        source = outer / "source"
        source.mkdir()
        (outer / "outside").mkdir()
        (outer / "outside/file").write_bytes(b"the content: " + SECRET)
        (outer / f"outside/{SECRET.decode()}").touch()
        _fill(source)
        before = outside(outer)
        with _process(world, source, outer / "source.log") as target:
            flags = 0xFFFFFFFF & ~protocol.Init.INIT_EXT
            target.ask(Opcode.INIT, protocol.INIT_IN.pack(7, 41, 131072, flags))
            yield target
            target.probe()
            assert target.process.poll() is None, target.words()
            assert "Traceback" not in target.words(), target.words()[-6000:]
        assert outside(outer) == before
        assert sorted(os.listdir(outer)) == ["outside", "source", "source.log"]


@contextmanager
def _process(world: str, source: Path, log: Path) -> Iterator[Target]:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its, log.open("w", encoding="utf-8") as words:
        for end in (ours, its):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        its.setblocking(False)
        process = harness.start(
            (sys.executable, "-m", "tests.support.fuse_fuzz_server", str(source), str(its.fileno()), world),
            pass_fds=(its.fileno(),),
            stderr=words,
        )
        its.close()
        target = Target(process, ours, log, source.parent)
        try:
            yield target
        finally:
            process.kill()
            process.wait()
