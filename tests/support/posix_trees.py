"""The worlds of one POSIX expectation: a plain ext4 directory, and mounts over other directories of that ext4.

A test's body runs in a process of its own (`Tree.run`, `Tree.as_user`), so a mount that does not answer cannot hang the tests. After each
test `Tree.check` compares what the mount shows with what the backing holds; the fixture compares that with what the plain directory held.
"""

import hashlib
import os
import pickle
import select
import signal
import stat
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.support import harness

PATIENCE = 60.0  # seconds that a test's process may take before it is given up on
LONG_AGO = 1_600_000_000_000_000_000  # nanoseconds since 1970; what is later was set by the clock
FAR_AHEAD = 2_000_000_000_000_000_000
ResultT = TypeVar("ResultT")

WATCHED = ("exact", "first-access")  # the worlds with a listener

# What a tree holds: every name's type, mode, owner, links, size, blocks, content, attributes and set times.
State = dict[bytes, tuple[object, ...]]


def in_child(
    function: Callable[[], ResultT],
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: tuple[int, ...] = (),
    umask: int = 0o022,
    timeout: float = PATIENCE,
) -> ResultT:
    """Run `function` in a forked process, as someone else where ids are given; its result must pickle. AssertionError carries a failure."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            try:
                if uid is not None:
                    os.setgroups(groups)
                    os.setresgid(*[uid if gid is None else gid] * 3)
                    os.setresuid(uid, uid, uid)
                os.umask(umask)
                answer = pickle.dumps((True, function()))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    pieces = []
    try:
        while True:
            if not select.select([reader], [], [], timeout)[0]:
                raise AssertionError(f"no result within {timeout:g} s")
            if not (piece := os.read(reader, 1 << 20)):
                break
            pieces.append(piece)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        # A process that cannot die waits for the mount: its daemon is killed at the end of the module, which ends it.
        if pieces:
            os.waitpid(child, 0)
    assert pieces, "the process died"
    good, value = pickle.loads(b"".join(pieces))
    assert good, value
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Tree:
    """An empty directory for one test, used at `path`; `backing` is where its content lies (the same natively)."""

    world: str
    backing: Path
    path: Path
    daemon: int = 0
    engine: str = ""  # none natively

    @property
    def name(self) -> str:
        """The world's, as in the ids of tests."""
        return f"{self.engine}-{self.world}" if self.engine else self.world

    @property
    def is_native(self) -> bool:
        return self.backing == self.path

    @property
    def is_exact(self) -> bool:
        """Watched files are opened for direct I/O, which has its own, documented limits."""
        return self.world == "exact"

    def run(self, function: Callable[[Path], ResultT]) -> ResultT:
        """Run `function(path)` in a process of its own."""
        return in_child(lambda: function(self.path))

    def as_user(
        self,
        function: Callable[[Path], ResultT],
        uid: int = 65534,
        gid: int | None = None,
        groups: tuple[int, ...] = (),
        umask: int = 0o022,
    ) -> ResultT:
        """Run `function(path)` as an ordinary user."""
        return in_child(lambda: function(self.path), uid=uid, gid=gid, groups=groups, umask=umask)

    def check(self) -> State:
        """What the backing holds, after comparing it with what is shown."""
        held = in_child(lambda: state(os.fsencode(self.backing)))
        if not self.is_native:
            shown = in_child(lambda: state(os.fsencode(self.path)))
            if self.world in WATCHED:
                # A watched file without a block shows one, lest tar -S take it for a hole.
                expect_same(
                    {name: _one_block(value) for name, value in shown.items()},
                    {name: _one_block(value) for name, value in held.items()},
                )
            else:
                expect_same(shown, held)
        return held


@contextmanager
def allowing_everything(path: Path) -> Iterator[None]:
    """A listener in a process of its own for PRE_ACCESS on the whole mount, which allows whatever is asked."""
    command = [*harness.COMMAND, "trace", str(path), "--mask", "PRE_ACCESS", "--mark", "mount"]
    with harness.start(command, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        log = harness.LogReader(process.stderr)
        try:
            log.wait_for(lambda line: line == "ready")
            yield
            assert process.poll() is None, log.lines
        finally:
            process.kill()


def outcome(call: Callable[..., object], *arguments: object, **more: object) -> object:
    """What a call returns, or the OSError's errno as a name-like value that compares."""
    try:
        return call(*arguments, **more)
    except OSError as error:
        return Errno(error.errno or 0)


@dataclass(frozen=True, slots=True)
class Errno:
    """A call that failed."""

    number: int

    def __repr__(self) -> str:
        return f"<{os.strerror(self.number)}>"


def expect_same(one: State, other: State) -> None:
    """Two trees are equal; else an AssertionError that shows where they are not."""
    different = {
        name: (one.get(name), other.get(name)) for name in {*one, *other} if one.get(name) != other.get(name)
    }
    assert not different, different


def _one_block(value: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        (field[0], 1)
        if isinstance(field, tuple) and len(field) == 2 and field[0] and field[1] == 0
        else field
        for field in value
    )


def state(root: bytes) -> State:
    """Everything below `root`, in a form that is equal for equal trees."""
    found: State = {}
    names_of: dict[int, list[bytes]] = {}
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    _add_state(root_fd, b"", found, names_of)
    os.close(root_fd)
    links = {name: tuple(sorted(names)) for names in names_of.values() for name in names}
    return {name: (*value, links[name]) for name, value in sorted(found.items())}


def _add_state(directory: int, prefix: bytes, found: State, names_of: dict[int, list[bytes]]) -> None:
    # By descriptors, as paths may be longer than PATH_MAX.
    for name in [*([] if prefix else [b"."]), *map(os.fsencode, os.listdir(directory))]:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        relative = prefix + name
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(name, dir_fd=directory)
        elif stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME, dir_fd=directory)
            if stat.S_ISREG(status.st_mode):
                content = hash_of(fd)
            attributes = sorted((key, outcome(os.getxattr, fd, key)) for key in os.listxattr(fd))
            content = (content, attributes)
            if stat.S_ISDIR(status.st_mode) and name != b".":
                _add_state(fd, relative + b"/", found, names_of)
            os.close(fd)
        names_of.setdefault(status.st_ino, []).append(relative)
        found[relative] = (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            "" if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_blocks),
            status.st_rdev,
            content,
            _set_time(status.st_mtime_ns),
            # Reading a link is what sets its.
            "" if stat.S_ISLNK(status.st_mode) else _set_time(status.st_atime_ns),
        )


def _set_time(value: int) -> object:
    return value if value < LONG_AGO or value > FAR_AHEAD else "now"


def hash_of(fd: int) -> tuple[int, bytes]:
    """Of a file's data; holes of whatever length are skipped, by SEEK_DATA where there is one."""
    digest, offset, total = hashlib.sha256(), 0, 0
    size = os.fstat(fd).st_size
    if size > 64 << 20:
        # Sparse: the ends and what lies around 4 GiB tell.
        for offset in (0, (4 << 30) - 65536, size - 131072):
            digest.update(os.pread(fd, 131072, max(offset, 0)))
        return size, digest.digest()
    while piece := os.pread(fd, 1 << 20, offset):
        digest.update(piece)
        offset += len(piece)
        total += len(piece)
    return total, digest.digest()
