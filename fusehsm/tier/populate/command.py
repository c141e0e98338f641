"""`fusehsm populate STORE DST`: makes a stub in DST for every file of the store, and the store's directories and links.

It may be killed at any moment and run again. The next run keeps right entries, makes missing ones, and updates the stubs of files that have changed
in the store. It never overwrites content. It does not run while a fetch fills the same stubs (tier/populate/lock.py).
"""

import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Final

from fusehsm.linux.mountinfo import mount_of_descriptor
from fusehsm.text import shown
from fusehsm.tier.populate.create import NO_UNNAMED_FILES, Outcome, Planter
from fusehsm.tier.populate.lock import locked
from fusehsm.tier.populate.lookup import UNFINISHED
from fusehsm.tier.stores.base import Entry, Kind, Store, StoreError
from fusehsm.tier.stores.open import expect_apart, open_store
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs.tree import Namespace, expect_visible, note_namespace
from fusehsm.tier.text import Progress, progress_line, size_text

_TRIAL_SIZE: Final = 1 << 20  # bytes; more than a file system keeps in an inode


@dataclass(frozen=True, slots=True)
class PopulateOptions:
    """The command line of `fusehsm populate`."""

    # Path or URL of the store.
    store: str
    # The directory for the stubs.
    destination: str
    # Look, and change nothing.
    dry_run: bool = False


@dataclass(slots=True)
class Counts:
    """The progress of a run."""

    # Number of entries that did not fail, by type.
    kinds: Counter[Kind] = field(default_factory=Counter)
    # Number of entries by outcome.
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    # Bytes of the files that have stubs.
    size: int = 0
    # Number of messages about failures.
    complaints: int = 0

    @property
    def entries(self) -> int:
        return self.outcomes.total()

    def add(self, entry: Entry, outcome: Outcome) -> None:
        """Count one entry."""
        self.outcomes[outcome] += 1
        if outcome is not Outcome.FAILED:
            self.kinds[entry.kind] += 1
            self.size += entry.size or 0


def populate(options: PopulateOptions) -> int:
    """Make the stubs, and print a line for each failure and a summary. Returns the exit code: 1 if anything failed.

    Raises ValueError for an impossible URL or path, OSError if the store or the destination cannot be used at all.
    """
    started = time.monotonic()
    counts = Counts()

    def complain(path: str, why: str) -> None:
        counts.complaints += 1
        place = os.path.join(options.destination, path)
        print(f"fusehsm: {shown(place)}: {why}", file=sys.stderr, flush=True)

    def unlisted(error: StoreError) -> None:
        complain(os.fsdecode(error.filename or ""), error.strerror or str(error))

    with (
        open_store(options.store) as store,
        _destination(options, store) as root_fd,
        Progress(
            lambda seconds: progress_line(counts.entries, counts.size, counts.complaints, seconds)
        ) as progress,
        closing(Planter(root_fd, complain, dry_run=options.dry_run)) as planter,
    ):
        for entry in store.tree(unlisted):
            try:
                outcome = planter.plant(entry)
            except OSError as error:
                why = f"{error.strerror}; fix that and run populate again; the stubs made so far are right"
                raise OSError(error.errno, why, os.path.join(options.destination, entry.path)) from error
            counts.add(entry, outcome)
            progress.tick()
        planter.finish()
    print(summary(options, counts, time.monotonic() - started))
    if counts.size and not options.dry_run:
        fix = f"fusehsm fetch {shown(store.name)} {shown(options.destination)}"
        print(f"nobody serves {shown(options.destination)} yet: stubs read as zeros until `{fix}` runs")
    return 1 if counts.complaints else 0


def summary(options: PopulateOptions, counts: Counts, seconds: float) -> str:
    """The last line, with the counts; `seconds` of the run."""

    def number(count: int, word: str) -> str:
        return f"{count:,} {word if count == 1 else _PLURALS[word]}"

    kinds = [
        number(counts.kinds[Kind.FILE], "file") + f" of {size_text(counts.size)}",
        number(counts.kinds[Kind.DIRECTORY], "directory"),
        number(counts.kinds[Kind.SYMLINK], "symbolic link"),
    ]
    outcomes = [
        f"{counts.outcomes[outcome]:,} {outcome.value}" for outcome in Outcome if counts.outcomes[outcome]
    ]
    what = "dry run, nothing was changed in" if options.dry_run else "populated"
    rate = counts.entries / max(seconds, 1e-3)
    line = f"{what} {shown(options.destination)}: {', '.join(kinds)}"
    if outcomes:
        line += f"; {', '.join(outcomes)}"
    return f"{line}; {seconds:.1f} s ({rate:,.0f} a second)"


_PLURALS: Final = {"file": "files", "directory": "directories", "symbolic link": "symbolic links"}


@contextmanager
def _destination(options: PopulateOptions, store: Store) -> Iterator[int | None]:
    """The destination's descriptor; None in a dry run if it does not exist. Else it is made, tried and locked. Raises OSError, ValueError."""
    path = options.destination
    expect_apart(store, path)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if not os.path.lexists(path):
        if options.dry_run:
            yield None
            return
        os.mkdir(path)
        flags |= os.O_NOFOLLOW  # of a directory above, the user has the say; this one was made here
    fd = os.open(path, flags)
    try:
        if mount_of_descriptor(fd).is_fusehsm:
            fix = (
                f"unmount it first (fusehsm umount {shown(path)}), or populate the directory that it overlays"
            )
            raise OSError(errno.EBUSY, f"lies on a mount of fusehsm; {fix}", path)
        expect_visible(fd, path)
        if options.dry_run:
            yield fd
            return
        namespace = Namespace.at(fd)
        _try_file_system(fd, path, namespace)
        with locked(fd, path):
            note_namespace(fd, namespace)
            yield fd
    finally:
        os.close(fd)


def _try_file_system(root_fd: int, path: str, namespace: Namespace) -> None:
    """Try with a file without a name (if possible) whether stubs can be made and recognized here. Raises OSError EOPNOTSUPP if not."""
    fix = "choose a destination on ext4, xfs or btrfs"
    try:
        fd = _trial_file(root_fd)
        if fd is None:
            return
        try:
            os.ftruncate(fd, _TRIAL_SIZE)
            if not stub_mark.is_all_hole(fd):
                what = "does not report holes"
                raise OSError(
                    errno.EOPNOTSUPP, f"its file system {what}, so a stub could not be recognized; {fix}"
                )
            os.setxattr(fd, namespace.stub, b"trial")
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # perhaps nothing needs to be made
        why = error.strerror
        if error.errno == errno.EOPNOTSUPP and fix not in str(why):
            why = f"its file system keeps no attributes (user.*), so a stub could not be recognized; {fix}"
        raise OSError(error.errno, why, path) from None


def _trial_file(root_fd: int) -> int | None:
    """A file without a name, for a trial. None if it needs a name and that name exists (the planter deals with it). Raises OSError of open(2)."""
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
    except OSError as error:
        if error.errno not in NO_UNNAMED_FILES:
            raise
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(UNFINISHED, flags, 0o600, dir_fd=root_fd)
    except FileExistsError:
        return None
    os.unlink(UNFINISHED, dir_fd=root_fd)
    return fd
