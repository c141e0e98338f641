"""What the overlay's tests share: one set of operations done natively and through an Overlay, and doing things as someone else."""

import errno
import os
import pickle
import signal
import stat
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fusehsm.linux import syscalls
from fusehsm.overlay.overlay import AttributeChanges, Caller, Node, Overlay

NOBODY = 65534
ROOT_CALLER = Caller(0, 0, os.getpid())
ResultT = TypeVar("ResultT")
Outcome = tuple[str, Any]


def own_caller() -> Caller:
    return Caller(os.geteuid(), os.getegid(), os.getpid())


class Face(Protocol):
    """Operations by path below a root; intermediate names are never symbolic links that are followed (ELOOP)."""

    def mkdir(self, path: bytes, mode: int) -> None: ...
    def create(self, path: bytes, mode: int, content: bytes) -> None: ...
    def mknod(self, path: bytes, mode: int, device: int) -> None: ...
    def symlink(self, path: bytes, target: bytes) -> None: ...
    def readlink(self, path: bytes) -> bytes: ...
    def link(self, path: bytes, new: bytes) -> None: ...
    def unlink(self, path: bytes) -> None: ...
    def rmdir(self, path: bytes) -> None: ...
    def rename(self, path: bytes, new: bytes, flags: int) -> None: ...
    def chmod(self, path: bytes, mode: int) -> None: ...
    def chown(self, path: bytes, uid: int, gid: int) -> None: ...
    def truncate(self, path: bytes, size: int) -> None: ...
    def write(self, path: bytes, offset: int, content: bytes) -> int: ...
    def open_truncating(self, path: bytes) -> None: ...
    def set_times(self, path: bytes, atime_ns: int | None, mtime_ns: int | None) -> None: ...
    def set_xattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None: ...
    def get_xattr(self, path: bytes, name: bytes) -> bytes: ...
    def list_xattr(self, path: bytes) -> list[bytes]: ...
    def remove_xattr(self, path: bytes, name: bytes) -> None: ...
    def list(self, path: bytes) -> list[bytes]: ...
    def kind(self, path: bytes) -> tuple[int, int, int]: ...


class NativeFace:
    """The backing's own behaviour, by plain system calls."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def _at(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        directory, _, name = path.rpartition(b"/")
        root_fd = os.open(self.root, os.O_PATH)
        try:
            fd = syscalls.openat2(
                root_fd, directory or b".", os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_NO_SYMLINKS
            )
        finally:
            os.close(root_fd)
        try:
            yield fd, name or b"."
        finally:
            os.close(fd)

    def mkdir(self, path: bytes, mode: int) -> None:
        with self._at(path) as (fd, name):
            os.mkdir(name, mode, dir_fd=fd)

    def create(self, path: bytes, mode: int, content: bytes) -> None:
        with self._at(path) as (fd, name):
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode, dir_fd=fd)
            os.write(file, content)
            os.close(file)

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        with self._at(path) as (fd, name):
            os.mknod(name, mode, device, dir_fd=fd)

    def symlink(self, path: bytes, target: bytes) -> None:
        with self._at(path) as (fd, name):
            os.symlink(target, name, dir_fd=fd)

    def readlink(self, path: bytes) -> bytes:
        with self._at(path) as (fd, name):
            return os.readlink(name, dir_fd=fd)

    def link(self, path: bytes, new: bytes) -> None:
        with self._at(path) as (fd, name), self._at(new) as (new_fd, new_name):
            os.link(name, new_name, src_dir_fd=fd, dst_dir_fd=new_fd, follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        with self._at(path) as (fd, name):
            os.unlink(name, dir_fd=fd)

    def rmdir(self, path: bytes) -> None:
        with self._at(path) as (fd, name):
            os.rmdir(name, dir_fd=fd)

    def rename(self, path: bytes, new: bytes, flags: int) -> None:
        with self._at(path) as (fd, name), self._at(new) as (new_fd, new_name):
            syscalls.rename(fd, name, new_fd, new_name, flags)

    def chmod(self, path: bytes, mode: int) -> None:
        with self._at(path) as (fd, name):
            if stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                raise OSError(errno.EOPNOTSUPP, "fchmodat2(2) with AT_SYMLINK_NOFOLLOW says so")
            os.chmod(name, mode, dir_fd=fd)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        with self._at(path) as (fd, name):
            os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)

    @contextmanager
    def _opened(self, path: bytes, flags: int) -> Iterator[int]:
        with self._at(path) as (fd, name):
            file = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
        try:
            yield file
        finally:
            os.close(file)

    def truncate(self, path: bytes, size: int) -> None:
        with self._at(path) as (fd, name):
            if stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                raise OSError(errno.EINVAL, "truncating a symbolic link cannot be asked for natively")
            os.truncate(b"/proc/self/fd/%d/%s" % (fd, name), size)

    def write(self, path: bytes, offset: int, content: bytes) -> int:
        with self._opened(path, os.O_WRONLY) as file:
            return os.pwrite(file, content, offset)

    def open_truncating(self, path: bytes) -> None:
        with self._opened(path, os.O_WRONLY | os.O_TRUNC):
            pass

    def set_times(self, path: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
        with self._at(path) as (fd, name):
            now = os.stat(name, dir_fd=fd, follow_symlinks=False)
            times = (
                now.st_atime_ns if atime_ns is None else atime_ns,
                now.st_mtime_ns if mtime_ns is None else mtime_ns,
            )
            os.utime(name, ns=times, dir_fd=fd, follow_symlinks=False)

    def _plain(self, path: bytes) -> bytes:
        return os.fsencode(self.root) + b"/" + path

    def set_xattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        os.setxattr(self._plain(path), name, value, flags, follow_symlinks=False)

    def get_xattr(self, path: bytes, name: bytes) -> bytes:
        return os.getxattr(self._plain(path), name, follow_symlinks=False)

    def list_xattr(self, path: bytes) -> list[bytes]:
        return sorted(os.fsencode(name) for name in os.listxattr(self._plain(path), follow_symlinks=False))

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        os.removexattr(self._plain(path), name, follow_symlinks=False)

    def list(self, path: bytes) -> list[bytes]:
        with self._at(path) as (fd, name):
            directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        try:
            return sorted(os.fsencode(entry) for entry in os.listdir(directory))
        finally:
            os.close(directory)

    def kind(self, path: bytes) -> tuple[int, int, int]:
        with self._at(path) as (fd, name):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        return status.st_mode, status.st_nlink, 0 if stat.S_ISDIR(status.st_mode) else status.st_size


class OverlayFace:
    """The same through an Overlay, looking names up and forgetting them as the kernel does."""

    def __init__(self, overlay: Overlay, caller: Caller | None = None, *, keep: bool = False) -> None:
        self.overlay = overlay
        self.caller = caller if caller is not None else own_caller()
        self._keep = keep

    def _forget(self, node: Node) -> None:
        if not self._keep:
            self.overlay.forget(node, 1)

    @contextmanager
    def node(self, path: bytes) -> Iterator[Node]:
        """The node of a path, known to the overlay inside the block."""
        node = self.overlay.root
        held = []
        try:
            for name in path.split(b"/") if path else ():
                if stat.S_ISLNK(node.kind):
                    raise OSError(errno.ELOOP, "symbolic link in the middle")
                if not node.is_dir:
                    raise OSError(errno.ENOTDIR, "not a directory in the middle")
                node, _ = self.overlay.lookup(node, name)
                held.append(node)
            yield node
        finally:
            for known in held:
                self._forget(known)

    @contextmanager
    def _at(self, path: bytes) -> Iterator[tuple[Node, bytes]]:
        directory, _, name = path.rpartition(b"/")
        with self.node(directory) as parent:
            if stat.S_ISLNK(parent.kind):
                raise OSError(errno.ELOOP, "symbolic link in the middle")
            if not parent.is_dir:
                raise OSError(errno.ENOTDIR, "not a directory in the middle")
            yield parent, name

    def mkdir(self, path: bytes, mode: int) -> None:
        with self._at(path) as (parent, name):
            self._forget(self.overlay.mkdir(parent, name, mode, self.caller)[0])

    def create(self, path: bytes, mode: int, content: bytes) -> None:
        with self._at(path) as (parent, name):
            node, status, fd = self.overlay.create(parent, name, os.O_RDWR | os.O_EXCL, mode, self.caller)
            assert node.id == status.st_ino == os.fstat(fd).st_ino
            if content:
                self.overlay.before_write(node, fd, self.caller.uid, self.caller.pid)
                os.pwrite(fd, content, 0)
            os.close(fd)
            self._forget(node)

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        with self._at(path) as (parent, name):
            self._forget(self.overlay.mknod(parent, name, mode, device, self.caller)[0])

    def symlink(self, path: bytes, target: bytes) -> None:
        with self._at(path) as (parent, name):
            self._forget(self.overlay.symlink(parent, name, target, self.caller)[0])

    def readlink(self, path: bytes) -> bytes:
        with self.node(path) as node:
            return self.overlay.readlink(node)

    def link(self, path: bytes, new: bytes) -> None:
        # As linkat(2): both directories are found before the file is.
        with self._at(path) as (_, _), self._at(new) as (parent, name), self.node(path) as node:
            same, _ = self.overlay.link(node, parent, name, self.caller)
            assert same is node
            self._forget(node)

    def unlink(self, path: bytes) -> None:
        with self._at(path) as (parent, name):
            self.overlay.unlink(parent, name, self.caller)

    def rmdir(self, path: bytes) -> None:
        with self._at(path) as (parent, name):
            self.overlay.rmdir(parent, name, self.caller)

    def rename(self, path: bytes, new: bytes, flags: int) -> None:
        with self._at(path) as (parent, name), self._at(new) as (new_parent, new_name):
            self.overlay.rename(parent, name, new_parent, new_name, flags, self.caller)

    def _set(self, path: bytes, changes: AttributeChanges) -> None:
        with self.node(path) as node:
            same, status = self.overlay.setattr(node, changes, None, self.caller)
            assert same is node
            assert status == self.overlay.getattr(node)

    def chmod(self, path: bytes, mode: int) -> None:
        self._set(path, AttributeChanges(mode=mode))

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        self._set(path, AttributeChanges(uid=uid if uid >= 0 else None, gid=gid if gid >= 0 else None))

    def truncate(self, path: bytes, size: int) -> None:
        self._set(path, AttributeChanges(size=size))

    def write(self, path: bytes, offset: int, content: bytes) -> int:
        with self.node(path) as node:
            fd = self.overlay.open(node, os.O_WRONLY, self.caller)
            try:
                self.overlay.before_write(node, fd, self.caller.uid, self.caller.pid)
                return self.overlay.write(node, self.caller, fd, content, offset)
            finally:
                os.close(fd)

    def open_truncating(self, path: bytes) -> None:
        with self.node(path) as node:
            os.close(self.overlay.open(node, os.O_WRONLY | os.O_TRUNC, self.caller))

    def set_times(self, path: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
        self._set(path, AttributeChanges(atime_ns=atime_ns, mtime_ns=mtime_ns))

    def set_xattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        with self.node(path) as node:
            self.overlay.setxattr(node, name, value, flags, self.caller)

    def get_xattr(self, path: bytes, name: bytes) -> bytes:
        with self.node(path) as node:
            return self.overlay.getxattr(node, name)

    def list_xattr(self, path: bytes) -> list[bytes]:
        with self.node(path) as node:
            return sorted(self.overlay.listxattr(node, self.caller))

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        with self.node(path) as node:
            self.overlay.removexattr(node, name, self.caller)

    def list(self, path: bytes) -> list[bytes]:
        with self.node(path) as node:
            stream = self.overlay.opendir(node)
            try:
                return sorted(entry.name for entry in stream.entries(0))
            finally:
                stream.close()

    def kind(self, path: bytes) -> tuple[int, int, int]:
        with self.node(path) as node:
            status = self.overlay.getattr(node)
        return status.st_mode, status.st_nlink, 0 if stat.S_ISDIR(status.st_mode) else status.st_size


def outcome(operation: Callable[[], object]) -> Outcome:
    """What an operation gives, or the name of its errno."""
    try:
        return "ok", operation()
    except OSError as error:
        return "error", errno.errorcode.get(error.errno or 0, str(error.errno))


def snapshot(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything below `root` that two equal trees have in common; times only where they were set to the past."""
    found: dict[bytes, tuple[object, ...]] = {}
    groups: dict[int, int] = {}
    base = os.fsencode(root)
    waiting = [b""]
    while waiting:
        relative = waiting.pop()
        path = base + b"/" + relative if relative else base
        status = os.lstat(path)
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = Path(os.fsdecode(path)).read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISDIR(status.st_mode):
            names = sorted(os.listdir(path))
            waiting.extend(relative + b"/" + name if relative else name for name in names)
        mtime = status.st_mtime_ns
        found[relative] = (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            0 if stat.S_ISDIR(status.st_mode) else status.st_size,
            status.st_rdev,
            content,
            mtime if mtime < 1_700_000_000_000_000_000 else "recent",
            sorted(
                (name, os.getxattr(path, name, follow_symlinks=False))
                for name in os.listxattr(path, follow_symlinks=False)
            ),
        )
        groups.setdefault(status.st_ino, len(groups))
    # Hard links: names of one inode in one tree must be names of one inode in the other.
    by_inode: dict[int, list[bytes]] = {}
    for relative in found:
        by_inode.setdefault(os.lstat(base + b"/" + relative).st_ino, []).append(relative)
    return {
        name: (*value, sorted(by_inode[os.lstat(base + b"/" + name).st_ino])) for name, value in found.items()
    }


def as_user(
    function: Callable[[], ResultT],
    uid: int = NOBODY,
    gid: int = NOBODY,
    groups: tuple[int, ...] = (),
    umask: int = 0,
) -> ResultT:
    """Run `function` in a forked process as someone else (as root: needed to change); its result must pickle."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            signal.alarm(120)
            if os.geteuid() == 0:
                os.setgroups(groups)
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
            os.umask(umask)
            try:
                answer = pickle.dumps((True, function()))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert answer, f"the process died, wait status {status}"
    good, value = pickle.loads(answer)
    assert good, value
    return value  # type: ignore[no-any-return]


@contextmanager
def process_of(uid: int, gid: int, groups: tuple[int, ...]) -> Iterator[int]:
    """The id of a process with these ids that lives as long as the block."""
    ready_reader, ready_writer = os.pipe()
    end_reader, end_writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(end_writer)
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.write(ready_writer, b"x")
            os.read(end_reader, 1)
        finally:
            os._exit(0)
    os.close(end_reader)
    os.close(ready_writer)
    try:
        assert os.read(ready_reader, 1) == b"x"
        yield child
    finally:
        os.close(end_writer)
        os.close(ready_reader)
        os.waitpid(child, 0)


@contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[Path]:
    """A filesystem mounted for the length of the block."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, str(at)], check=True, capture_output=True, timeout=60)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True, capture_output=True, timeout=60)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
