"""Making stubs in a directory: one entry of a store after the other, in the order of Store.tree().

A new file appears at once and complete: it is made without a name, gets its size, owner, time and mark, and then its name (O_TMPFILE and linkat(2),
which never replaces a file). So a killed run leaves no half-made file, and the next run goes on where it stopped. A directory gets its mode and time
after its content is made.

Populate touches nothing outside the destination: every name is one component, used with the descriptor of its directory, and no symbolic link is
followed. It changes no file that is not a stub (tier/stubs/mark.py). No fetch may fill stubs at the same time (tier/populate/lock.py).
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fusehsm.linux.beneath import MOST_OPEN, Identity, components, identity_of, open_beneath, reopened
from fusehsm.overlay.attributes import path_of
from fusehsm.tier.populate.ownership import Ownership
from fusehsm.tier.populate.takeover import Refusal, remove_old, take_over
from fusehsm.tier.stores.base import Entry, Kind, StoreError
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs.mark import StubMark, is_all_hole
from fusehsm.tier.stubs.tree import Namespace

UNFINISHED: Final = ".fusehsm-unfinished"
"""The one name that is ours in every directory: what is being made where a file cannot be made without a name."""

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_A_STUB: Final = "is not a stub but a file with other content; remove or rename it"
NO_UNNAMED_FILES: Final = frozenset((errno.EOPNOTSUPP, errno.EISDIR))
"""What open(2) says to O_TMPFILE where the file system or the kernel does not have it."""

# After one of these errors every further entry would fail, too.
FATAL: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE))


class Outcome(Enum):
    """The result for an entry."""

    # Made.
    NEW = "new"
    # Existed, and was changed.
    UPDATED = "updated"
    # Existed, and needs no change.
    RIGHT = "right"
    # Has content already, or is an empty file, and was left alone.
    KEPT = "kept"
    # A socket, device or FIFO.
    LEFT_OUT = "left out"
    # Not made; a message tells the cause.
    FAILED = "failed"


@dataclass(slots=True)
class _Level:
    """A directory whose content is being made."""

    # Below the destination.
    path: str
    # Descriptor; None in a dry run that would make the directory.
    fd: int | None
    # None: the destination itself, whose attributes stay.
    entry: Entry | None
    # The mode before _open_up(), or the mode to set if the store has none.
    mode: int = 0
    # Identity of the directory while it is closed because there are too many levels. `fd` is then invalid.
    parked: Identity | None = None


@dataclass(slots=True)
class _Opened:
    """A file that is open for reading."""

    # Descriptor.
    fd: int
    # The mode to restore, because it was changed for open(2). None: keep the present mode.
    mode: int | None = None


class Planter:
    """Makes entries below `root_fd` (None: a dry run without a destination). Calls `complain(path, "cause; fix")` for each failure.

    `dry_run`: look, and change nothing. `unnamed`: try O_TMPFILE first.
    """

    def __init__(
        self,
        root_fd: int | None,
        complain: Callable[[str, str], None],
        *,
        dry_run: bool = False,
        unnamed: bool = True,
    ) -> None:
        self._complain = complain
        # Of the marks.
        self._namespace = Namespace.USER if root_fd is None else Namespace.at(root_fd)
        self._dry_run = dry_run
        self._unnamed = unnamed
        self._ownership = Ownership()
        self._root_fd = root_fd
        self._levels = [_Level("", root_fd, None)]
        # Path of a directory that could not be made: its content is not tried.
        self._failed: str | None = None
        # Files with several names: the first name, and its inode (None in a dry run that would make it).
        self._first_names: dict[object, tuple[str, int | None]] = {}
        # Files that had several names before this run, and are handled already under one of them.
        self._shared: set[tuple[int, int]] = set()
        if root_fd is not None:
            self._remove_unfinished(self._levels[0])

    def plant(self, entry: Entry) -> Outcome:
        """Make one entry, or check an existing one. Raises OSError of FATAL (ENOSPC, EROFS, ...), and StoreError for a wrong order of entries."""
        if self._failed is not None:
            if entry.path.startswith(self._failed + "/"):
                return Outcome.FAILED
            self._failed = None
        try:
            *above, name = components(entry.path)
            if name == UNFINISHED:
                raise ValueError("a name that fusehsm uses itself")
        except ValueError as error:
            return self._fail(
                entry, f"the store's name for it has {error}, so it is not made; rename it there"
            )
        level = self._level_of("/".join(above))
        try:
            return self._plant(level, name, entry)
        except Refusal as refusal:
            return self._fail(entry, str(refusal))
        except OSError as error:
            if error.errno in FATAL:
                raise OSError(error.errno, error.strerror, entry.path) from error
            return self._fail(entry, error.strerror or str(error))
        except (OverflowError, ValueError) as error:
            return self._fail(entry, f"the store gives it an impossible attribute: {error}")

    def finish(self) -> None:
        """Leave all directories. Call it after the last entry; after a failure call only close()."""
        while len(self._levels) > 1:
            self._leave()

    def close(self) -> None:
        """Close the descriptors of directories that were not left."""
        for level in self._levels[1:]:
            if level.fd is not None and level.parked is None:
                os.close(level.fd)
        del self._levels[1:]

    def _fail(self, entry: Entry, why: str) -> Outcome:
        self._complain(entry.path, why)
        if entry.kind is Kind.DIRECTORY:
            self._failed = entry.path
        return Outcome.FAILED

    def _plant(self, level: _Level, name: str, entry: Entry) -> Outcome:
        status = _status(level.fd, name)
        match entry.kind:
            case Kind.DIRECTORY:
                return self._directory(level, name, entry, status)
            case Kind.SYMLINK:
                return self._symlink(level, name, entry, status)
            case Kind.FILE:
                return self._file(level, name, entry, status)
        return Outcome.LEFT_OUT

    # Directories

    def _level_of(self, path: str) -> _Level:
        """The level of the directory `path`, which is the innermost after the levels below it are left."""
        while (level := self._levels[-1]).path != path:
            if len(self._levels) == 1:
                raise StoreError(
                    errno.EIO, "the store listed an entry of this directory before the directory", path
                )
            self._leave()
        return level

    def _directory(self, level: _Level, name: str, entry: Entry, status: os.stat_result | None) -> Outcome:
        if status is not None and not stat.S_ISDIR(status.st_mode):
            raise _in_the_way(status, "a directory")
        inner = _Level(entry.path, None, entry)
        if status is None:
            outcome = Outcome.NEW
            inner.mode = self._ownership.default(Kind.DIRECTORY)
            if not self._dry_run:
                self._open_up(level)
                # Closed to other users until it has its owner. Without a mode in the store the mode is final now: no later step sets it.
                os.mkdir(name, 0o777 if entry.mode is None else 0o700, dir_fd=level.fd)
        else:
            outcome = Outcome.UPDATED if self._ownership.differs(entry, status) else Outcome.RIGHT
            inner.mode = stat.S_IMODE(status.st_mode)
        if status is not None or not self._dry_run:
            inner.fd = self._open_directory(level.fd, name)
        self._levels.append(inner)
        self._park()
        self._remove_unfinished(inner)
        return outcome

    def _park(self) -> None:
        """Close a directory far above: a store may be deeper than the limit of descriptors. The destination itself stays open."""
        if len(self._levels) > MOST_OPEN + 1:
            level = self._levels[-MOST_OPEN - 1]
            if level.fd is not None:
                level.parked = identity_of(level.fd)
                os.close(level.fd)

    def _unpark(self, level: _Level, inner_fd: int | None) -> None:
        """Open a parked directory again, from the directory `inner_fd` in it if given. Raises OSError ESTALE if it has been moved."""
        if level.parked is not None:
            assert self._root_fd is not None
            level.fd = reopened(self._root_fd, level.path, level.parked, inner_fd)
            level.parked = None

    def _open_directory(self, dir_fd: int | None, name: str) -> int:
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            status = os.fstat(fd)
            if not self._dry_run and self._shuts_out(status, 0o500):
                os.chmod(path_of(fd), stat.S_IMODE(status.st_mode) | 0o700)
            return os.open(".", _OPEN_DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)

    def _open_up(self, level: _Level) -> None:
        """Add our write permission to a directory of ours that lacks it, for example in a second run. _leave() sets the final mode."""
        if level.fd is not None and level.entry is not None:
            status = os.fstat(level.fd)
            if self._shuts_out(status, 0o700):
                os.fchmod(level.fd, stat.S_IMODE(status.st_mode) | 0o700)

    def _shuts_out(self, status: os.stat_result, wanted: int) -> bool:
        is_ours = status.st_uid == os.geteuid() and not self._ownership.is_root
        return is_ours and status.st_mode & wanted != wanted

    def _leave(self) -> None:
        # Before the mode is set: afterwards the mode may forbid the way through it.
        self._unpark(self._levels[-2], self._levels[-1].fd)
        level = self._levels.pop()
        if level.fd is None:
            return
        try:
            if level.entry is not None and not self._dry_run:
                self._ownership.apply(level.entry, level.fd, level.mode)
                _set_time(level.entry, level.fd)
        except OSError as error:
            self._complain(level.path, f"its mode, owner or time cannot be set: {error.strerror}")
        finally:
            os.close(level.fd)

    def _remove_unfinished(self, level: _Level) -> None:
        """Remove the named unfinished file of a killed run. Calls complain() if it is not ours."""
        status = _status(level.fd, UNFINISHED)
        if status is None or self._dry_run:
            return
        if stat.S_ISREG(status.st_mode):
            with self._opened(level.fd, UNFINISHED, status) as file:
                # A second name of a file of ours, or a stub without its first name.
                if is_all_hole(file.fd) or (
                    status.st_nlink > 1
                    and any(stub_mark.read(file.fd, each) is not None for each in Namespace)
                ):
                    os.unlink(UNFINISHED, dir_fd=level.fd)
                    return
        path = f"{level.path}/{UNFINISHED}".lstrip("/")
        self._complain(path, "has a name that fusehsm needs here; remove or rename it")

    # Symbolic links

    def _symlink(self, level: _Level, name: str, entry: Entry, status: os.stat_result | None) -> Outcome:
        if entry.target is None:
            raise Refusal("the store does not tell where this symbolic link leads to")
        outcome = Outcome.NEW
        if status is not None:
            if not stat.S_ISLNK(status.st_mode):
                raise _in_the_way(status, "a symbolic link")
            if os.readlink(name, dir_fd=level.fd) != entry.target:
                raise Refusal("is a symbolic link to something else than in the store; remove or rename it")
            if not self._ownership.differs(entry, status) and entry.mtime_ns in (None, status.st_mtime_ns):
                return Outcome.RIGHT
            outcome = Outcome.UPDATED
        if self._dry_run:
            return outcome
        if status is None:
            self._open_up(level)
            os.symlink(entry.target, name, dir_fd=level.fd)
        self._ownership.apply_to_link(entry, name, level.fd)
        if entry.mtime_ns is not None:
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=level.fd, follow_symlinks=False)
        return outcome

    # Files

    def _file(self, level: _Level, name: str, entry: Entry, status: os.stat_result | None) -> Outcome:
        if entry.size is None:
            raise Refusal("the store does not tell its size, so there can be no stub")
        first = self._first_names.get(entry.identity) if entry.identity is not None else None
        if first is not None:
            return self._link(level, name, first, status)
        if status is None:
            inode = None if self._dry_run else self._make(level, name, entry)
            outcome = Outcome.NEW
        elif (status.st_dev, status.st_ino) in self._shared:
            # Names of one file here, but of several files in the store, which has separated them.
            self._expect_stub(level, name, status)
            inode = None if self._dry_run else self._make(level, name, entry, replacing=True)
            outcome = Outcome.UPDATED
        else:
            inode, outcome = status.st_ino, self._existing(level, name, entry, status)
            if status.st_nlink > 1:
                self._shared.add((status.st_dev, status.st_ino))
        # An empty file of a user is no name of this file.
        if entry.identity is not None and (entry.size or outcome is not Outcome.KEPT):
            self._first_names[entry.identity] = (entry.path, inode)
        return outcome

    def _make(self, level: _Level, name: str, entry: Entry, *, replacing: bool = False) -> int:
        """Make a stub and give it its name; `replacing`: it replaces a stub. Returns its inode number. Raises OSError EEXIST without `replacing`."""
        self._open_up(level)
        fd = self._new_file(level)
        try:
            self._shape(fd, entry, self._ownership.default(Kind.FILE))
            if self._unnamed:
                os.link(path_of(fd), os.fsencode(UNFINISHED if replacing else name), dst_dir_fd=level.fd)
            elif not replacing:
                os.link(UNFINISHED, name, src_dir_fd=level.fd, dst_dir_fd=level.fd, follow_symlinks=False)
            if replacing:
                os.rename(UNFINISHED, name, src_dir_fd=level.fd, dst_dir_fd=level.fd)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)
            if not self._unnamed:
                with suppress(FileNotFoundError):
                    os.unlink(UNFINISHED, dir_fd=level.fd)

    def _new_file(self, level: _Level) -> int:
        if self._unnamed:
            try:
                return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=level.fd)
            except OSError as error:
                if error.errno not in NO_UNNAMED_FILES:
                    raise
                self._unnamed = False
        return os.open(
            UNFINISHED,
            os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
            dir_fd=level.fd,
        )

    def _shape(self, fd: int, entry: Entry, default_mode: int) -> None:
        """Make the stub of `entry` from an empty file (or a stub) that its owner may write to. The mode comes last: it may remove that right."""
        assert entry.size is not None
        os.truncate(path_of(fd), entry.size)
        _set_time(entry, fd)
        StubMark.of(fd, entry.path, entry.version).write(fd, self._namespace)
        self._ownership.apply(entry, fd, default_mode)

    def _existing(self, level: _Level, name: str, entry: Entry, status: os.stat_result) -> Outcome:
        """Update an existing stub. `status`: from before its mode is changed. Raises Refusal if the file is no stub, or has other content."""
        if not stat.S_ISREG(status.st_mode):
            raise _in_the_way(status, "a file")
        with self._opened(level.fd, name, status) as file:
            mark = stub_mark.read(file.fd, self._namespace)
            is_taken_over = False
            if self._namespace is not Namespace.USER:
                if mark is None:
                    mark = take_over(file.fd, entry, self._namespace, dry_run=self._dry_run)
                    is_taken_over = mark is not None
                elif not self._dry_run:
                    remove_old(file.fd)
            if mark is None:
                if not status.st_size and not entry.size:
                    return Outcome.KEPT  # an empty file has no content to lose or to fetch
                raise Refusal(_NOT_A_STUB)
            empty = is_all_hole(file.fd)
            if not mark.describes(file.fd, os.fstat(file.fd)) or (mark.is_pending and not empty):
                raise Refusal("was a stub and has been changed since; remove or rename it")
            wanted = StubMark.of(file.fd, entry.path, entry.version)
            if not empty:
                if (mark.path, mark.version) == (wanted.path, wanted.version):
                    return Outcome.UPDATED if is_taken_over else Outcome.KEPT
                raise Refusal(
                    "holds content of another version than the store's; remove it and populate again"
                )
            timed = entry.mtime_ns in (None, status.st_mtime_ns)
            reshape = mark != wanted or status.st_size != entry.size or not timed
            if not reshape and not self._ownership.differs(entry, status):
                return Outcome.UPDATED if is_taken_over else Outcome.RIGHT
            if not self._dry_run:
                file.mode = None
                if reshape:
                    os.fchmod(file.fd, stat.S_IMODE(status.st_mode) | 0o600)
                    mark.pending().write(file.fd, self._namespace)
                    self._shape(file.fd, entry, stat.S_IMODE(status.st_mode))
                else:
                    self._ownership.apply(entry, file.fd, stat.S_IMODE(status.st_mode))
            return Outcome.UPDATED

    @contextmanager
    def _opened(self, dir_fd: int | None, name: str, status: os.stat_result) -> Iterator[_Opened]:
        """Open the regular file of that status for reading. A file of ours without read permission gets it meanwhile. Raises Refusal."""
        path_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        mode = None
        try:
            now = os.fstat(path_fd)
            if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
                raise Refusal("was replaced while it was looked at; populate again")
            try:
                fd = os.open(path_of(path_fd), _OPEN_FILE)
            except PermissionError:
                if self._dry_run or status.st_uid != os.geteuid():
                    raise
                mode = stat.S_IMODE(status.st_mode)
                os.chmod(path_of(path_fd), mode | 0o400)
                fd = os.open(path_of(path_fd), _OPEN_FILE)
        finally:
            os.close(path_fd)
        file = _Opened(fd, mode)
        try:
            yield file
        finally:
            if file.mode is not None:
                os.fchmod(fd, file.mode)
            os.close(fd)

    # Further names of a file

    def _link(
        self, level: _Level, name: str, first: tuple[str, int | None], status: os.stat_result | None
    ) -> Outcome:
        path, inode = first
        if status is not None:
            if inode == status.st_ino:
                return Outcome.RIGHT
            if not stat.S_ISREG(status.st_mode):
                raise _in_the_way(status, "a file")
            self._expect_stub(level, name, status)
        outcome = Outcome.NEW if status is None else Outcome.UPDATED
        if self._dry_run:
            return outcome
        assert self._root_fd is not None
        self._open_up(level)
        fd = open_beneath(self._root_fd, path, os.O_PATH)
        try:
            if os.fstat(fd).st_ino != inode:
                raise Refusal(f"its first name {path} was replaced meanwhile; populate again")
            if status is None:
                os.link(path_of(fd), os.fsencode(name), dst_dir_fd=level.fd)
            else:
                os.link(path_of(fd), os.fsencode(UNFINISHED), dst_dir_fd=level.fd)
                os.rename(UNFINISHED, name, src_dir_fd=level.fd, dst_dir_fd=level.fd)
        finally:
            os.close(fd)
        return outcome

    def _expect_stub(self, level: _Level, name: str, status: os.stat_result) -> None:
        with self._opened(level.fd, name, status) as file:
            mark = stub_mark.read(file.fd, self._namespace)
            if mark is None or not mark.describes(file.fd, os.fstat(file.fd)) or not is_all_hole(file.fd):
                raise Refusal(_NOT_A_STUB)


def _status(dir_fd: int | None, name: str) -> os.stat_result | None:
    """lstat(2); None if the name does not exist."""
    if dir_fd is None:
        return None
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _set_time(entry: Entry, fd: int) -> None:
    if entry.mtime_ns is not None and os.fstat(fd).st_mtime_ns != entry.mtime_ns:
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _in_the_way(status: os.stat_result, wanted: str) -> Refusal:
    what = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    found = what.get(stat.S_IFMT(status.st_mode), "a special file")
    return Refusal(f"is {found} here and {wanted} in the store; remove or rename it")
