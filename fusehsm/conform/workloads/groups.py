"""Several groups: their order, the effect of a denial on later groups, and the fate of waiting accesses when a group is closed or killed.

When a listener dies, accesses that wait for it are allowed, and later ones make no event.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from fusehsm.conform.scene import (
    EVERYTHING,
    HOLD,
    PAGE,
    PLAIN_DENY,
    PRE_ACCESS,
    PRE_GROUP,
    Answer,
    Mark,
    Question,
    Scene,
    allow,
)
from fusehsm.conform.workload import Script, Workload
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MODIFY,
    FAN_OPEN_PERM,
)

CONTENT_GROUP = FAN_CLASS_CONTENT | FAN_CLOEXEC
PERMISSION = EVERYTHING & ~PRE_ACCESS  # the permission events that a group of class CONTENT may watch
PRE, CONTENT = (PRE_GROUP, EVERYTHING), (CONTENT_GROUP, PERMISSION)
# Only MODIFY: it is notified before the call returns, and each modification of a file makes one event.
NOTIF = (FAN_CLASS_NOTIF | FAN_CLOEXEC, FAN_MODIFY)

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def read_by_threads(path: str, number: int) -> list[int]:
    descriptor = os.open(path, os.O_RDONLY)
    counts = []
    threads = [
        threading.Thread(target=lambda: counts.append(len(os.pread(descriptor, 100, 5000))))
        for _ in range(number)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def denying(name: str, error: int) -> Answer:
    """The answer function that denies events of this name."""

    def answer(question: Question) -> int:
        return error if question.name == name else 0

    return answer


def asked(*members: tuple[tuple[int, int], Answer]) -> Script:
    """Make groups in this order, then open, read, write and truncate a file."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        for (flags, mask), answer in members:
            await scene.listen(scene.everywhere(mask), flags=flags, answer=answer)
        await scene.call("pread_path", path, 100, 5000)
        await scene.call("pwrite_path", path, b"new", 5000)
        await scene.call("truncate", path, 10000)

    return script


def row(
    name: str, *members: tuple[tuple[int, int], Answer], interchangeable: tuple[str, ...] = ()
) -> Workload:
    """A workload with the script asked()."""
    return Workload("groups", name, asked(*members), interchangeable=interchangeable)


BUSY = errno.EBUSY
BOTH = ("group 1", "group 2")
ORDERS = [
    row("PRE_CONTENT", (PRE, allow)),
    row("CONTENT", (CONTENT, allow)),
    row("PRE_CONTENT, then CONTENT", (PRE, allow), (CONTENT, allow)),
    row("CONTENT, then PRE_CONTENT", (CONTENT, allow), (PRE, allow)),
    row("two of CONTENT", (CONTENT, allow), (CONTENT, allow), interchangeable=BOTH),
    row("two of PRE_CONTENT", (PRE, allow), (PRE, allow), interchangeable=BOTH),
    row("three", (PRE, allow), (CONTENT, allow), (PRE, allow), interchangeable=("group 1", "group 3")),
    row("NOTIF", (NOTIF, allow)),
    row("PRE_CONTENT, CONTENT and NOTIF", (NOTIF, allow), (CONTENT, allow), (PRE, allow)),
    row("different masks", (CONTENT, allow), ((PRE_GROUP, PRE_ACCESS), allow)),
    *(
        row(f"PRE_CONTENT denies {name}", (CONTENT, allow), (PRE, denying(name, BUSY)))
        for name in ("OPEN_PERM", "ACCESS_PERM", "PRE_ACCESS")
    ),
    *(
        row(f"CONTENT denies {name}", (CONTENT, denying(name, PLAIN_DENY)), (PRE, allow))
        for name in ("OPEN_PERM", "ACCESS_PERM")
    ),
    row("both deny", (CONTENT, denying("ACCESS_PERM", PLAIN_DENY)), (PRE, denying("PRE_ACCESS", BUSY))),
]


async def an_ignore_mark_is_its_own_groups(scene: Scene) -> None:
    """An ignore mark of one group does not affect another group."""
    path = scene.file()
    ignoring = Mark(PRE_ACCESS, "file", FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY)
    await scene.listen(scene.everywhere(), ignoring)
    await scene.listen(scene.everywhere(PERMISSION), flags=CONTENT_GROUP)
    await scene.call("pread_path", path, 100, 5000)


async def the_second_waits_for_the_first(scene: Scene) -> None:
    """A group of lower class hears an event after the higher one has allowed it."""
    path = scene.file()
    second = await scene.listen(scene.everywhere(PERMISSION), flags=CONTENT_GROUP)
    first = await scene.listen(scene.everywhere(FAN_OPEN_PERM), answer=lambda question: HOLD)
    call = scene.start("pread_path", path, 100, 5000)
    await first.wait_for(1)
    scene.say("group 1", "has heard", second.heard)
    first.release()
    await scene.end(call, "pread_path")


async def answered_in_any_order(scene: Scene) -> None:
    """Five accessors wait. They are answered in the order third, first, then the others."""
    paths = [scene.file(f"file-{number}") for number in range(5)]
    accessors = [scene.accessor() for _ in paths]
    listener = await scene.listen(scene.everywhere(PRE_ACCESS), answer=lambda question: HOLD)
    calls = []
    for number, (accessor, path) in enumerate(zip(accessors, paths, strict=True)):
        calls.append(scene.start("pread_path", path, 100, number * PAGE, by=accessor))
        await listener.wait_for(number + 1)
    for number in (2, 0, 1, 3, 4):
        event = next(event for event in listener.held if event.offset == number * PAGE)
        listener.held.remove(event)
        kept, listener.held = listener.held, [event]
        listener.release(errno.EIO if number == 1 else 0)
        listener.held = kept
        await scene.end(calls[number], "pread_path", accessors[number])
        scene.say("the others", "are done", [call.done for call in calls])


async def threads_that_read_the_same(scene: Scene) -> None:
    """Each thread has an event of its own, all at the same time."""
    path = scene.file()
    listener = await scene.listen(scene.everywhere(PRE_ACCESS), answer=lambda question: HOLD)
    call = scene.start(read_by_threads, path, 5)
    await listener.wait_for(5)
    listener.release()
    await scene.end(call, "read by five threads")


async def accessors_of_one_file(scene: Scene) -> None:
    """A writer and two readers of one file: each has its event at once, and a later one may finish before an earlier one."""
    path = scene.file()
    calls = [("pread_path", (100, 0)), ("pwrite_path", (b"new", 0)), ("pread_path", (100, 5000))]
    listener = await scene.listen(scene.everywhere(PRE_ACCESS), answer=lambda question: HOLD)
    begun = []
    for number, (operation, arguments) in enumerate(calls):
        accessor = scene.accessor()
        begun.append((operation, accessor, scene.start(operation, path, *arguments, by=accessor)))
        await listener.wait_for(number + 1)
    held, listener.held = listener.held, []
    for event, (operation, accessor, call) in reversed(list(zip(held, begun, strict=True))):
        listener.held = [event]
        listener.release()
        await scene.end(call, operation, accessor)


# Ends


def closing(mask: int, taken: bool) -> Script:
    """Close a group while an access waits for it: the access is allowed, and later ones make no event."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        listener = await scene.listen(scene.everywhere(mask), answer=lambda question: HOLD, lazy=not taken)
        call = scene.start("pread_path", path, 100, 5000)
        if taken:
            await listener.wait_for(1)
        else:
            await listener.group.wait_readable()
        scene.say("the accessor", "is done", call.done)
        listener.close()
        await scene.end(call, "pread_path")
        await scene.call("pread_path", path, 100, 0)

    return script


def killed(
    operation: str, *arguments: object, mask: int = PRE_ACCESS, number: int = signal.SIGKILL
) -> Script:
    """Kill an accessor after its event was read. The events of others come as before."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        victim, other = scene.accessor(), scene.accessor()
        listener = await scene.listen(scene.everywhere(mask), answer=lambda question: HOLD)
        call = scene.start(operation, path, *arguments, by=victim)
        await listener.wait_for(1)
        victim.signal(number)
        await scene.end(call, operation, victim)
        listener.release()
        second = scene.start("pread_path", path, 100, 5000, by=other)
        await listener.wait_for(2)
        scene.say("the other", "is done", second.done)
        listener.release()
        if mask & FAN_OPEN_PERM:
            listener.close()
        await scene.end(second, "pread_path", other)

    return script


async def killed_while_queued(scene: Scene) -> None:
    """A queued event vanishes when its accessor is killed."""
    path = scene.file()
    victim = scene.accessor()
    listener = await scene.listen(scene.everywhere(PRE_ACCESS), lazy=True)
    call = scene.start("pread_path", path, 100, 5000, by=victim)
    await listener.group.wait_readable()
    victim.kill()
    await scene.end(call, "pread_path", victim)
    listener.drain()


MASKS = {"O": FAN_OPEN_PERM, "P": PRE_ACCESS, "A": EVERYTHING & ~PRE_ACCESS & ~FAN_OPEN_PERM}
GROUPS = [
    *ORDERS,
    Workload("groups", "an ignore mark is its own group's", an_ignore_mark_is_its_own_groups),
    Workload("groups", "the second waits for the first", the_second_waits_for_the_first),
    Workload("groups", "answered in any order", answered_in_any_order),
    Workload("groups", "accessors of one file", accessors_of_one_file, "closing beside a writer"),
    Workload("groups", "threads that read the same", threads_that_read_the_same, at_once=True),
    *(
        Workload("groups", f"closed when {name} was {'read' if taken else 'queued'}", closing(mask, taken))
        for name, mask in MASKS.items()
        for taken in (True, False)
    ),
    Workload("groups", "killed in pread", killed("pread_path", 100, 5000)),
    Workload("groups", "killed in a large pread", killed("pread_path", 3 << 20, 5000)),
    Workload("groups", "killed in pwrite", killed("pwrite_path", b"new", 5000)),
    Workload("groups", "killed in truncate", killed("truncate", 5000)),
    Workload("groups", "killed in open", killed("open", os.O_RDONLY, mask=FAN_OPEN_PERM)),
    Workload("groups", "ended by SIGINT", killed("pread_path", 100, 5000, number=signal.SIGINT)),
    Workload("groups", "ended by SIGTERM", killed("pread_path", 100, 5000, number=signal.SIGTERM)),
    Workload("groups", "killed while queued", killed_while_queued, "killed before it is read"),
]


class Doomed:
    """A listener in a process of its own (listener_process.py)."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""

    async def wait_for(self, *words: str) -> None:
        """Wait until the process has printed these words."""
        assert self._process.stdout is not None
        wanted = "".join(f"{word}\n" for word in words).encode()
        while self._said != wanted:
            piece = await self._process.stdout.receive_some()
            self._said += piece
            if not piece or not wanted.startswith(self._said):
                raise RuntimeError(f"the listener has said {self._said!r}")
        self._said = b""

    async def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def listener_process(scene: Scene, mask: int, number: int) -> AsyncIterator[Doomed]:
    """Start a listener for the whole file system that reads at most `number` events. It is killed at the end."""
    module = "fusehsm.conform.listener_process"
    what = [scene.side.engine, str(scene.path), str(mask), str(number)]
    start = partial(
        trio.lowlevel.open_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    process = await start([sys.executable, "-m", module, *what])
    try:
        doomed = Doomed(process)
        await doomed.wait_for("ready")
        yield doomed
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await stream.aclose()


def listener_killed(mask: int, taken: int, waiting: int) -> Script:
    """Kill a listener for which `waiting` accessors wait. It has read the events of the first `taken`; the other events are queued."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        async with listener_process(scene, mask, taken) as doomed:
            calls = []
            for number in range(waiting):
                accessor = scene.accessor()
                call = scene.start("pread_path", path, 100, number * PAGE, by=accessor)
                calls.append((call, accessor))
                # The process reports nothing after the first "more".
                if number <= taken:
                    await doomed.wait_for("read" if number < taken else "more")
            scene.say("the accessors", "are done", [call.done for call, _ in calls])
            await doomed.kill()
            for call, accessor in calls:
                await scene.end(call, "pread_path", accessor)
            await scene.call("pread_path", path, 100, 0)
            await scene.call("pwrite_path", path, b"new", 0)
            await scene.call("truncate", path, 9000)

    return script


async def another_is_asked(scene: Scene) -> None:
    """After the first listener has died, the access is asked of a group of lower class."""
    path = scene.file()
    mask = FAN_ACCESS_PERM
    await scene.listen(
        scene.everywhere(mask), flags=FAN_CLASS_CONTENT | FAN_CLOEXEC, answer=lambda question: -2
    )
    async with listener_process(scene, mask, 1) as doomed:
        call = scene.start("pread_path", path, 100, 0)
        await doomed.wait_for("read")
        scene.say("the accessor", "is done", call.done)
        await doomed.kill()
        await scene.end(call, "pread_path")


WAITING = {"O": FAN_OPEN_PERM, "P": PRE_ACCESS, "A": FAN_ACCESS_PERM}
DYING = [
    *(
        Workload("dying", f"when {name} was {what}", listener_killed(mask, taken, waiting))
        for name, mask in WAITING.items()
        for what, taken, waiting in (("queued", 0, 1), ("read", 1, 1), ("read and queued", 1, 2))
    ),
    Workload("dying", "when many were read and queued", listener_killed(PRE_ACCESS, 3, 6)),
    Workload("dying", "and another is asked", another_is_asked),
]
WORKLOADS = [*GROUPS, *DYING]
