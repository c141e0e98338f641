"""The events that each kind of mark hears, and those of a file that was opened before a mark."""

import mmap
import os

from fusehsm.conform.scene import EVERYTHING, HOLD, PRE_ACCESS, PRE_GROUP, Mark, Scene
from fusehsm.conform.workload import Script, Workload
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MARK_REMOVE,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
)

OPEN, EXEC, ACCESS = FAN_OPEN_PERM, FAN_OPEN_EXEC_PERM, FAN_ACCESS_PERM
FILESYSTEM, MOUNT, CHILDREN = FAN_MARK_FILESYSTEM, FAN_MARK_MOUNT, FAN_EVENT_ON_CHILD
IGNORED, IGNORE, SURVIVING = FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORE, FAN_MARK_IGNORED_SURV_MODIFY
CONTENT_GROUP = FAN_CLASS_CONTENT | FAN_CLOEXEC
NOTIF_GROUP = FAN_CLASS_NOTIF | FAN_CLOEXEC

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def touch(descriptor: int, offset: int) -> bytes:
    return mmap.mmap(descriptor, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=offset)[:1]


# Scope


def heard(name: str, *marks: Mark, differs: str | tuple[str, ...] = ()) -> Workload:
    """A workload: files in two directories are read and listed, twice, while a group with these marks listens."""

    async def script(scene: Scene) -> None:
        (scene.backing / "sub").mkdir()
        paths = [scene.file(file) for file in ("file", "sub/deep", "other")]
        await scene.listen(*marks)
        # Twice: the events must not depend on the kernel's caches after the first time.
        for _ in range(2):
            for path in paths:
                await scene.call("pread_path", path, 100, 5000)
            await scene.call("listdir", str(scene.path / "sub"))

    return Workload("marks", f"hear {name}", script, differs)


ALL = Mark(EVERYTHING, "", FILESYSTEM)
SCOPES = [
    heard("a file", Mark(EVERYTHING, "file")),
    heard("a file with EVENT_ON_CHILD", Mark(EVERYTHING | CHILDREN, "file")),
    heard("an evictable mark", Mark(EVERYTHING, "file", FAN_MARK_EVICTABLE)),
    heard("a directory", Mark(EVERYTHING)),
    heard("its children", Mark(EVERYTHING | CHILDREN)),
    heard("another directory's children", Mark(EVERYTHING | CHILDREN, "sub")),
    heard("the mount", Mark(EVERYTHING, "", MOUNT)),
    heard("the mount named by a file", Mark(EVERYTHING, "file", MOUNT)),
    heard("the filesystem", Mark(EVERYTHING, "file", FILESYSTEM)),
    heard(
        "several marks",
        *(Mark(EVERYTHING, "", kind) for kind in (MOUNT, FILESYSTEM)),
        Mark(EVERYTHING, "file"),
    ),
    heard("united masks", Mark(OPEN, "file"), Mark(PRE_ACCESS | CHILDREN), Mark(ACCESS, "", FILESYSTEM)),
    *(
        heard(f"{name} only", Mark(mask, "", FILESYSTEM))
        for name, mask in {"P": PRE_ACCESS, "A": ACCESS, "O": OPEN, "X": EXEC}.items()
    ),
    heard("directories too", Mark(OPEN | ACCESS | FAN_ONDIR, "", FILESYSTEM)),
    heard("a directory with ONDIR", Mark(OPEN | ACCESS | FAN_ONDIR, "sub")),
    *(
        heard(f"all but P of a file, {name}", ALL, Mark(PRE_ACCESS, "file", flags))
        for name, flags in {
            "IGNORED_MASK": IGNORED,
            "IGNORED_MASK SURV": IGNORED | SURVIVING,
            "IGNORE": IGNORE,
            "IGNORE SURV": IGNORE | SURVIVING,
            "IGNORE SURV EVICTABLE": IGNORE | SURVIVING | FAN_MARK_EVICTABLE,
        }.items()
    ),
    *(
        heard(f"all but P, {name}", ALL, Mark(PRE_ACCESS, "", flags))
        for name, flags in {
            "mount IGNORED_MASK": MOUNT | IGNORED,
            "filesystem IGNORED_MASK": FILESYSTEM | IGNORED,
            "mount IGNORE": MOUNT | IGNORE | SURVIVING,
            "filesystem IGNORE": FILESYSTEM | IGNORE | SURVIVING,
        }.items()
    ),
    heard("all but P of children", ALL, Mark(PRE_ACCESS | CHILDREN, "", IGNORE | SURVIVING)),
    heard("IGNORED_MASK of a directory", ALL, Mark(PRE_ACCESS | CHILDREN, "", IGNORED)),
    heard("nothing of a file", ALL, Mark(EVERYTHING, "file", IGNORE | SURVIVING)),
    heard("only an ignore mark", Mark(EVERYTHING, "file", IGNORE | SURVIVING)),
]


# Armed at open


async def use(scene: Scene, descriptor: int) -> None:
    """Use an open file in every way: read, write, map, truncate."""
    await scene.call("pread", descriptor, 100, 5000)
    await scene.call("pwrite", descriptor, b"new", 5000)
    await scene.call(touch, descriptor, 12288)
    await scene.call("ftruncate", descriptor, 5000)


def armed(
    name: str, *marks: Mark, group: int = PRE_GROUP, closed: bool = False, differs: str | tuple[str, ...] = ()
) -> Workload:
    """A workload: a file is opened under these marks, then a second group watches everything and hears its events."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        scene.file("other")
        first = await scene.listen(*marks, flags=group)
        descriptor = await scene.call("open", path, os.O_RDWR)
        if closed:
            first.close()
        await scene.listen(scene.everywhere())
        await use(scene, descriptor)
        await scene.call("pread_path", path, 100, 0)

    # Two groups of one class hear the same events, in an arbitrary order. The size of read-ahead is the kernel's decision.
    same_class = () if closed else ("group 1", "group 2")
    return Workload(
        "marks", f"opened under {name}", script, differs, interchangeable=same_class, unsteady=not marks
    )


BEFORE = "files opened before the mark"
UNARMED = {
    "nothing": (),
    "O": (Mark(OPEN, "", FILESYSTEM),),
    "X": (Mark(EXEC, "", FILESYSTEM),),
    "P of another file": (Mark(PRE_ACCESS, "other"),),
    "A of another file": (Mark(ACCESS, "other"),),
    "P of the directory itself": (Mark(PRE_ACCESS),),
}
ARMED = {
    "P": (Mark(PRE_ACCESS, "file"),),
    "P on children": (Mark(PRE_ACCESS | CHILDREN),),
    "P on the mount": (Mark(PRE_ACCESS, "", MOUNT),),
    "P on the filesystem": (Mark(PRE_ACCESS, "", FILESYSTEM),),
    "P and O": (Mark(PRE_ACCESS, "file"), Mark(OPEN, "file")),
    "A": (Mark(ACCESS, "file"),),
    "A on children": (Mark(ACCESS | CHILDREN),),
    "A and P": (Mark(ACCESS | PRE_ACCESS, "file"),),
    "A and P of two marks": (Mark(ACCESS, "file"), Mark(PRE_ACCESS, "", FILESYSTEM)),
    "P that is ignored": (Mark(PRE_ACCESS, "file"), Mark(PRE_ACCESS, "file", IGNORE | SURVIVING)),
}
ARMINGS = [
    *(armed(name, *marks, closed=True, differs=BEFORE) for name, marks in UNARMED.items()),
    *(armed(name, *marks, closed=True) for name, marks in ARMED.items()),
    armed("P, whose group stays", Mark(PRE_ACCESS, "file")),
    armed("A and P, whose group stays", Mark(ACCESS | PRE_ACCESS, "file")),
    armed("OPEN", Mark(FAN_OPEN, "", FILESYSTEM), group=NOTIF_GROUP, closed=True, differs=BEFORE),
    armed("O of class CONTENT", Mark(OPEN, "", FILESYSTEM), group=CONTENT_GROUP, closed=True, differs=BEFORE),
    armed("A of class CONTENT", Mark(ACCESS, "file"), group=CONTENT_GROUP, closed=True),
]


# Marks that come and go


def changing(name: str, *steps: tuple[int, int, str]) -> Workload:
    """A workload: these calls of fanotify_mark(2) are made while a file is open. After each, the open file and its path are used."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        listener = await scene.listen(scene.everywhere())
        descriptor = await scene.call("open", path, os.O_RDWR)
        for flags, mask, target in steps:
            await listener.mark(flags, mask, target)
            await scene.call("pread", descriptor, 100, 5000)
            await scene.call("pwrite", descriptor, b"new", 5000)
            await scene.call("pread_path", path, 100, 0)
            await scene.call("truncate", path, 20000)

    return Workload("marks", name, script)


ADD, REMOVE, FLUSH = FAN_MARK_ADD, FAN_MARK_REMOVE, FAN_MARK_FLUSH
CHANGES = [
    changing("removed and added", (REMOVE | FILESYSTEM, EVERYTHING, ""), (ADD | FILESYSTEM, EVERYTHING, "")),
    changing("flushed and added", (FLUSH | FILESYSTEM, 0, ""), (ADD | FILESYSTEM, EVERYTHING, "")),
    changing("flushed, but another type", (FLUSH, 0, ""), (FLUSH | MOUNT, 0, "")),
    changing("parts removed", (REMOVE | FILESYSTEM, ACCESS, ""), (REMOVE | FILESYSTEM, PRE_ACCESS, "")),
    changing("ignored, surviving", (ADD | IGNORE | SURVIVING, PRE_ACCESS, "file")),
    changing("ignored until written", (ADD | IGNORE, PRE_ACCESS, "file"), (ADD | IGNORED, ACCESS, "file")),
    changing(
        "ignored and no more",
        (ADD | IGNORE | SURVIVING, PRE_ACCESS, "file"),
        (REMOVE | IGNORE | SURVIVING, PRE_ACCESS, "file"),
    ),
    changing(
        "moved from the filesystem to the file",
        (ADD, PRE_ACCESS, "file"),
        (REMOVE | FILESYSTEM, EVERYTHING, ""),
        (REMOVE, PRE_ACCESS, "file"),
    ),
]


def ending_ignorance(kind: int, survives: int) -> Script:
    """Set an ignore mark on a file. Then another process opens the file for writing, writes it and truncates it."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        writer = scene.accessor()
        reader = scene.accessor()
        listener = await scene.listen(scene.everywhere(PRE_ACCESS))
        for change in ("pwrite", "ftruncate"):
            await listener.mark(FAN_MARK_ADD | kind | survives, PRE_ACCESS, "file")
            await scene.call("pread_path", path, 100, 0, by=reader)
            descriptor = await scene.call("open", path, os.O_RDWR, by=writer)
            await scene.call("pread_path", path, 100, 0, by=reader)
            await scene.call(change, descriptor, *((b"new", 0) if change == "pwrite" else (9000,)), by=writer)
            await scene.call("pread_path", path, 100, 0, by=reader)
            await listener.mark(FAN_MARK_ADD | kind | survives, PRE_ACCESS, "file")
            await scene.call("pread_path", path, 100, 0, by=reader)
            await scene.call("close", descriptor, by=writer)

    return script


IGNORING = [
    Workload("marks", f"a write ends {name}", ending_ignorance(kind, survives))
    for name, kind, survives in (
        ("IGNORE", IGNORE, 0),
        ("IGNORED_MASK", IGNORED, 0),
        ("not IGNORE SURV", IGNORE, SURVIVING),
        ("not IGNORED_MASK SURV", IGNORED, SURVIVING),
    )
]


def meanwhile(flags: int, mask: int) -> Script:
    """Change a mark while an access waits."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        listener = await scene.listen(Mark(PRE_ACCESS, "file"), answer=lambda question: HOLD)
        call = scene.start("pread_path", path, 100, 0)
        await listener.wait_for(1)
        await listener.mark(flags, mask, "file")
        scene.say("the accessor", "is done", call.done)
        listener.release(28)
        await scene.end(call, "pread_path")
        await scene.call("pread_path", path, 100, 0)

    return script


async def marked_while_the_open_waits(scene: Scene) -> None:
    """The kernel arms a file before it makes OPEN_PERM, so a mark that the listener sets during that event is too late."""
    path = scene.file()
    listener = await scene.listen(scene.everywhere(OPEN), answer=lambda question: HOLD)
    call = scene.start("open", path, os.O_RDWR)
    await listener.wait_for(1)
    await listener.mark(FAN_MARK_ADD, PRE_ACCESS | ACCESS, "file")
    listener.release()
    descriptor = await scene.end(call, "open")
    await listener.mark(FAN_MARK_FLUSH, 0, "file")
    listener.close()
    await scene.listen(scene.everywhere())
    await use(scene, descriptor)


WORKLOADS = [
    *SCOPES,
    *ARMINGS,
    *CHANGES,
    *IGNORING,
    Workload("marks", "removed while somebody waits", meanwhile(REMOVE, PRE_ACCESS)),
    Workload("marks", "flushed while somebody waits", meanwhile(FLUSH, 0)),
    Workload("marks", "ignored while somebody waits", meanwhile(ADD | IGNORE | SURVIVING, PRE_ACCESS)),
    Workload("marks", "set while the open waits", marked_while_the_open_waits, BEFORE),
]
