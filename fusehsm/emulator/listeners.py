"""The groups of one mount: decides which groups are asked about an access, in which order, and the result when none answers."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence

import trio

from fusehsm.emulator.group import Group
from fusehsm.emulator.waiting import ORPHANED, KillWatch, Waiter
from fusehsm.events import (
    STRENGTH,
    Access,
    AccessKind,
    Armed,
    EventShape,
    arm,
    heard_when,
    notification,
    shapes,
)
from fusehsm.fanotify.abi import CONTENT_PERM_EVENTS, FAN_ACCESS_PERM, FAN_OPEN_PERM, Dialect, mask_names
from fusehsm.fanotify.marks import MarkTable, Subject
from fusehsm.fanotify.policy import EventTimeout, Unattended, UnattendedPolicy
from fusehsm.linux import proc

PRE_CONTENT = 2  # Group.priority of FAN_CLASS_PRE_CONTENT
# Accesses that end at once when their accessor dies, even if a handler is still at work. Not open(2): its file must not stay open.
_INTERRUPTIBLE = frozenset(AccessKind) - {AccessKind.OPEN, AccessKind.READ_DIRECTORY}
_WRITING = frozenset((AccessKind.WRITE, AccessKind.TRUNCATE, AccessKind.FALLOCATE))


def _let_die(waiter: Waiter) -> bool:
    """End the wait of an accessor that is being killed, or that has died and left a page locked; returns whether that is so."""
    tid = waiter.access.tid
    if not tid or not (proc.is_being_killed(tid) or (waiter.access.leaves and proc.is_gone(tid))):
        return False
    waiter.settle(errno.EINTR)
    return True


def _is_pre_content(shape: EventShape, dialect: Dialect) -> bool:
    return bool(shape.mask & (dialect.pre_access | dialect.pre_modify))


class Listeners:
    """The groups of a mount, asked in the kernel's order: PRE_CONTENT, then CONTENT, then NOTIF. The first denial ends the questions
    (docs/facts.md, section 4).

    `dialect`: the mount's default, used where there is no group. `page_size`: in bytes. `path_of` gives the accessor's path of a node.
    `unattended`: the policy for accesses without a listener. `event_timeout`: the longest wait for an answer, None for no limit. `notifies`:
    whether the mount's event mode has notifications.
    """

    def __init__(
        self,
        dialect: Dialect,
        page_size: int,
        path_of: Callable[[object], bytes],
        unattended: UnattendedPolicy,
        event_timeout: EventTimeout | None,
        *,
        notifies: bool = True,
    ) -> None:
        self.dialect = dialect
        self._notifies = notifies
        self.groups: list[Group] = []
        self.questions = 0
        """How many events have been put to groups whose answer an accessor waits for."""
        self._page_size = page_size
        self._path_of = path_of
        self._unattended = unattended
        self._event_timeout = event_timeout
        self.on_allowed: Callable[[Access, EventShape, object], None] | None = None
        """Called when a group has allowed an access after a pre-content event, with the access, the event and the node."""
        self._waiters: dict[int, Waiter] = {}
        self.kill_watch = KillWatch(self._waiters, _let_die)
        self._dead_marks: list[MarkTable] = []
        # The groups that have had a mark. A new group without one is not asked yet, so the policy still applies.
        self._attending: set[Group] = set()
        self._ever_attended = False
        self._releases = 0
        self._own_pid = os.getpid()
        self._refresh()

    def _refresh(self) -> None:
        self.groups.sort(key=lambda group: -group.priority)
        self._standing = any(group.priority == PRE_CONTENT for group in self._attending)
        dialects = {group.dialect.name: group.dialect for group in self.groups}
        for marks in self._dead_marks:
            dialects.setdefault(marks.dialect.name, marks.dialect)
        if not self._standing and self._unattended.action is not Unattended.ALLOW:
            dialects.setdefault(self.dialect.name, self.dialect)
        self.dialects: Sequence[Dialect] = tuple(dialects.values())
        # No group and no policy has a question: the hot path of a mount without listeners.
        self.idle = not self.dialects
        self.asks_unarmed = any(not dialect.arms_at_open for dialect in self.dialects)
        # The notifications that any mark asks for. Most mounts have none, and then this is the only check that they pay for.
        self.notified = 0
        # Whether it matters by which mount a file is accessed.
        self.tells_mounts = any(group.marks.tells_mounts for group in self.groups)
        if self._notifies:
            for group in self.groups:
                self.notified |= group.marks.notified

    def add(self, group: Group) -> None:
        """Add a new group."""
        self.groups.append(group)
        self._refresh()

    def remove(self, group: Group) -> None:
        """Remove a group whose last descriptor is closed. --unattended decides the accesses that it has not answered."""
        if group not in self.groups:
            return
        self.groups.remove(group)
        self._attending.discard(group)
        action = self._unattended.action if group.priority == PRE_CONTENT else Unattended.ALLOW
        if action is Unattended.HOLD and not group.marks.empty:
            self._remember(group)
        self._refresh()
        group.close()
        verdict = self._owed_by(group)
        for waiter in [waiter for waiter in self._waiters.values() if waiter.group is group]:
            waiter.settle(verdict)

    def _owed_by(self, group: Group) -> int:
        """The verdict on accesses that a closed group has not answered: 0, an errno or ORPHANED."""
        if group.priority != PRE_CONTENT:
            return 0
        match self._unattended.action:
            case Unattended.ALLOW:
                return 0
            case Unattended.DENY:
                return self._unattended.errno
            case Unattended.HOLD:
                return ORPHANED

    def _remember(self, group: Group) -> None:
        marks = group.marks
        known = [dead.describe() for dead in self._dead_marks]
        if marks.describe() not in known:
            self._dead_marks.append(marks.copy())

    def marks_changed(self) -> None:
        """Marks were added or removed: a parked access may now have a group to ask."""
        self._attending.update(group for group in self.groups if not group.marks.empty)
        self._ever_attended |= any(group.priority == PRE_CONTENT for group in self._attending)
        self._refresh()
        for waiter in list(self._waiters.values()):
            if waiter.group is None:
                waiter.settle(ORPHANED)

    def release(self) -> int:
        """Let every parked access pass; returns how many these are. Accesses that wait for the answer of a group still wait.

        A parked access has no group to ask (--unattended hold). The marks of dead groups are forgotten, so that they park no access any more.
        """
        self._releases += 1
        self._dead_marks.clear()
        self._refresh()
        parked = [waiter for waiter in self._waiters.values() if waiter.group is None]
        for waiter in parked:
            waiter.settle(0)
        return len(parked)

    def watches(self, subject: Subject) -> bool:
        """Whether any mark, or the policy for unattended accesses, covers the subject."""
        if self.idle:
            return False
        return self._unattended_watch(subject) or any(group.marks.watched(subject) for group in self.groups)

    def is_filled_by(self, subject: Subject, tid: int) -> bool:
        """Whether the thread's process reads the events of a pre-content group with a mark that covers the subject."""
        groups = [group for group in self.groups if group.priority == PRE_CONTENT and group.readers]
        if not tid or not any(group.marks.watched(subject) for group in groups):
            return False
        process = proc.process_of(tid)
        known = {group.readers.get(process) for group in groups if group.marks.watched(subject)} - {None}
        return bool(known) and proc.started(process) in known

    def _unattended_watch(self, subject: Subject) -> bool:
        action = self._unattended.action
        if action is Unattended.ALLOW:
            return False
        if action is Unattended.DENY:
            return not self._standing
        return not self._ever_attended or any(marks.watched(subject) for marks in self._dead_marks)

    def armed(self, subject: Subject) -> Armed:
        """How a file is armed that is opened now. The kernel decides this at open(2) (docs/facts.md, section 5)."""
        armed = arm(0, self.dialect)
        if self._unattended.action is not Unattended.ALLOW and armed is Armed.NO:
            # A listener may come later. Later reads of this file must then be asked for.
            armed = Armed.PRE
        watched: dict[str, int] = {}
        for group in self.groups:
            watched[group.dialect.name] = watched.get(group.dialect.name, 0) | group.marks.watched(subject)
        for dialect in self.dialects:
            armed = max(armed, arm(watched.get(dialect.name, 0), dialect), key=STRENGTH.__getitem__)
        return armed

    def asks_at_open(self, subject: Subject) -> bool:
        """Whether any mark covers open(2) of the subject, which a listener may then deny."""
        return any(
            group.marks.watched(subject)
            & (FAN_OPEN_PERM | (group.dialect.pre_content if group.dialect.open_event else 0))
            for group in self.groups
        )

    def asks_by_call(self, subject: Subject) -> bool:
        """Whether any group wants permission events of the subject other than pre-content events. These are about single calls."""
        return any(
            group.marks.permissions and group.marks.watched(subject) & CONTENT_PERM_EVENTS
            for group in self.groups
        )

    def hears_notification(self, mask: int, subject: Subject) -> bool:
        """Whether any group hears one of these notifications about the subject."""
        return bool(mask & self.notified) and any(group.marks.heard(mask, subject) for group in self.groups)

    def notify(self, access: Access, subject: Subject, node: object) -> bool:
        """Notify every group that hears it of an access that has succeeded; returns whether there is such a group. Never waits or fails."""
        mask = notification(access) & self.notified
        if not mask:
            return False
        told = False
        for group in self.groups:
            heard = group.marks.heard(mask, subject)
            if heard:
                told = True
                group.put(
                    EventShape(heard, None, None),
                    pid=access.pid,
                    tid=access.tid or access.pid,
                    target=node,
                    path=self._path_of(node),
                    permission=False,
                )
        return told

    def hears_content(self, subject: Subject) -> bool:
        """Whether a read of the subject would be asked for now. An ignore mark on a resident file makes that false."""
        if self._unattended_watch(subject):
            return True
        for group in self.groups:
            dialect = group.dialect
            for bit in (dialect.pre_access, dialect.pre_modify, FAN_ACCESS_PERM):
                if bit and group.marks.hears(bit, subject):
                    return True
        return False

    async def ask(
        self, access: Access, subject: Subject, node: object, *, armed: Armed, only: int = 0
    ) -> bool:
        """Ask every group that hears the events of `access`; returns whether a listener has allowed a pre-content event of it.

        A listener's death or a full queue may let the access pass, but that does not count as allowed.

        `only` restricts the question to those event bits (0: all). Raises OSError with the listener's errno when the access is denied, EINTR
        when the accessor is being killed, EDEADLK when the accessor is this process.
        """
        policy = self._unattended.action
        # The event for which the access is held: a group has closed without answering it, or there was no group to hear it.
        left: EventShape | None = None
        lost, released = False, 0
        while True:
            asked = allowed = answered = False
            orphan: EventShape | None = None
            for dialect, shape in self._shapes(access, armed, only):
                pre_content = _is_pre_content(shape, dialect)
                verdict = 0
                for group in self._hearers(shape, subject, dialect):
                    asked |= pre_content
                    verdict, heard = await self._ask_group(group, shape, access, node)
                    if verdict:
                        break
                    if heard:
                        allowed |= pre_content
                        answered |= group.priority == PRE_CONTENT
                        if self.on_allowed is not None and pre_content:
                            self.on_allowed(access, shape, node)
                if verdict == ORPHANED:
                    orphan = shape
                    lost |= pre_content
                    break
                if verdict:
                    raise OSError(verdict, os.strerror(verdict))
            if orphan is not None:
                if left is None:
                    released = self._releases
                left = orphan
                continue
            if allowed or policy is Unattended.ALLOW:
                return allowed
            unheard = self._pre_content_shapes(access, armed, only)
            if not asked and any(self._hearers(shape, subject, dialect) for dialect, shape in unheard):
                continue  # a group has come while others were asked
            if left is None:
                left, released = self._left_unanswered(unheard, access, subject), self._releases
                if left is None:
                    return False
            elif released != self._releases or self.attended(subject, access):
                return False
            elif answered and not lost and not self._mourned(unheard, subject):
                return False  # a PRE_CONTENT group has answered, which fills at permission events
            # The answer of a CONTENT group does not show that the content is there.
            verdict = await self._park(left, access, node)
            if verdict != ORPHANED:
                if verdict:
                    raise OSError(verdict, os.strerror(verdict))
                return False

    def _hearers(self, shape: EventShape, subject: Subject, dialect: Dialect) -> list[Group]:
        if shape.with_pre_content and not self._watches_itself(subject, dialect):
            return []
        return [
            group
            for group in self.groups
            if group.dialect is dialect and group.marks.hears(shape.mask, subject)
        ]

    def _watches_itself(self, subject: Subject, dialect: Dialect) -> bool:
        """Whether a mark on the subject itself, or on the whole mount, asks for pre-content events of that dialect. Parents do not count."""
        itself = subject._replace(parents=())
        return any(
            group.dialect is dialect and group.marks.watched(itself) & dialect.pre_content
            for group in self.groups
        )

    def _shapes(self, access: Access, armed: Armed, only: int) -> Sequence[tuple[Dialect, EventShape]]:
        return [
            (dialect, shape)
            for dialect in self.dialects
            for shape in shapes(access, dialect, self._page_size)
            if (not only or shape.mask & only) and heard_when(shape, armed, dialect)
        ]

    def _pre_content_shapes(
        self, access: Access, armed: Armed, only: int
    ) -> Sequence[tuple[Dialect, EventShape]]:
        return [
            (dialect, shape)
            for dialect, shape in self._shapes(access, armed, only)
            if _is_pre_content(shape, dialect)
        ]

    async def _ask_group(
        self, group: Group, shape: EventShape, access: Access, node: object
    ) -> tuple[int, bool]:
        if access.pid == self._own_pid:
            return errno.EDEADLK, True
        if group.closed:
            return self._owed_by(group), False
        path = self._path_of(node)
        handle = group.handle if self._event_timeout is None and access.kind in _INTERRUPTIBLE else None
        tid = access.tid or access.pid
        waiter = Waiter(access, shape, path, group)
        put = group.put if handle is None else group.put_taken
        pending = put(shape, pid=access.pid, tid=tid, target=node, path=path, on_answer=waiter.hear)
        if pending is None:
            return 0, False
        self.questions += 1
        try:
            if handle is None:
                return await self._wait(waiter), waiter.answered
            self._waiters[id(waiter)] = waiter
            if self.kill_watch.sleeps:
                self.kill_watch.wake()
            try:
                await handle(pending)
            finally:
                del self._waiters[id(waiter)]
            return errno.EIO if waiter.verdict is None else waiter.verdict, waiter.answered
        finally:
            group.withdraw(pending)

    def attended(self, subject: Subject, access: Access | None = None) -> bool:
        """Whether a living listener is asked for the subject's content; with an `access`: for the content that it touches.

        The events may differ from those of a dead listener (another dialect). A listener that is asked about changes only does not attend
        reads.
        """
        writes = access is None or access.writable or access.kind in _WRITING
        return any(
            group.priority == PRE_CONTENT
            and (
                group.marks.hears(group.dialect.pre_access, subject)
                or (
                    writes
                    and group.dialect.pre_modify
                    and group.marks.hears(group.dialect.pre_modify, subject)
                )
            )
            for group in self.groups
        )

    def _left_unanswered(
        self, unheard: Sequence[tuple[Dialect, EventShape]], access: Access, subject: Subject
    ) -> EventShape | None:
        """Apply --unattended to an access of which no group has answered these pre-content events.

        Returns the event for which the access is held, or None to let it pass. Raises OSError when it is denied.
        """
        if self._unattended.action is Unattended.DENY:
            if unheard and not self._standing:
                raise OSError(self._unattended.errno, os.strerror(self._unattended.errno))
            return None
        if not unheard or self.attended(subject, access):
            return None
        if not self._ever_attended:
            return unheard[0][1]
        return self._mourned(unheard, subject)

    def _mourned(self, unheard: Sequence[tuple[Dialect, EventShape]], subject: Subject) -> EventShape | None:
        """The first of these events that a dead group would have heard."""
        return next(
            (
                shape
                for dialect, shape in unheard
                for marks in self._dead_marks
                if marks.dialect is dialect and marks.hears(shape.mask, subject)
            ),
            None,
        )

    async def _park(self, shape: EventShape, access: Access, node: object) -> int:
        if access.pid == self._own_pid:
            return errno.EDEADLK
        waiter = Waiter(access, shape, self._path_of(node), None)
        return await self._wait(waiter)

    async def _wait(self, waiter: Waiter) -> int:
        self._waiters[id(waiter)] = waiter
        if self.kill_watch.sleeps:
            self.kill_watch.wake()
        try:
            if self._event_timeout is None:
                return await waiter.wait()
            with trio.move_on_after(self._event_timeout.seconds):
                return await waiter.wait()
            waiter.settle(self._event_timeout.errno)
            return await waiter.wait()
        finally:
            del self._waiters[id(waiter)]

    def interrupted(self, tid: int) -> bool:
        """A thread has got a signal; returns whether the signal kills it. Then its waits end with EINTR.

        Other signals do not end a wait: fanotify's wait is not interruptible (docs/facts.md, section 8).
        """
        if not proc.is_being_killed(tid):
            return False
        for waiter in list(self._waiters.values()):
            if waiter.access.tid == tid:
                waiter.settle(errno.EINTR)
        return True

    def left(self, tid: int) -> bool:
        """Whether a thread that asked for a page fill is being killed, or is dead. Then its waits end with EINTR."""
        if self.interrupted(tid):
            return True
        if not tid or not proc.is_gone(tid):
            return False
        for waiter in list(self._waiters.values()):
            if waiter.access.tid == tid and waiter.access.leaves:
                waiter.settle(errno.EINTR)
        return True

    def abandon(self) -> None:
        """The mount ends: every waiting access fails with EIO."""
        for waiter in list(self._waiters.values()):
            waiter.settle(errno.EIO)

    def describe(self) -> list[dict[str, object]]:
        """The groups in the order in which they are asked, as JSON-able objects."""
        return [
            {
                "class": {PRE_CONTENT: "PRE_CONTENT", 1: "CONTENT", 0: "NOTIF"}[group.priority],
                "abi": group.dialect.name,
                "pid": group.listener_pid,
                "flags": group.shown_flags,
                "event_flags": group.event_flags,
                "marks": group.marks.describe(),
                "statistics": group.statistics,
            }
            for group in self.groups
        ]

    def waiting(self) -> Iterator[dict[str, object]]:
        """The waiting accesses as JSON-able objects: the process, the event, the group that must answer, and the seconds waited."""
        now = time.monotonic()
        for waiter in list(self._waiters.values()):
            yield {
                "pid": waiter.access.pid,
                "path": os.fsdecode(waiter.path),
                "event": mask_names(
                    waiter.shape.mask, waiter.group.dialect if waiter.group else self.dialect
                ),
                "offset": waiter.shape.offset,
                "count": waiter.shape.count,
                "seconds": now - waiter.since,
                "group": None if waiter.group is None else self.groups.index(waiter.group),
            }
