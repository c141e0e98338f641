"""The process of an event: threads, children, and descriptors that were inherited or passed."""

import ctypes
import os
import socket
import threading

from fusehsm.conform.scene import PRE_GROUP, Scene
from fusehsm.conform.workload import Script, Workload
from fusehsm.fanotify.abi import FAN_REPORT_PIDFD, FAN_REPORT_TID

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def read_in_child(path: str, count: int) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        os._exit(len(os.pread(descriptor, count, 5000)) != count)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_in_child(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    child = os.fork()
    if child == 0:
        os.ftruncate(descriptor, 10000)
        os._exit(os.pwrite(descriptor, b"new", 5000))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_in_grandchild(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(len(os.pread(descriptor, 100, 5000)))
        os.waitpid(grandchild, 0)
        os._exit(len(os.pread(descriptor, 100, 0)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_what_a_child_opened(path: str) -> bytes:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        socket.send_fds(theirs, [b"x"], [os.open(path, os.O_RDONLY)])
        os._exit(0)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(child, 0)  # the process that opened the file has ended
    return os.pread(descriptors[0], 100, 5000)


def read_by_pidfd(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    pidfd = os.pidfd_open(os.getpid())
    taken = ctypes.CDLL(None).syscall(438, pidfd, descriptor, 0)  # pidfd_getfd
    return os.pread(taken, 100, 5000)


def read_in_thread(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    counts = []
    thread = threading.Thread(target=lambda: counts.append(len(os.pread(descriptor, 100, 5000))))
    thread.start()
    thread.join()
    return counts[0]


def read_in_threads_one_after_the_other(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)

    def use() -> None:
        os.pread(descriptor, 100, 5000)
        os.pwrite(descriptor, b"new", 100)

    for _ in range(3):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()


def read_together(path: str, number: int) -> list[int]:
    descriptor = os.open(path, os.O_RDONLY)
    counts = []
    start = threading.Barrier(number)

    def use() -> None:
        start.wait()
        counts.append(len(os.pread(descriptor, 100, 5000)))

    threads = [threading.Thread(target=use) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def run(act: object, *arguments: object, flags: int = 0, size: int = 20000) -> Script:
    """Run `act` in an accessor, while a listener with these additional flags hears all."""

    async def script(scene: Scene) -> None:
        path = scene.file(size=size)
        await scene.listen(scene.everywhere(), flags=PRE_GROUP | flags)
        await scene.call(act, path, *arguments)  # type: ignore[arg-type]

    return script


async def two_users(scene: Scene) -> None:
    """A file of root that another user may not read, and then may."""
    path = scene.file(mode=0o600)
    nobody = scene.accessor(uid=65534, gid=65534)
    await scene.listen(scene.everywhere())
    await scene.call("pread_path", path, 100, 5000, by=nobody)
    await scene.call("truncate", path, 0, by=nobody)
    (scene.backing / "file").chmod(0o644)
    await scene.call("pread_path", path, 100, 5000, by=nobody)


async def two_processes(scene: Scene) -> None:
    """Each process has events of its own."""
    path = scene.file()
    first, second = scene.accessor(), scene.accessor()
    await scene.listen(scene.everywhere())
    for accessor in (first, second, first):
        await scene.call("pread_path", path, 100, 5000, by=accessor)


PID = "pid"
WORKLOADS = [
    Workload("processes", "inherited", run(read_in_child, 100), PID),
    Workload("processes", "inherited, large", run(read_in_child, 500000, size=1 << 20), PID),
    Workload("processes", "inherited for writing", run(write_in_child), PID),
    Workload("processes", "inherited twice", run(read_in_grandchild), PID),
    Workload("processes", "passed", run(read_what_a_child_opened), PID),
    Workload("processes", "taken by pidfd_getfd", run(read_by_pidfd)),
    Workload("processes", "thread", run(read_in_thread)),
    Workload("processes", "thread with REPORT_TID", run(read_in_thread, flags=FAN_REPORT_TID)),
    Workload(
        "processes",
        "threads with REPORT_TID",
        run(read_in_threads_one_after_the_other, flags=FAN_REPORT_TID),
    ),
    Workload("processes", "threads", run(read_in_threads_one_after_the_other)),
    Workload("processes", "threads together", run(read_together, 5), at_once=True),
    Workload("processes", "thread with REPORT_PIDFD", run(read_in_thread, flags=FAN_REPORT_PIDFD)),
    Workload(
        "processes", "inherited with REPORT_PIDFD", run(read_in_child, 100, flags=FAN_REPORT_PIDFD), PID
    ),
    Workload("processes", "two users", two_users, needs_root=True),
    Workload("processes", "two processes", two_processes),
]
