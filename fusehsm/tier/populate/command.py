"""`fusehsm populate STORE DST`: a stub in DST for every file of the store, and its directories and links.

It may be killed at any moment and run again: what is right stays as it is, what is missing is made, and stubs of what has changed in the store are
changed. Content is never overwritten. It does not run while somebody fills the same stubs (tier/populate/lock.py).
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

from fusehsm.linux.mountinfo import mount_of
from fusehsm.text import shown
from fusehsm.tier.populate.create import NO_UNNAMED_FILES, UNFINISHED, Outcome, Planter
from fusehsm.tier.populate.lock import locked
from fusehsm.tier.stores.base import Entry, Kind, Store, StoreError
from fusehsm.tier.stores.open import expect_apart, open_store
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.text import Progress, progress_line, size_text

_TRIAL_SIZE: Final = 1 << 20  # bytes; larger than what a file system keeps in an inode


@dataclass(frozen=True, slots=True)
class PopulateOptions:
    """The command line of `fusehsm populate`."""

    store: str
    destination: str
    dry_run: bool = False


@dataclass(slots=True)
class Counts:
    """How far a run is. `size`: bytes of the files that have stubs."""

    kinds: Counter[Kind] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    size: int = 0
    complaints: int = 0

    @property
    def entries(self) -> int:
        return self.outcomes.total()

    def add(self, entry: Entry, outcome: Outcome) -> None:
        """One entry more."""
        self.outcomes[outcome] += 1
        if outcome is not Outcome.FAILED:
            self.kinds[entry.kind] += 1
            self.size += entry.size or 0


def populate(options: PopulateOptions) -> int:
    """Do it, and return the exit code: 1 if anything failed, of which each has had its line. Prints a summary.

    Raises ValueError for a URL or path that cannot be meant, OSError when the store or the destination is no good at all.
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
                why = f"{error.strerror}; mend that and run it again, what is there is right"
                raise OSError(error.errno, why, os.path.join(options.destination, entry.path)) from error
            counts.add(entry, outcome)
            progress.tick()
        planter.finish()
    print(summary(options, counts, time.monotonic() - started))
    return 1 if counts.complaints else 0


def summary(options: PopulateOptions, counts: Counts, seconds: float) -> str:
    """The line at the end."""

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
    """The destination's descriptor; it is made if it is not there, except in a dry run, which has None then."""
    path = options.destination
    expect_apart(store, path)
    if not os.path.lexists(path):
        if options.dry_run:
            yield None
            return
        os.mkdir(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if mount_of(path).is_fusehsm:
            mend = (
                f"unmount it first (fusehsm umount {shown(path)}), or populate the directory that it overlays"
            )
            raise OSError(errno.EBUSY, f"lies on a mount of fusehsm; {mend}", path)
        if options.dry_run:
            yield fd
            return
        _try_file_system(fd, path)
        with locked(fd, path):
            yield fd
    finally:
        os.close(fd)


def _try_file_system(root_fd: int, path: str) -> None:
    """See on a file without a name (where that is possible) that stubs can be made and known here. Raises OSError if not."""
    mend = "choose a destination on ext4, xfs or btrfs"
    try:
        fd = _trial_file(root_fd)
        if fd is None:
            return
        try:
            os.ftruncate(fd, _TRIAL_SIZE)
            if not stub_mark.is_all_hole(fd):
                what = "does not tell holes"
                raise OSError(errno.EOPNOTSUPP, f"its file system {what}, so no stub could be known; {mend}")
            os.setxattr(fd, stub_mark.NAME, b"trial")
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # perhaps there is nothing to be made
        why = error.strerror
        if error.errno == errno.EOPNOTSUPP and mend not in str(why):
            why = f"its file system keeps no attributes (user.*), so no stub could be known; {mend}"
        raise OSError(error.errno, why, path) from None


def _trial_file(root_fd: int) -> int | None:
    """A file to try things on, without a name any more; None where that needs a name and it is taken (the planter looks whose it is)."""
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
