"""Notifications with a descriptor: OPEN, OPEN_EXEC, ACCESS, MODIFY, CLOSE_WRITE, CLOSE_NOWRITE. Their merging, and the groups that hear them."""

import os
from collections.abc import Callable

from fusehsm.conform.executable import write_executable
from fusehsm.conform.scene import (
    EVERYTHING,
    MIB,
    PAGE,
    PRE_ACCESS,
    PRE_GROUP,
    READ_ONLY,
    Mark,
    Question,
    Scene,
)
from fusehsm.conform.workload import Workload
from fusehsm.conform.workloads import (
    copying,
    mapping,
    opening,
    processes,
    reading,
    writing,
)
from fusehsm.fanotify.abi import (
    FAN_ACCESS,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_CLOSE,
    FAN_CLOSE_WRITE,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MODIFY,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    NOTIFICATION_EVENTS,
)

NOTIF_GROUP = FAN_CLASS_NOTIF | FAN_CLOEXEC
ALL = Mark(NOTIFICATION_EVENTS, "", FAN_MARK_FILESYSTEM)
FENCE = "fence"


async def fenced(scene: Scene, act: Callable[..., object] | str, *arguments: object) -> None:
    """Make the call and end its accessor, which closes all its files. Then another accessor opens the file FENCE, which makes the last event."""
    accessor = scene.accessor()
    await scene.call(act, *arguments, by=accessor)
    accessor.kill()
    accessor.wait_exit()
    await scene.accessor().run("open", str(scene.path / FENCE), os.O_RDONLY)


def row(
    name: str,
    act: Callable[..., object],
    *arguments: object,
    marks: tuple[Mark, ...] = (ALL,),
    flags: int = NOTIF_GROUP,
    event_f_flags: int = READ_ONLY,
    size: int = 20000,
    differs: str | tuple[str, ...] = (),
    make: Callable[[Scene], str] | None = None,
) -> Workload:
    """A workload of one call. The group reads when the call is over, so merging does not depend on time."""

    async def script(scene: Scene) -> None:
        path = make(scene) if make else scene.file(size=size)
        scene.file("other", size=size)
        scene.file(FENCE)
        listener = await scene.listen(
            *marks, Mark(FAN_OPEN, FENCE), flags=flags, event_f_flags=event_f_flags, lazy=True
        )
        await fenced(scene, act, path, *arguments)
        await listener.read_until(FENCE)

    return Workload("notifying", name, script, differs)


def program(scene: Scene) -> str:
    """A program that exits with 0."""
    write_executable(scene.backing / "file")
    return str(scene.path / "file")


async def beside_permission_events(scene: Scene) -> None:
    """One group has permission events and notifications in one queue."""
    path = scene.file()
    scene.file(FENCE)
    marks = (scene.everywhere(), ALL)
    listener = await scene.listen(*marks)
    accessor = scene.accessor()
    descriptor = await scene.call("open", path, os.O_RDWR, by=accessor)
    await scene.call("pread", descriptor, 100, 5000, by=accessor)
    await scene.call("pwrite", descriptor, b"new", 5000, by=accessor)
    await scene.call("ftruncate", descriptor, 5000, by=accessor)
    await accessor.run("close", descriptor)
    await accessor.run("open", str(scene.path / FENCE), os.O_RDONLY)
    await listener.read_until(FENCE)


async def after_a_denial(scene: Scene) -> None:
    """A denied access makes no notification."""
    path = scene.file()
    scene.file(FENCE)

    def answer(question: Question) -> int:
        return 5 if question.path == "file" else 0

    notified = await scene.listen(ALL, flags=NOTIF_GROUP, lazy=True)
    for mask in (EVERYTHING, PRE_ACCESS):
        listener = await scene.listen(scene.everywhere(mask), answer=answer)
        await scene.call("pread_path", path, 100, 0)
        await scene.call("pwrite_path", path, b"new", 0)
        listener.close()
    await scene.accessor().run("open", str(scene.path / FENCE), os.O_RDONLY)
    await notified.read_until(FENCE)


async def two_processes(scene: Scene) -> None:
    """Notifications of different processes are not merged."""
    path = scene.file()
    scene.file(FENCE)
    listener = await scene.listen(ALL, flags=NOTIF_GROUP, lazy=True)
    for accessor in (scene.accessor(), scene.accessor()):
        await scene.call("open", path, os.O_RDONLY, by=accessor)
    await scene.accessor().run("open", str(scene.path / FENCE), os.O_RDONLY)
    await listener.read_until(FENCE)


MASKS = {
    "OPEN": FAN_OPEN,
    "ACCESS": FAN_ACCESS,
    "MODIFY": FAN_MODIFY,
    "CLOSE": FAN_CLOSE,
    "CLOSE_WRITE": FAN_CLOSE_WRITE,
}
WORKLOADS = [
    row("open for reading", opening.open_with, os.O_RDONLY),
    row("open for writing", opening.open_with, os.O_WRONLY),
    row("open with O_TRUNC", opening.open_with, os.O_RDWR | os.O_TRUNC),
    row("open with O_CREAT", opening.open_with, os.O_RDWR | os.O_CREAT, "new"),
    row("open of nothing", opening.open_with, os.O_RDONLY, "missing"),
    row("O_PATH", opening.open_with, os.O_PATH),
    row("pread", reading.pread, 100, 5000),
    row("a large pread", reading.pread, 3 * MIB, 5, size=4 * MIB),
    row("pread past the end", reading.pread, 100, 30000),
    row("reads on", reading.read_on, 5000, 3),
    row("readv", reading.readv, [100, 5000]),
    row("pwrite", writing.pwrite_only, 100, 5000),
    row("a large pwrite", writing.pwrite_only, 3 * MIB, 5),
    row("append", writing.write_on, [10, 20], os.O_APPEND),
    row("write and read", writing.write_and_read),
    row("truncate", writing.truncate, 5000),
    row("ftruncate", writing.ftruncate, 5000),
    row("fallocate", writing.fallocate, 0, 5000, 100, differs="fallocate"),
    row("sendfile", copying.send, 100, 1000),
    row("sendfile to a file", copying.send_to_file, 20000),
    row("copy_file_range", copying.copy_range, 5000, 100, 5000, "other"),
    row("splice to a file", copying.splice_to, 5000, 100),
    row("a mapping", mapping.map_and_touch, 8192, 0, [5000]),
    row("threads", processes.read_in_threads_one_after_the_other),
    row(
        "threads with REPORT_TID",
        processes.read_in_threads_one_after_the_other,
        flags=NOTIF_GROUP | FAN_REPORT_TID,
    ),
    row("a child", processes.read_in_child, 100, differs=("pid", "who closes")),
    row("a program", processes.execute, make=program),
    row("names and attributes", opening.do_nothing_to_open_file),
    row(
        "a directory",
        opening.list_directory,
        marks=(Mark(NOTIFICATION_EVENTS | FAN_ONDIR, "", FAN_MARK_FILESYSTEM),),
    ),
    *(
        row(
            f"a directory, through descriptors {name}",
            opening.list_directory,
            marks=(Mark(NOTIFICATION_EVENTS | FAN_ONDIR, "", FAN_MARK_FILESYSTEM),),
            event_f_flags=how,
        )
        for name, how in {"for writing": os.O_WRONLY, "for both": os.O_RDWR}.items()
    ),
    row("a directory, without ONDIR", opening.list_directory),
    *(
        row(f"{name} only", writing.write_and_read, marks=(Mark(mask, "file"),))
        for name, mask in MASKS.items()
    ),
    row("children", writing.write_and_read, marks=(Mark(NOTIFICATION_EVENTS | FAN_EVENT_ON_CHILD),)),
    row("the mount", writing.write_and_read, marks=(Mark(NOTIFICATION_EVENTS, "", FAN_MARK_MOUNT),)),
    row(
        "ignored",
        *(writing.write_and_read,),
        marks=(ALL, Mark(FAN_MODIFY | FAN_ACCESS, "file", FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY)),
    ),
    row("class CONTENT", writing.write_and_read, flags=FAN_CLASS_CONTENT | FAN_CLOEXEC),
    row("class PRE_CONTENT", writing.write_and_read, flags=PRE_GROUP),
    row("REPORT_PIDFD", reading.pread, 100, PAGE, flags=NOTIF_GROUP | FAN_REPORT_PIDFD),
    row(
        "REPORT_PIDFD and FD_ERROR",
        reading.pread,
        100,
        PAGE,
        flags=NOTIF_GROUP | FAN_REPORT_PIDFD | FAN_REPORT_FD_ERROR,
    ),
    Workload("notifying", "beside permission events", beside_permission_events),
    Workload("notifying", "after a denial", after_a_denial),
    Workload("notifying", "two processes", two_processes),
]
