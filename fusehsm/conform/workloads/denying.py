"""Every denial at every call: the error of the call, and that a denial is not remembered."""

import ctypes
import errno
import mmap
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.executable import write_executable
from fusehsm.conform.scene import (
    DIALECT,
    EVERYTHING,
    MIB,
    PLAIN_DENY,
    PRE_ACCESS,
    PRE_GROUP,
    Question,
    Scene,
)
from fusehsm.conform.workload import Workload, needing
from fusehsm.conform.workloads import async_io, opening, writing
from fusehsm.fanotify.abi import FAN_CLASS_CONTENT, FAN_CLOEXEC, FAN_ONDIR

ANSWERS = (PLAIN_DENY, *sorted(number for number in DIALECT.deny_errnos if number))
BUT_EAGAIN = (*(answer for answer in ANSWERS if answer != errno.EAGAIN), 0)

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def open_only(path: str, flags: int) -> None:
    os.close(os.open(path, flags))


def pread(path: str, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, count, 5000)
    finally:
        os.close(descriptor)


def read(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return len(os.read(descriptor, 100))
    finally:
        os.close(descriptor)


def readv(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.readv(descriptor, [bytearray(100), bytearray(50)])
    finally:
        os.close(descriptor)


def pwrite(path: str, count: int, flags: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | flags)
    try:
        return os.pwrite(descriptor, bytes(count), 5000)
    finally:
        os.close(descriptor)


def ftruncate(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(descriptor, 5000)
    finally:
        os.close(descriptor)


def fallocate(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        if libc.fallocate(descriptor, 0, ctypes.c_int64(5000), ctypes.c_int64(100)):
            raise OSError(ctypes.get_errno(), "fallocate")
    finally:
        os.close(descriptor)


def send(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    try:
        return os.sendfile(theirs.fileno(), descriptor, 5000, 100)
    finally:
        os.close(descriptor)
        ours.close()


def splice_from(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    reading, writing = os.pipe()
    try:
        return os.splice(descriptor, writing, 100, offset_src=5000)
    finally:
        for used in (descriptor, reading, writing):
            os.close(used)


def splice_to(path: str) -> int:
    reading, writing = os.pipe()
    os.write(writing, bytes(100))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        return os.splice(reading, descriptor, 100, offset_dst=5000)
    finally:
        for used in (descriptor, reading, writing):
            os.close(used)


def copy_range(path: str) -> int:
    source = os.open(path, os.O_RDONLY)
    target = os.open(path, os.O_WRONLY)
    try:
        return os.copy_file_range(source, target, 100, 5000, 0)
    finally:
        os.close(source)
        os.close(target)


def pwritev(path: str) -> int:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        return os.pwritev(descriptor, [bytes(100), bytes(50)], 5000, os.RWF_DSYNC)
    finally:
        os.close(descriptor)


def write(path: str) -> int:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        return os.write(descriptor, bytes(100))
    finally:
        os.close(descriptor)


def read_direct(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.preadv(descriptor, [mmap.mmap(-1, 4096)], 4096)
    finally:
        os.close(descriptor)


def openat2(path: str) -> None:
    how = (ctypes.c_uint64 * 3)(os.O_RDONLY, 0, 0)
    descriptor = libc.syscall(437, -100, path.encode(), how, 24)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "openat2")
    os.close(descriptor)


def reopen(path: str) -> None:
    descriptor = os.open(path, os.O_PATH)
    try:
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY))
    finally:
        os.close(descriptor)


def map_shared(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=4096)
    return mapping[5000:5001]


def map_populated(path: str, flag: int = 0x8000) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE | flag, prot=mmap.PROT_READ, offset=4096)
    return mapping[5000:5001]


def execute(path: str) -> int:
    child = os.fork()
    if child == 0:
        try:
            os.execve(path, [path], {})
        except OSError as error:
            os._exit(error.errno or 0)
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if failed:
        raise OSError(failed, os.strerror(failed))
    return failed


def map_and_touch(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096)
    return mapping[5000:5001]


def read_again(path: str, count: int) -> list[object]:
    descriptor = os.open(path, os.O_RDONLY)
    results: list[object] = []
    for _ in range(3):
        try:
            results.append(os.pread(descriptor, count, 5000))
        except OSError as error:
            results.append(error.errno)
    return results


@dataclass(slots=True)
class Denier:
    """The answer function of a listener that denies events of one name."""

    #: The name of the events, without FAN_.
    name: str
    #: The answer to them; 0 allows.
    answer: int = 0
    #: The number of such events to allow first.
    skip: int = 0
    #: The number of denials; later events are allowed.
    times: int = sys.maxsize

    def __call__(self, question: Question) -> int:
        """The answer to an event; 0 allows."""
        if self.name not in question.name.split("|"):
            return 0
        if self.skip:
            self.skip -= 1
            return 0
        self.times -= 1
        return self.answer if self.times >= 0 else 0


def row(
    name: str,
    denied: str,
    act: Callable[..., object] | str,
    *arguments: object,
    skip: int = 0,
    times: int = sys.maxsize,
    differs: str | tuple[str, ...] = (),
    make: Callable[[Scene], str] = lambda scene: scene.file(size=MIB),
    flags: int = PRE_GROUP,
    mask: int = EVERYTHING,
    steps: tuple[int, ...] = (*ANSWERS, 0),
    unsteady: bool = False,
    needs_root: bool = False,
    programs: tuple[str, ...] = (),
) -> Workload:
    """A workload that makes one call for each of `steps`, its answer (0: allowed), and notes the file's content at the end."""

    async def script(scene: Scene) -> None:
        path = make(scene)
        denier = Denier(denied)
        listener = await scene.listen(scene.everywhere(mask), flags=flags, answer=denier)
        for denier.answer in steps:
            denier.skip, denier.times = skip, times
            accessor = scene.accessor() if differs else scene.first()
            await scene.call(act, path, *arguments, what=name, by=accessor)
        listener.close()
        if (scene.backing / "file").is_file():
            scene.say("afterwards", "file holds", scene.content())

    return Workload(
        "denying",
        f"{denied} at {name}",
        script,
        differs,
        unsteady=unsteady,
        needs_root=needs_root,
        programs=programs,
    )


def program(scene: Scene) -> str:
    """A program that exits with 0."""
    write_executable(scene.backing / "file")
    return str(scene.path / "file")


def shell_script(scene: Scene) -> str:
    """A shell script."""
    (scene.backing / "file").write_text("#!/bin/sh\nexit 0\n")
    (scene.backing / "file").chmod(0o755)
    return str(scene.path / "file")


def directory(scene: Scene) -> str:
    """An empty directory."""
    (scene.backing / "sub").mkdir()
    return str(scene.path / "sub")


def nothing(scene: Scene) -> str:
    """The path of a file that does not exist yet."""
    return str(scene.path / "file")


OPEN, EXEC, ACCESS, PRE = "OPEN_PERM", "OPEN_EXEC_PERM", "ACCESS_PERM", "PRE_ACCESS"
NO_PRE = EVERYTHING & ~PRE_ACCESS
TOUCH, PIECES = "mappings ask when touched", "asynchronous requests"
AGAIN = "programs that are read again"
ROWS = [
    row("open for reading", OPEN, open_only, os.O_RDONLY),
    row("open for both", OPEN, open_only, os.O_RDWR),
    row("open with O_TRUNC", OPEN, open_only, os.O_WRONLY | os.O_TRUNC),
    row("open with O_CREAT of a new file", OPEN, open_only, os.O_RDWR | os.O_CREAT, make=nothing),
    row("open with O_EXCL", OPEN, open_only, os.O_RDWR | os.O_CREAT | os.O_EXCL, make=nothing),
    row("pread", PRE, pread, 100),
    row("pread", ACCESS, pread, 100),
    row("a large pread", PRE, pread, 3 * MIB),
    row("a large pread", ACCESS, pread, 3 * MIB),
    row("read", PRE, read),
    row("read", ACCESS, read),
    row("readv", PRE, readv),
    row("an unnamed file", OPEN, open_only, os.O_TMPFILE | os.O_RDWR, make=directory, differs="O_TMPFILE"),
    row("open by handle", OPEN, opening.open_by_handle, needs_root=True),
    row("openat2", OPEN, openat2),
    row("open through proc", OPEN, reopen),
    row("a direct read", PRE, read_direct),
    row("a direct read", ACCESS, read_direct),
    row("pwritev", PRE, pwritev),
    row("write", PRE, write),
    row("io_submit's PREAD", PRE, async_io.submit_requests, [(async_io.PREAD, 5000, 100)], differs=PIECES),
    row("io_submit's PREAD", ACCESS, async_io.submit_requests, [(async_io.PREAD, 5000, 100)], differs=PIECES),
    row("io_submit's PWRITE", PRE, async_io.submit_requests, [(async_io.PWRITE, 5000, 100)], differs=PIECES),
    row("io_uring's READ", PRE, async_io.submit_entry, async_io.READ, 5000, 100, steps=BUT_EAGAIN),
    row("io_uring's READ", ACCESS, async_io.submit_entry, async_io.READ, 5000, 100, steps=BUT_EAGAIN),
    row("io_uring's WRITE", PRE, async_io.submit_entry, async_io.WRITE, 5000, 100, steps=BUT_EAGAIN),
    row(
        *("io_uring's READ, with EAGAIN", PRE, async_io.submit_entry, async_io.READ, 5000, 100),
        steps=(errno.EAGAIN,),
        times=5,
        differs="EAGAIN for io_uring",
    ),
    needing(
        async_io.TRUNCATES,
        row("io_uring's FTRUNCATE", PRE, async_io.submit_entry, async_io.FTRUNCATE, 5000, 0),
    ),
    row("io_uring's OPENAT", OPEN, async_io.submit_entry, async_io.OPENAT, 0, 0, skip=1),
    row("pwrite", PRE, pwrite, 100, 0),
    row("a large pwrite", PRE, pwrite, 3 * MIB, 0),
    row("an appending pwrite", PRE, pwrite, 100, os.O_APPEND),
    row("truncate", PRE, "truncate", 5000),
    row("ftruncate", PRE, ftruncate),
    row("fallocate", PRE, fallocate, differs="fallocate"),
    *(
        row(f"fallocate of {name}", PRE, writing.fallocate, mode, 5000, 9000, differs=differs)
        for name, mode, differs in (
            ("a hole", 3, "fallocate"),
            ("zeros", 0x10, writing.ZEROS),
            ("what the size does not count", 1, "fallocate"),
        )
    ),
    row("sendfile", PRE, send),
    row("sendfile", ACCESS, send),
    row("splice from a file", PRE, splice_from),
    row("splice from a file", ACCESS, splice_from),
    row("splice to a file", PRE, splice_to),
    row("copy_file_range", PRE, copy_range),
    row("copy_file_range", ACCESS, copy_range),
    row("the target of copy_file_range", PRE, copy_range, skip=1),
    row("mmap", PRE, map_and_touch, differs=TOUCH),
    row("a shared mmap", PRE, map_shared, differs=(TOUCH, "shared mappings (exact)")),
    row(
        *("a mmap with MAP_POPULATE", PRE, map_populated),
        steps=(errno.EIO,),
        times=5,
        differs="denied while it is mapped",
    ),
    row(
        "MAP_LOCKED",
        PRE,
        map_populated,
        0x2000,
        steps=(errno.EIO,),
        times=5,
        differs="denied while it is mapped",
    ),
    row("execve", EXEC, execute, make=program, steps=ANSWERS),
    row("execve", OPEN, execute, make=program, steps=ANSWERS),
    row("execve", PRE, execute, make=program, steps=ANSWERS),
    row("execve", ACCESS, execute, make=program, steps=ANSWERS),
    *(
        replace(
            row("execve's second read", denied, execute, make=program, steps=ANSWERS, skip=1), differs=AGAIN
        )
        for denied in (PRE, ACCESS)
    ),
    row("execve of a script", EXEC, execute, make=shell_script, programs=("/bin/sh",)),
    row("execve of a script", OPEN, execute, make=shell_script, programs=("/bin/sh",)),
    row("execve of a script", PRE, execute, make=shell_script, programs=("/bin/sh",)),
    row("execve of a script", ACCESS, execute, make=shell_script, programs=("/bin/sh",)),
    row("listing", OPEN, "listdir", make=directory, mask=NO_PRE | FAN_ONDIR),
    row("listing", ACCESS, "listdir", make=directory, mask=NO_PRE | FAN_ONDIR),
    row(
        "open for a CONTENT group",
        *(OPEN, open_only, os.O_RDONLY),
        flags=FAN_CLASS_CONTENT | FAN_CLOEXEC,
        mask=NO_PRE,
        steps=(PLAIN_DENY, 0),
    ),
    row(
        "pread for a CONTENT group",
        *(ACCESS, pread, 100),
        flags=FAN_CLASS_CONTENT | FAN_CLOEXEC,
        mask=NO_PRE,
        steps=(PLAIN_DENY, 0),
    ),
    row("the same descriptor", PRE, read_again, 100),
    row("the same descriptor, large", PRE, read_again, 500000),
]
WORKLOADS = [
    needing(async_io.IO_URING, workload) if "io_uring" in workload.name and not workload.needs else workload
    for workload in ROWS
]
