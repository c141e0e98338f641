"""Right and wrong calls of fanotify_init(2), fanotify_mark(2), read(2) and write(2) of the group, errno for errno."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterable

from fusehsm.conform.scene import DIALECT, PRE_ACCESS, PRE_GROUP, READ_ONLY, Listener, Mark, Scene
from fusehsm.conform.workload import Script, Workload
from fusehsm.conform.workloads.opening import list_directory
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_ALLOW,
    FAN_AUDIT,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_DENY,
    FAN_ENABLE_AUDIT,
    FAN_EVENT_ON_CHILD,
    FAN_INFO,
    FAN_MARK_ADD,
    FAN_MARK_DONT_FOLLOW,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MARK_ONLYDIR,
    FAN_MARK_REMOVE,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    FAN_UNLIMITED_QUEUE,
    decode_events,
    encode_audit_rule,
    encode_response,
)

CLASSES = {
    "NOTIF": FAN_CLASS_NOTIF,
    "CONTENT": FAN_CLASS_CONTENT,
    "PRE_CONTENT": FAN_CLASS_PRE_CONTENT,
    "none": 12,
}
ADD, REMOVE, FLUSH = FAN_MARK_ADD, FAN_MARK_REMOVE, FAN_MARK_FLUSH
MOUNT, FILESYSTEM, ONLYDIR, DONT_FOLLOW = (
    FAN_MARK_MOUNT,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_ONLYDIR,
    FAN_MARK_DONT_FOLLOW,
)
IGNORED, IGNORE, SURVIVING = FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORE, FAN_MARK_IGNORED_SURV_MODIFY
PERMISSIONS = {
    "P": PRE_ACCESS,
    "O": FAN_OPEN_PERM,
    "A": FAN_ACCESS_PERM,
    "X": FAN_OPEN_EXEC_PERM,
    "OPEN": FAN_OPEN,
    "P and OPEN": PRE_ACCESS | FAN_OPEN,
    "P and ONDIR": PRE_ACCESS | FAN_ONDIR,
    "P and EVENT_ON_CHILD": PRE_ACCESS | FAN_EVENT_ON_CHILD,
    "A and ONDIR and EVENT_ON_CHILD": FAN_ACCESS_PERM | FAN_ONDIR | FAN_EVENT_ON_CHILD,
}


# fanotify_init


def making(flags: Iterable[int], event_f_flags: Iterable[int]) -> Script:
    """Make a group with each combination of these flags and event flags."""
    tried = [(each, how) for each in flags for how in event_f_flags]

    async def script(scene: Scene) -> None:
        for each, how in tried:

            async def make(each: int = each, how: int = how) -> None:
                (await scene.side.open_group(each, how)).close()

            await scene.note("the listener", f"fanotify_init {each:#x} {how:#o}", make)

    return script


GOOD = [0, 1, 2, 0x10, 0x20, 0x40, FAN_REPORT_PIDFD, FAN_REPORT_TID, 0x2000, 0x2173, 0x20F3]
INITS = [
    *(
        Workload("calls", f"init of class {name}", making([value | flag for flag in GOOD], [os.O_RDONLY]))
        for name, value in CLASSES.items()
    ),
    Workload(
        "calls",
        "init with flags that do not fit",
        making(
            [
                FAN_CLASS_PRE_CONTENT | flag
                for flag in (0x180, *(1 << bit for bit in range(9, 32) if bit != 13))
            ],
            [os.O_RDONLY],
        ),
    ),
    Workload(
        "calls",
        "init with event flags",
        making([PRE_GROUP], [mode | 1 << bit for mode in (0, 1, 2, 3) for bit in range(2, 31)]),
    ),
]


# fanotify_mark


def make_targets(scene: Scene, names: Collection[str]) -> None:
    """Make one object of every kind; a device only if `names` has it, because that needs root."""
    scene.file()
    (scene.backing / "dir").mkdir()
    os.mkfifo(scene.backing / "fifo")
    if "device" in names:
        os.mknod(scene.backing / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(scene.backing / "socket", 0o600 | stat.S_IFSOCK)
    os.symlink("file", scene.backing / "link")
    os.symlink("missing", scene.backing / "dangling")


def marking(group: int, *calls: tuple[int, int, str], each_in_its_own: bool = True) -> Script:
    """Make these calls, each on a new group, or all on the same group."""

    async def script(scene: Scene) -> None:
        make_targets(scene, {target for _, _, target in calls})
        listener: Listener | None = None
        for flags, mask, target in calls:
            if listener is None or each_in_its_own:
                listener = await scene.listen(flags=group)
            await listener.mark(flags, mask, target)
            if each_in_its_own:
                listener.close()

    return script


def sequence(name: str, *calls: tuple[int, int, str]) -> Workload:
    """Make these calls on one group, one after the other."""
    return Workload("calls", name, marking(PRE_GROUP, *calls, each_in_its_own=False))


TYPES = {"inode": 0, "mount": MOUNT, "filesystem": FILESYSTEM}
OBJECTS = ("file", "dir", "fifo", "device", "socket", "link", "dangling", "missing", "file/below", "x" * 300)
MARKS = [
    *(
        Workload(
            "calls",
            f"mark by class {name}, {kind}",
            marking(
                value | FAN_CLOEXEC,
                *((ADD | flags, mask, target) for mask in PERMISSIONS.values() for target in ("file", "dir")),
            ),
        )
        for name, value in CLASSES.items()
        if name != "none"
        for kind, flags in TYPES.items()
    ),
    Workload(
        "calls",
        "mark every kind of object",
        marking(
            PRE_GROUP,
            *(
                (ADD | how, mask, target)
                for target in OBJECTS
                for mask in (PRE_ACCESS, FAN_OPEN_PERM)
                for how in (0, ONLYDIR, DONT_FOLLOW)
            ),
        ),
        needs_root=True,
    ),
    Workload(
        "calls",
        "mark with unknown bits",
        marking(PRE_GROUP, *((ADD, 1 << bit, "file") for bit in range(64) if bit not in (30, 27))),
    ),
    Workload(
        "calls",
        "mark with flags that do not fit",
        marking(
            PRE_GROUP,
            *(
                (flags, PRE_ACCESS, "file")
                for flags in (0, 3, ADD | 0x800, ADD | 0x1000, ADD | 1 << 31, ADD | 0x110)
            ),
            *(
                (flags, 0, "file")
                for flags in (ADD, REMOVE, FLUSH, FLUSH | ONLYDIR, FLUSH | IGNORE, FLUSH | SURVIVING)
            ),
            *((flags, FAN_ONDIR, "file") for flags in (ADD, REMOVE)),
        ),
    ),
    *(
        Workload(
            "calls",
            f"ignore, {kind}",
            marking(
                PRE_GROUP,
                *(
                    (ADD | flags | how, mask, target)
                    for how in (
                        IGNORED,
                        IGNORED | SURVIVING,
                        IGNORE,
                        IGNORE | SURVIVING,
                        IGNORE | IGNORED,
                        SURVIVING,
                        FAN_MARK_EVICTABLE,
                        FAN_MARK_EVICTABLE | IGNORE | SURVIVING,
                    )
                    for mask in (PRE_ACCESS, PRE_ACCESS | FAN_ONDIR, PRE_ACCESS | FAN_EVENT_ON_CHILD)
                    for target in ("file", "dir")
                ),
            ),
        )
        for kind, flags in TYPES.items()
    ),
    sequence(
        "remove what was never marked", *((REMOVE | flags, PRE_ACCESS, "file") for flags in TYPES.values())
    ),
    sequence(
        "remove bit by bit",
        (ADD, PRE_ACCESS | FAN_OPEN_PERM, "file"),
        (REMOVE, FAN_ACCESS_PERM, "file"),
        (REMOVE, FAN_OPEN_PERM, "file"),
        (REMOVE, PRE_ACCESS, "file"),
        (REMOVE, PRE_ACCESS, "file"),
    ),
    sequence(
        "remove all but EVENT_ON_CHILD",
        (ADD, PRE_ACCESS | FAN_EVENT_ON_CHILD, "dir"),
        (REMOVE, PRE_ACCESS, "dir"),
        (REMOVE, PRE_ACCESS, "dir"),
        (REMOVE, FAN_EVENT_ON_CHILD, "dir"),
        (REMOVE, FAN_EVENT_ON_CHILD, "dir"),
    ),
    sequence("P onto ONDIR", (ADD, FAN_OPEN_PERM | FAN_ONDIR, "file"), (ADD, PRE_ACCESS, "file")),
    sequence("ONDIR onto P", (ADD, PRE_ACCESS, "file"), (ADD, FAN_OPEN_PERM | FAN_ONDIR, "file")),
    sequence(
        "IGNORE onto IGNORED_MASK", (ADD | IGNORED, PRE_ACCESS, "file"), (ADD | IGNORE, PRE_ACCESS, "file")
    ),
    sequence(
        "IGNORED_MASK onto IGNORE", (ADD | IGNORE, PRE_ACCESS, "file"), (ADD | IGNORED, PRE_ACCESS, "file")
    ),
    sequence(
        "IGNORE onto IGNORE SURV",
        (ADD | IGNORE | SURVIVING, PRE_ACCESS, "file"),
        (ADD | IGNORE, PRE_ACCESS, "file"),
    ),
    sequence(
        "IGNORE SURV onto IGNORE",
        (ADD | IGNORE, PRE_ACCESS, "file"),
        (ADD | IGNORE | SURVIVING, PRE_ACCESS, "file"),
        (REMOVE | IGNORED, PRE_ACCESS, "file"),
    ),
    sequence(
        "plain onto EVICTABLE",
        (ADD | FAN_MARK_EVICTABLE, PRE_ACCESS, "file"),
        (ADD, PRE_ACCESS, "file"),
        (ADD | FAN_MARK_EVICTABLE, PRE_ACCESS, "file"),
    ),
]


async def mark_by_descriptor(scene: Scene) -> None:
    """Marks of objects by descriptor, and by a path relative to a descriptor."""
    scene.file()
    (scene.backing / "dir").mkdir()
    (scene.backing / "dir" / "below").write_bytes(b"")
    opened = {
        "a file": os.open(scene.path / "file", os.O_RDONLY),
        "a file for writing": os.open(scene.path / "file", os.O_WRONLY),
        "a directory": os.open(scene.path / "dir", os.O_RDONLY),
        "O_PATH of a file": os.open(scene.path / "file", os.O_PATH),
        "O_PATH of a directory": os.open(scene.path / "dir", os.O_PATH),
    }
    numbers = {**opened, "-1": -1, "AT_FDCWD": -100, "a closed one": 9999}
    for name, number in numbers.items():
        for path in (None, "", "below", "missing", str(scene.path / "file")):
            for how in (0, ONLYDIR):
                listener = await scene.listen(lazy=True)
                if number == -100 and path in ("below", "missing"):
                    continue  # relative to the working directory of this process

                async def mark(number: int = number, path: str | None = path, how: int = how) -> None:
                    await listener.group.mark(ADD | how, PRE_ACCESS, number, path)  # noqa: B023 (awaited at once)

                shown_path = path and path.removeprefix(f"{scene.path}/")
                await only_noted(scene, f"mark {how:#x} {shown_path!r} at {name}", mark)
                listener.close()
    for number in opened.values():
        os.close(number)


# read and write of the group


async def waiting(scene: Scene, flags: int = PRE_GROUP) -> Listener:
    """A listener that does not read by itself, with one event in its queue."""
    path = scene.file()
    mask = FAN_ACCESS_PERM if flags & FAN_CLASS_CONTENT else PRE_ACCESS
    listener = await scene.listen(Mark(mask, "file"), flags=flags, lazy=True)
    scene.start("pread_path", path, 100, 5000)
    await listener.group.wait_readable()
    return listener


def short_buffers(flags: int) -> Script:
    """read(2) with every size up to the event's length."""

    async def script(scene: Scene) -> None:
        listener = await waiting(scene, flags)
        for size in range(64):

            async def read(size: int = size) -> int:
                data = listener.group.read(size)
                for event in decode_events(DIALECT, data):
                    for descriptor in (event.fd, event.pidfd):
                        if descriptor is not None and descriptor >= 0:
                            os.close(descriptor)
                return len(data)

            await only_noted(scene, f"read {size}", read)
        listener.close()

    return script


async def only_noted(scene: Scene, what: str, call: Callable[[], object]) -> None:
    """Note the result of a listener's call, without reading its events."""
    try:
        result: object = await call()  # type: ignore[misc]
    except OSError as error:
        result = errno.errorcode[error.errno or 0]
    scene.say("group 1", what, result)


ERRNOS = (0, 1, 2, 5, 11, 13, 16, 26, 28, 122, 133, 255)
VERDICTS = (
    *(0, FAN_ALLOW, FAN_DENY, FAN_ALLOW | FAN_DENY, FAN_ALLOW | 5 << 24, FAN_DENY | 1 << 8),
    *(FAN_DENY | number << 24 for number in ERRNOS),
)


def responses(flags: int) -> Script:
    """Every response to one event. The event waits until a response is accepted, then the access is made again."""
    audit = encode_audit_rule(1, 0, 0)
    extra = {
        "": b"",
        " with a rule": audit,
        " with half a rule": audit[:8],
        " with a wrong rule": b"\x09" + audit[1:],
    }

    async def script(scene: Scene) -> None:
        path = scene.file()
        content = bool(flags & FAN_CLASS_CONTENT)
        mark = Mark(FAN_ACCESS_PERM if content else PRE_ACCESS, "file")
        listener = await scene.listen(mark, flags=flags, lazy=True)
        accessor = scene.first()
        for verdict in VERDICTS:
            for more in (0, FAN_AUDIT, FAN_INFO, FAN_AUDIT | FAN_INFO):
                for name, record in extra.items():
                    call = scene.start("pread_path", path, 100, 5000, by=accessor)
                    await listener.group.wait_readable()
                    (event,) = decode_events(DIALECT, listener.group.read(4096))

                    async def write(
                        response: bytes = encode_response(event.fd, verdict | more) + record,
                    ) -> int:
                        return listener.group.write(response)

                    await only_noted(scene, f"write {verdict | more:#x}{name}", write)
                    # The result of the next answer shows whether this one answered the event.
                    try:
                        listener.group.write(encode_response(event.fd, FAN_ALLOW))
                        scene.say("group 1", "the event", "still waited")
                    except OSError as error:
                        scene.say("group 1", "the event", errno.errorcode[error.errno or 0])
                    os.close(event.fd)
                    await scene.end(call, "pread_path", accessor)

    return script


async def wrong_descriptors(scene: Scene) -> None:
    """Responses with a number of no event, of an answered event, and of an event that was not read."""
    listener = await waiting(scene)

    def answer(fd: int, response: int = FAN_ALLOW, more: bytes = b"") -> Callable[[], object]:
        async def write() -> int:
            return listener.group.write(encode_response(fd, response) + more)

        return write

    await only_noted(scene, "write before reading", answer(3))
    (event,) = decode_events(DIALECT, listener.group.read(4096))
    other = os.dup(event.fd)
    for name, fd in {"a duplicate": other, "-1": -1, "-2": -2, "no descriptor": 9999}.items():
        await only_noted(scene, f"write of {name}", answer(fd))
    rule = encode_audit_rule(1, 0, 0)
    await only_noted(scene, "probe", answer(-1, FAN_ALLOW | FAN_INFO, rule))
    await only_noted(scene, "probe for errnos", answer(-1, FAN_DENY | 5 << 24 | FAN_INFO, rule))
    await only_noted(scene, "probe without FAN_INFO", answer(-1, FAN_ALLOW, rule))
    for size in range(8):

        async def short(size: int = size) -> int:
            return listener.group.write(encode_response(event.fd, FAN_ALLOW)[:size])

        await only_noted(scene, f"write of {size} bytes", short)
    os.close(event.fd)
    os.close(other)
    await only_noted(scene, "write after closing", answer(event.fd))
    await only_noted(scene, "write again", answer(event.fd))


async def event_descriptors(scene: Scene) -> None:
    """The flags, the position and the file of an event's descriptor."""
    path = scene.file()
    for how in (
        os.O_RDONLY,
        os.O_WRONLY,
        os.O_RDWR,
        READ_ONLY,
        os.O_RDWR | os.O_APPEND,
        os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK,
    ):
        listener = await scene.listen(Mark(PRE_ACCESS, "file"), event_f_flags=how, lazy=True)
        call = scene.start("pread_path", path, 100, 5000)
        await listener.group.wait_readable()
        (event,) = decode_events(DIALECT, listener.group.read(4096))
        flags = fcntl.fcntl(event.fd, fcntl.F_GETFL)
        scene.say("the descriptor", f"of {how:#o} has", (oct(flags), fcntl.fcntl(event.fd, fcntl.F_GETFD)))
        scene.say("the descriptor", "is at", os.lseek(event.fd, 0, os.SEEK_CUR))
        scene.say("the descriptor", "is of", os.fstat(event.fd).st_size)
        listener.close()
        os.close(event.fd)
        await scene.end(call, "pread_path")


OF_DIRECTORIES = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_NONBLOCK)


async def events_of_directories(scene: Scene) -> None:
    """Groups that ask for descriptors to write through hear of directories all the same."""
    path = scene.file()
    for how in OF_DIRECTORIES:
        listener = await scene.listen(Mark(FAN_OPEN_PERM | FAN_ACCESS_PERM | FAN_ONDIR), event_f_flags=how)
        await scene.call(list_directory, path, what=f"list, heard through {how:#o}")
        listener.close()


async def descriptors_of_directories(scene: Scene) -> None:
    """A kernel that opens for itself opens directories for writing, too."""
    path = scene.file()
    for how in OF_DIRECTORIES:
        listener = await scene.listen(Mark(FAN_OPEN_PERM | FAN_ONDIR), event_f_flags=how, lazy=True)
        call = scene.start(list_directory, path)
        await listener.group.wait_readable()
        (event,) = decode_events(DIALECT, listener.group.read(4096))
        scene.say("the descriptor", f"of {how:#o} has", oct(fcntl.fcntl(event.fd, fcntl.F_GETFL)))
        listener.close()
        os.close(event.fd)
        await scene.end(call, "list_directory")


WORKLOADS = [
    *INITS,
    *MARKS,
    Workload("calls", "short buffers", short_buffers(PRE_GROUP)),
    Workload("calls", "short buffers with REPORT_PIDFD", short_buffers(PRE_GROUP | FAN_REPORT_PIDFD)),
    Workload("calls", "short buffers of class CONTENT", short_buffers(FAN_CLASS_CONTENT | FAN_CLOEXEC)),
    Workload("calls", "mark by descriptor", mark_by_descriptor),
    Workload("calls", "responses", responses(PRE_GROUP)),
    Workload("calls", "responses with ENABLE_AUDIT", responses(PRE_GROUP | FAN_ENABLE_AUDIT)),
    Workload(
        "calls",
        "responses of class CONTENT",
        responses(FAN_CLASS_CONTENT | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE),
    ),
    Workload("calls", "responses to nothing", wrong_descriptors),
    Workload("calls", "event descriptors", event_descriptors, "flags of event descriptors"),
    Workload("calls", "events of directories", events_of_directories),
    Workload(
        "calls", "event descriptors of directories", descriptors_of_directories, "descriptors of directories"
    ),
]
