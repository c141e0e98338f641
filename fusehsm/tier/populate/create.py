"""Making stubs in a directory: one entry of a store after the other, in the order of Store.tree().

A new file appears at once and complete: it is made without a name, gets its size, owner, time and mark, and then its name (O_TMPFILE and linkat(2),
which never replaces a file). So a killed run leaves no half-made file, and the next run goes on where it stopped. A directory gets its mode and time
after its content is made.

Populate touches nothing outside the destination: every name is one component, used with the descriptor of its directory, and no symbolic link is
followed. It changes no file that is not a stub (tier/stubs/mark.py). No fetch may fill stubs at the same time (tier/populate/lock.py).

Other users may own directories of the destination, and may put another file at a name at any moment. So a name is looked up once, what it leads to
is checked on the descriptor, and owner, mode and times are set on that descriptor.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fusehsm.linux.beneath import (
    MOST_OPEN,
    Identity,
    components,
    identity_of,
    open_beneath,
    reopened,
)
from fusehsm.overlay.attributes import path_of
from fusehsm.tier.populate.lookup import (
    OPEN_DIRECTORY,
    REPLACED,
    UNFINISHED,
    Found,
    Refusal,
    in_the_way,
    is_empty_and_ours,
    looked_up,
    opened,
    replace,
    target_of,
)
from fusehsm.tier.populate.ownership import Movers, Ownership, movers_in
from fusehsm.tier.populate.takeover import remove_old, take_over
from fusehsm.tier.stores.base import Entry, Kind, StoreError
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs.mark import StubMark, is_all_hole
from fusehsm.tier.stubs.tree import Namespace

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
    # The users who may have put a directory at a name in it.
    movers: Movers = frozenset()
    # False: its owner, mode and time stay, because it may be another directory than the one that was made.
    is_changed: bool = True

    @property
    def opened(self) -> int:
        """The descriptor of a directory that exists."""
        assert self.fd is not None
        return self.fd


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
        movers: Movers = frozenset() if root_fd is None else movers_in(os.fstat(root_fd))
        self._levels = [_Level("", root_fd, None, movers=movers)]
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
        if entry.kind is Kind.OTHER:
            return Outcome.LEFT_OUT
        with looked_up(level.fd, name) as found:
            match entry.kind:
                case Kind.DIRECTORY:
                    return self._directory(level, name, entry, found)
                case Kind.SYMLINK:
                    return self._symlink(level, name, entry, found)
                case _:
                    return self._file(level, name, entry, found)

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

    def _directory(self, level: _Level, name: str, entry: Entry, found: Found | None) -> Outcome:
        if found is None:
            inner, outcome = self._new_directory(level, name, entry), Outcome.NEW
        else:
            inner, outcome = self._existing_directory(level, entry, found)
        self._levels.append(inner)
        self._park()
        self._remove_unfinished(inner)
        return outcome

    def _new_directory(self, level: _Level, name: str, entry: Entry) -> _Level:
        inner = _Level(entry.path, None, entry, self._ownership.default(Kind.DIRECTORY))
        if self._dry_run:
            return inner
        self._open_up(level)
        # Closed to other users until it has its owner. Without a mode in the store the mode is final now: no later step sets it.
        os.mkdir(name, 0o777 if entry.mode is None else 0o700, dir_fd=level.fd)
        with looked_up(level.fd, name) as made:
            if made is None or not stat.S_ISDIR(made.status.st_mode) or made.status.st_uid != os.geteuid():
                raise Refusal(REPLACED)
            inner.fd = self._open_directory(made)
        try:
            # mkdir(2) gives no descriptor. If this is another directory of ours after all, its owner and mode do not matter while it is empty.
            if os.listdir(inner.fd):
                raise Refusal(REPLACED)
            inner.movers = self._movers_below(level, os.fstat(inner.fd))
        except BaseException:
            os.close(inner.fd)
            raise
        return inner

    def _existing_directory(self, level: _Level, entry: Entry, found: Found) -> tuple[_Level, Outcome]:
        status = found.status
        if not stat.S_ISDIR(status.st_mode):
            raise in_the_way(status, "a directory")
        differs = self._ownership.differs(entry, status)
        is_theirs = self._ownership.may_be_anothers(level.movers, status)
        if differs and is_theirs and not is_empty_and_ours(found):
            raise Refusal(
                "has another owner or mode than in the store, and a user who may rename it could have put it here; if it is the right one, set "
                "them with chown and chmod, else rename it"
            )
        inner = _Level(
            entry.path,
            self._open_directory(found),
            entry,
            stat.S_IMODE(status.st_mode),
            movers=self._movers_below(level, status),
            is_changed=differs or not is_theirs,
        )
        return inner, Outcome.UPDATED if differs else Outcome.RIGHT

    def _movers_below(self, level: _Level, status: os.stat_result) -> Movers:
        """The users who may have put an entry into the directory of that status in `level`, or that directory into `level`."""
        here = movers_in(status)
        return None if here is None or level.movers is None else here | level.movers

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

    def _open_directory(self, found: Found) -> int:
        if not self._dry_run and self._shuts_out(found.status, 0o500):
            os.chmod(path_of(found.fd), stat.S_IMODE(found.status.st_mode) | 0o700)
        return os.open(".", OPEN_DIRECTORY, dir_fd=found.fd)

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
            if level.entry is not None and level.is_changed and not self._dry_run:
                self._ownership.apply(level.entry, level.fd, level.mode)
                _set_time(level.entry, level.fd)
        except OSError as error:
            self._complain(level.path, f"its mode, owner or time cannot be set: {error.strerror}")
        finally:
            os.close(level.fd)

    def _remove_unfinished(self, level: _Level) -> None:
        """Remove the named unfinished file of a killed run. Calls complain() if it is not ours."""
        if self._dry_run:
            return
        with looked_up(level.fd, UNFINISHED) as found:
            if found is None:
                return
            if stat.S_ISREG(found.status.st_mode):
                with opened(found, unchanged=self._dry_run) as file:
                    # A second name of a file of ours, or a stub without its first name.
                    is_second = found.status.st_nlink > 1 and any(
                        stub_mark.read(file.fd, each) for each in Namespace
                    )
                    if is_second or is_all_hole(file.fd):
                        os.unlink(UNFINISHED, dir_fd=level.fd)
                        return
        path = f"{level.path}/{UNFINISHED}".lstrip("/")
        self._complain(path, "has a name that fusehsm needs here; remove or rename it")

    # Symbolic links

    def _symlink(self, level: _Level, name: str, entry: Entry, found: Found | None) -> Outcome:
        if entry.target is None:
            raise Refusal("the store does not tell where this symbolic link leads to")
        if found is None:
            if not self._dry_run:
                self._open_up(level)
                os.symlink(entry.target, name, dir_fd=level.fd)
                with looked_up(level.fd, name) as made:
                    if made is None or made.status.st_uid != os.geteuid() or target_of(made) != entry.target:
                        raise Refusal(REPLACED)
                    self._shape_link(made, entry)
            return Outcome.NEW
        if not stat.S_ISLNK(found.status.st_mode):
            raise in_the_way(found.status, "a symbolic link")
        if target_of(found) != entry.target:
            raise Refusal("is a symbolic link to something else than in the store; remove or rename it")
        if not self._ownership.differs(entry, found.status) and entry.mtime_ns in (
            None,
            found.status.st_mtime_ns,
        ):
            return Outcome.RIGHT
        if not self._dry_run:
            self._shape_link(found, entry)
        return Outcome.UPDATED

    def _shape_link(self, found: Found, entry: Entry) -> None:
        self._ownership.apply_to_link(entry, found.fd)
        if entry.mtime_ns is not None:
            os.utime(path_of(found.fd), ns=(entry.mtime_ns, entry.mtime_ns))

    # Files

    def _file(self, level: _Level, name: str, entry: Entry, found: Found | None) -> Outcome:
        if entry.size is None:
            raise Refusal("the store does not tell its size, so there can be no stub")
        first = self._first_names.get(entry.identity) if entry.identity is not None else None
        if first is not None:
            return self._link(level, name, first, found)
        if found is None:
            inode = None if self._dry_run else self._make(level, name, entry)
            outcome = Outcome.NEW
        elif (found.status.st_dev, found.status.st_ino) in self._shared:
            # Names of one file here, but of several files in the store, which has separated them.
            self._expect_stub(found)
            inode = None if self._dry_run else self._make(level, name, entry, found)
            outcome = Outcome.UPDATED
        else:
            inode, outcome = found.status.st_ino, self._existing(entry, found)
            if found.status.st_nlink > 1:
                self._shared.add((found.status.st_dev, found.status.st_ino))
        # An empty file of a user is no name of this file.
        if entry.identity is not None and (entry.size or outcome is not Outcome.KEPT):
            self._first_names[entry.identity] = (entry.path, inode)
        return outcome

    def _make(self, level: _Level, name: str, entry: Entry, replaced: Found | None = None) -> int:
        """Make a stub and give it its name; `replaced`: the stub in whose place it comes. Returns its inode number.

        Raises OSError EEXIST if the name exists, unless it is that of `replaced`.
        """
        self._open_up(level)
        fd = self._new_file(level)
        try:
            self._shape(fd, entry, self._ownership.default(Kind.FILE))
            if replaced is None:
                os.link(path_of(fd), os.fsencode(name), dst_dir_fd=level.fd)
            else:
                if self._unnamed:
                    os.link(path_of(fd), os.fsencode(UNFINISHED), dst_dir_fd=level.fd)
                replace(level.opened, name, replaced)
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

    def _existing(self, entry: Entry, found: Found) -> Outcome:
        """Update an existing stub. Raises Refusal if the file is no stub, or has other content."""
        if not stat.S_ISREG(found.status.st_mode):
            raise in_the_way(found.status, "a file")
        with opened(found, unchanged=self._dry_run) as file:
            status = file.status
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

    # Further names of a file

    def _link(self, level: _Level, name: str, first: tuple[str, int | None], found: Found | None) -> Outcome:
        path, inode = first
        if found is not None:
            if inode == found.status.st_ino:
                return Outcome.RIGHT
            if not stat.S_ISREG(found.status.st_mode):
                raise in_the_way(found.status, "a file")
            self._expect_stub(found)
        outcome = Outcome.NEW if found is None else Outcome.UPDATED
        if self._dry_run:
            return outcome
        assert self._root_fd is not None
        self._open_up(level)
        fd = open_beneath(self._root_fd, path, os.O_PATH)
        try:
            original = Found(fd, os.fstat(fd))
            # The inode's number may be that of another file by now.
            if original.status.st_ino != inode or not self._is_stub_of(original, path):
                raise Refusal(f"its first name {path} was replaced meanwhile; populate again")
            if found is None:
                os.link(path_of(fd), os.fsencode(name), dst_dir_fd=level.fd)
            else:
                os.link(path_of(fd), os.fsencode(UNFINISHED), dst_dir_fd=level.fd)
                replace(level.opened, name, found)
        finally:
            os.close(fd)
        return outcome

    def _is_stub_of(self, found: Found, path: str) -> bool:
        """Whether it is a stub, filled or not, of that path in the store."""
        if not stat.S_ISREG(found.status.st_mode):
            return False
        with opened(found, unchanged=self._dry_run) as file:
            mark = stub_mark.read(file.fd, self._namespace)
            return (
                mark is not None
                and mark.path == stub_mark.digest(path)
                and mark.describes(file.fd, os.fstat(file.fd))
            )

    def _expect_stub(self, found: Found) -> None:
        with opened(found, unchanged=self._dry_run) as file:
            mark = stub_mark.read(file.fd, self._namespace)
            if mark is None or not mark.describes(file.fd, os.fstat(file.fd)) or not is_all_hole(file.fd):
                raise Refusal(_NOT_A_STUB)


def _set_time(entry: Entry, fd: int) -> None:
    if entry.mtime_ns is not None and os.fstat(fd).st_mtime_ns != entry.mtime_ns:
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
