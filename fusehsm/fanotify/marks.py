"""The marks of one group. They decide whether the group hears an event about an inode.

The rules are those of ``fanotify_group_event_mask``, ``fsnotify_effective_ignore_mask`` and
``fanotify_may_update_existing_mark``, each compared with Linux 6.18. A mount mark and a filesystem mark are distinct objects.

A tree of fusehsm has one mount that the daemon made, MAIN. Others may be made of it: bind mounts, clones, copies in other mount namespaces.
A mark on one of these means that mount, as in the kernel. A mark on MAIN hears the accesses by every mount: they were to be filled by
its listener before mounts were told apart, and a container that has the tree by a bind mount must not read zeros.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from fusehsm.fanotify.abi import (
    CONTENT_PERM_EVENTS,
    FAN_EVENT_FLAGS,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORE_BITS,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_INODE,
    FAN_MARK_MOUNT,
    FAN_MARK_TYPE_MASK,
    FAN_ONDIR,
    LINUX_6_14,
    NOTIFICATION_EVENTS,
    Dialect,
    mask_names,
)

_ALL_BITS: Final = 0xFFFF_FFFF


class MountKey(NamedTuple):
    """A mount of the tree."""

    #: mountinfo's number of the mount; 0 for MAIN.
    number: int
    #: The number that no other mount gets; None where the kernel does not tell it.
    unique: int | None = None

    def is_same(self, other: MountKey) -> bool:
        """Whether two keys mean one mount, as far as they tell."""
        if self.number != other.number:
            return False
        return self.unique is None or other.unique is None or self.unique == other.unique


MAIN: Final = MountKey(0)  # the mount that the daemon made


class Subject(NamedTuple):
    """The file or directory that an event is about. Inode numbers are the mount's own."""

    inode: int
    #: Every known directory with a name of the file. A file can have several names, and an event does not tell which one was used.
    parents: tuple[int, ...]
    is_dir: bool
    #: The mount by which it is accessed; None if that is not known. Then it is heard by every mount, and no mount's ignore mark counts.
    mount: MountKey | None = MAIN


@dataclass(slots=True)
class _Mark:
    """The mark of one object (kernel: ``struct fsnotify_mark``)."""

    #: The events that the group wants.
    mask: int = 0
    #: The events that the group does not want.
    ignore_mask: int = 0
    #: FAN_MARK_IGNORED_SURV_MODIFY was given: the ignore mask stays after a write.
    survives_modify: bool = False
    #: FAN_MARK_IGNORE was given: the ignore mask has event flags of its own.
    own_ignore_flags: bool = False
    #: FAN_MARK_EVICTABLE was given: the mark does not keep its inode in memory.
    evictable: bool = False

    def heard(self, is_dir: bool, on_child: bool) -> int:
        """The events that this mark wants about a directory or another file, on the object itself or on a child of it."""
        if (is_dir and not self.mask & FAN_ONDIR) or (on_child and not self.mask & FAN_EVENT_ON_CHILD):
            return 0
        return self.mask

    def ignored(self, is_dir: bool, on_child: bool) -> int:
        """The events that this mark keeps from its group."""
        flags = self.ignore_mask
        if not self.own_ignore_flags:
            # FAN_MARK_IGNORED_MASK holds for directories always, and for children if the mark itself watches children.
            flags = FAN_ONDIR | self.mask & FAN_EVENT_ON_CHILD
        if (is_dir and not flags & FAN_ONDIR) or (on_child and not flags & FAN_EVENT_ON_CHILD):
            return 0
        return self.ignore_mask

    @property
    def interest(self) -> int:
        """The events that the kernel counts as watched on the object, ignored events too (``fsnotify_calc_mask``)."""
        return self.mask | self.ignore_mask

    @property
    def ends_with_write(self) -> bool:
        """Whether a write removes its ignore mask."""
        return self.ignore_mask != 0 and not self.survives_modify

    @property
    def flags(self) -> int:
        """The mark flags as /proc/PID/fdinfo shows them (mflags)."""
        return (
            (FAN_MARK_IGNORED_SURV_MODIFY if self.survives_modify else 0)
            | (FAN_MARK_EVICTABLE if self.evictable else 0)
            | (FAN_MARK_IGNORE if self.own_ignore_flags else 0)
        )


class MarkTable:
    """All marks of one group. Inode numbers are the mount's own. Two threads must not use a table at the same time."""

    def __init__(self, dialect: Dialect = LINUX_6_14) -> None:
        self.dialect = dialect
        self._inodes: dict[int, _Mark] = {}
        self._mounts: dict[MountKey, _Mark] = {}
        self._filesystem: _Mark | None = None
        # The masks of mount and filesystem marks together, computed once for each change; the index is is_dir.
        self._wide_heard = (0, 0)
        self._wide_ignored = (0, 0)
        self._wide_watched = 0
        self._any_ends_with_write = False
        #: Whether it matters by which mount a file is accessed.
        self.tells_mounts = False
        #: The notifications that any of the marks wants, or wanted before its inode was deleted.
        self.notified = 0
        #: The permission events, other than pre-content events, that any of the marks wants, or wanted before its inode was deleted.
        self.permissions = 0

    @property
    def empty(self) -> bool:
        """Whether the group has no marks."""
        return not self._inodes and not self._mounts and self._filesystem is None

    def copy(self) -> MarkTable:
        """An independent table with the same marks."""
        twin = MarkTable(self.dialect)
        twin._inodes = {inode: replace(mark) for inode, mark in self._inodes.items()}
        twin._mounts = {mount: replace(mark) for mount, mark in self._mounts.items()}
        twin._filesystem = self._filesystem and replace(self._filesystem)
        twin._refresh()
        return twin

    def modify(
        self,
        flags: int,
        mask: int,
        inode: int | None,
        *,
        opened_for_write: bool,
        is_dir: bool = True,
        mount: MountKey = MAIN,
    ) -> None:
        """FAN_MARK_ADD or FAN_MARK_REMOVE, with arguments that :func:`fusehsm.fanotify.rules.check_mark` has accepted.

        ``inode`` is the object of an inode mark, and ``mount`` that of a mount mark. ``opened_for_write``: a process has the
        inode open for writing. ``is_dir`` False: FAN_EVENT_ON_CHILD is dropped; the kernel keeps it for directories only. Raises
        OSError ENOENT (there is no mark to remove) or EEXIST (the existing mark does not allow this change).
        """
        mark_type = flags & FAN_MARK_TYPE_MASK
        # The event flags that cannot be set here. When all other bits are removed, these alone do not keep a mark.
        unsettable = 0
        if mark_type != FAN_MARK_INODE or not is_dir:
            unsettable = FAN_EVENT_ON_CHILD
        elif flags & FAN_MARK_IGNORED_MASK:
            unsettable = FAN_EVENT_FLAGS
        mask &= ~unsettable
        if flags & FAN_MARK_IGNORED_MASK:
            mask &= ~FAN_EVENT_FLAGS
        marked = self._known(mount) if mark_type == FAN_MARK_MOUNT else inode
        if flags & FAN_MARK_ADD:
            self._add(flags, mask, mark_type, marked, opened_for_write)
            self._refresh_wide()
        else:
            self._remove(flags, mask, mark_type, marked, unsettable)
            self._refresh()

    def _known(self, mount: MountKey) -> MountKey:
        """The key by which that mount is marked, if it is."""
        return next((key for key in self._mounts if key.is_same(mount)), mount)

    def _add(
        self, flags: int, mask: int, mark_type: int, marked: int | MountKey | None, opened_for_write: bool
    ) -> None:
        ignore = flags & FAN_MARK_IGNORE_BITS
        survives = bool(flags & FAN_MARK_IGNORED_SURV_MODIFY)
        if ignore and not survives and mark_type == FAN_MARK_INODE and opened_for_write:
            # The next write would clear it. The kernel's call succeeds and makes no mark (docs/facts.md, section 2).
            return
        mark = self._find(mark_type, marked)
        evictable = bool(flags & FAN_MARK_EVICTABLE)
        if mark is None:
            mark = _Mark(evictable=evictable)
            self._check_update(mark, flags, mask)
            self._put(mark_type, marked, mark)
        else:
            self._check_update(mark, flags, mask)
        if ignore:
            mark.ignore_mask |= mask
            mark.own_ignore_flags |= ignore == FAN_MARK_IGNORE
            mark.survives_modify |= survives
        else:
            mark.mask |= mask
        mark.evictable &= evictable
        self._note(mark)

    def _check_update(self, mark: _Mark, flags: int, mask: int) -> None:
        if flags & FAN_MARK_EVICTABLE and not mark.evictable:
            raise OSError(errno.EEXIST, "fanotify_mark: a mark that stays cannot become FAN_MARK_EVICTABLE")
        if flags & FAN_MARK_IGNORED_MASK and mark.own_ignore_flags:
            raise OSError(
                errno.EEXIST, "fanotify_mark: a FAN_MARK_IGNORE mark cannot take FAN_MARK_IGNORED_MASK"
            )
        if flags & FAN_MARK_IGNORE and not flags & FAN_MARK_IGNORED_SURV_MODIFY and mark.survives_modify:
            message = "fanotify_mark: FAN_MARK_IGNORE needs FAN_MARK_IGNORED_SURV_MODIFY, as the mark has it"
            raise OSError(errno.EEXIST, message)
        united = mask | mark.mask
        if not self.dialect.directory_events and united & self.dialect.pre_content and united & FAN_ONDIR:
            raise OSError(errno.EEXIST, "fanotify_mark: FAN_PRE_ACCESS and FAN_ONDIR cannot meet on one mark")

    def _remove(
        self, flags: int, mask: int, mark_type: int, marked: int | MountKey | None, unsettable: int
    ) -> None:
        mark = self._find(mark_type, marked)
        if mark is None:
            raise OSError(errno.ENOENT, "fanotify_mark: no such mark to remove")
        if flags & FAN_MARK_IGNORE_BITS:
            mark.ignore_mask &= ~mask
        else:
            mark.mask &= ~mask
        if not (mark.mask | mark.ignore_mask) & ~unsettable:
            self._put(mark_type, marked, None)

    def _find(self, mark_type: int, marked: int | MountKey | None) -> _Mark | None:
        if mark_type == FAN_MARK_FILESYSTEM:
            return self._filesystem
        if isinstance(marked, MountKey):
            return self._mounts.get(marked)
        assert marked is not None
        return self._inodes.get(marked)

    def _put(self, mark_type: int, marked: int | MountKey | None, mark: _Mark | None) -> None:
        if mark_type == FAN_MARK_FILESYSTEM:
            self._filesystem = mark
        elif isinstance(marked, MountKey):
            if mark is None:
                del self._mounts[marked]
            else:
                self._mounts[marked] = mark
        else:
            assert marked is not None
            if mark is None:
                del self._inodes[marked]
            else:
                self._inodes[marked] = mark

    def _wide(self) -> Iterator[_Mark]:
        yield from self._mounts.values()
        if self._filesystem is not None:
            yield self._filesystem

    def _note(self, mark: _Mark) -> None:
        self._any_ends_with_write |= mark.ends_with_write
        self.notified |= mark.mask & NOTIFICATION_EVENTS
        self.permissions |= mark.mask & CONTENT_PERM_EVENTS

    def _refresh(self) -> None:
        self._refresh_wide()
        self._any_ends_with_write = False
        self.notified = self.permissions = 0
        for mark in (*self._wide(), *self._inodes.values()):
            self._note(mark)

    def _refresh_wide(self) -> None:
        heard = [0, 0]
        ignored = [0, 0]
        main, filesystem = self._mounts.get(MAIN), self._filesystem
        for is_dir in (False, True):
            for mark in (main, filesystem):
                if mark is not None:
                    heard[is_dir] |= mark.heard(is_dir, on_child=False)
            if filesystem is not None:
                ignored[is_dir] |= filesystem.ignored(is_dir, on_child=False)
        self._wide_heard = heard[0], heard[1]
        self._wide_ignored = ignored[0], ignored[1]
        self._wide_watched = 0
        for mark in self._wide():
            self._wide_watched |= mark.interest
        self.tells_mounts = any(mount != MAIN or mark.ignore_mask for mount, mark in self._mounts.items())

    def flush(self, flags: int) -> None:
        """FAN_MARK_FLUSH: remove all marks of the one type that the flags name."""
        mark_type = flags & FAN_MARK_TYPE_MASK
        if mark_type == FAN_MARK_INODE:
            self._inodes.clear()
        elif mark_type == FAN_MARK_MOUNT:
            self._mounts.clear()
        else:
            self._filesystem = None
        self._refresh()

    def clear(self) -> None:
        """Remove all marks, because the group is closed."""
        self._inodes.clear()
        self._mounts.clear()
        self._filesystem = None
        self._refresh()

    def hears(self, mask_bit: int, subject: Subject) -> bool:
        """Whether the group hears this event about the subject. The event is one bit of a mask; notifications count too."""
        return self.heard(mask_bit, subject) != 0

    def heard(self, mask: int, subject: Subject) -> int:
        """The bits of an event's mask that the group hears about the subject.

        The masks of all its marks that cover the subject are united. Then every bit that one of these marks ignores is removed.
        """
        is_dir = subject.is_dir
        heard = self._wide_heard[is_dir]
        ignored = self._wide_ignored[is_dir]
        if self.tells_mounts:
            mount_heard, mount_ignored = self._from_mounts(subject)
            heard |= mount_heard
            ignored |= mount_ignored
        if self._inodes:
            mark = self._inodes.get(subject.inode)
            if mark is not None:
                heard |= mark.heard(is_dir, on_child=False)
                ignored |= mark.ignored(is_dir, on_child=False)
            child_heard, child_ignored = self._from_parents(subject)
            heard |= child_heard
            ignored |= child_ignored
        return heard & mask & ~ignored

    def _from_mounts(self, subject: Subject) -> tuple[int, int]:
        """What the marks on single mounts add to the events that are heard and that are ignored."""
        heard = ignored = 0
        for mount, mark in self._mounts.items():
            if subject.mount is None:
                heard |= mark.heard(subject.is_dir, on_child=False)
            elif mount.is_same(subject.mount):
                heard |= mark.heard(subject.is_dir, on_child=False)
                ignored |= mark.ignored(subject.is_dir, on_child=False)
        return heard, ignored

    def _from_parents(self, subject: Subject) -> tuple[int, int]:
        # The accessor may have come through any parent. So one watching parent is enough, and an event is dropped only if every
        # parent ignores it. An extra event is harmless; a byte without an event is not.
        heard = 0
        ignored = _ALL_BITS if subject.parents else 0
        for parent in subject.parents:
            mark = self._inodes.get(parent)
            if mark is None:
                ignored = 0
                continue
            heard |= mark.heard(subject.is_dir, on_child=True)
            ignored &= mark.ignored(subject.is_dir, on_child=True)
        return heard, ignored

    def watched(self, subject: Subject) -> int:
        """The united mask of all marks on the subject, for arming it at open(2).

        An ignore mark removes nothing: the events that it ignores count as watched, and they arm. FAN_ONDIR has no effect (kernel:
        ``file_set_fsnotify_mode_from_watchers``; docs/facts.md, section 5).
        """
        mask = self._wide_watched
        if self._inodes:
            mark = self._inodes.get(subject.inode)
            if mark is not None:
                mask |= mark.interest
            for parent in subject.parents:
                mark = self._inodes.get(parent)
                if mark is not None and mark.interest & FAN_EVENT_ON_CHILD:
                    mask |= mark.interest
        return mask & ~FAN_EVENT_FLAGS

    def modified(self, inode: int, parents: tuple[int, ...] = ()) -> bool:
        """Clear the ignore masks without FAN_MARK_IGNORED_SURV_MODIFY that cover the inode, after a write, truncate(2) or fallocate(2) of it.

        Returns whether there were any; then the group hears more than before. The masks of mount and filesystem marks are cleared
        too, and those of a parent that watches its children (docs/facts.md, section 2). On the real kernel a truncation spares the
        mount mark, because its event has no path. Here it clears that one too, which makes an event more and never one less.
        """
        if not self._any_ends_with_write:
            return False
        covering = list(self._wide())
        own = self._inodes.get(inode)
        if own is not None:
            covering.append(own)
        for parent in parents:
            mark = self._inodes.get(parent)
            if mark is not None and mark.interest & FAN_EVENT_ON_CHILD:
                covering.append(mark)
        ending = [mark for mark in covering if mark.ends_with_write]
        for mark in ending:
            mark.ignore_mask = 0
        if ending:
            self._refresh()
        return bool(ending)

    def forget(self, inode: int) -> None:
        """Remove the mark of an inode that was deleted."""
        self._inodes.pop(inode, None)

    def evicted(self, inode: int) -> None:
        """Remove the FAN_MARK_EVICTABLE mark of an inode that the kernel no longer keeps in memory, also one with an ignore mask alone.

        Other marks keep their inode in memory (docs/facts.md, section 2).
        """
        mark = self._inodes.get(inode)
        if mark is not None and mark.evictable:
            del self._inodes[inode]

    def describe(self) -> list[dict[str, object]]:
        """Every mark as an object for JSON, in a stable order. The numbers are as in /proc/PID/fdinfo of a kernel group."""
        return [
            {
                "type": kind,
                "inode": number if kind == "inode" else None,
                "mount": number if kind == "mount" else None,
                "mflags": mark.flags,
                "mask": mark.mask,
                "ignored_mask": mark.ignore_mask,
                "events": mask_names(mark.mask, self.dialect),
                "ignored_events": mask_names(mark.ignore_mask, self.dialect),
            }
            for kind, number, mark in self._all()
        ]

    def _all(self) -> Iterator[tuple[str, int | None, _Mark]]:
        if self._filesystem is not None:
            yield "filesystem", None, self._filesystem
        for mount in sorted(self._mounts):
            yield "mount", mount.number or None, self._mounts[mount]
        for inode in sorted(self._inodes):
            yield "inode", inode, self._inodes[inode]
