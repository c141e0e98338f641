"""execve(2) of programs, of scripts and files that are neither, and the process of an event: threads, children, descriptors that were passed on."""

import ctypes
import errno
import glob
import os
import shutil
import socket
import threading
from collections.abc import Callable

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.executable import write_executable
from fusehsm.conform.scene import PRE_GROUP, Scene
from fusehsm.conform.workload import Need, Script, Workload, needing
from fusehsm.fanotify.abi import FAN_REPORT_PIDFD, FAN_REPORT_TID

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def execute(path: str, *arguments: str) -> int:
    child = os.fork()
    if child == 0:
        try:
            os.execve(path, [path, *arguments], {})
        except OSError as error:
            os._exit(200 + (error.errno or 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def execute_by_descriptor(path: str) -> int:
    program = os.open(path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            os.execve(program, [path], {})
        except OSError as error:
            os._exit(200 + (error.errno or 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def execute_in_thread(path: str) -> int:
    child = os.fork()
    if child == 0:
        thread = threading.Thread(target=lambda: os.execve(path, [path], {}))
        thread.start()
        thread.join()
        os._exit(100)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_execution(path: str) -> int:
    nothing = (ctypes.c_char_p * 1)(None)
    number = {"x86_64": 322, "aarch64": 281}[os.uname().machine]
    failed = libc.syscall(number, -100, path.encode(), nothing, nothing, 0x10000)
    return ctypes.get_errno() if failed else 0


def write_while_it_runs(path: str) -> int:
    child = os.fork()
    if child == 0:
        os.execve(path, [path], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    while os.readlink(f"/proc/{child}/exe") != path:
        pass
    try:
        os.close(os.open(path, os.O_WRONLY))
        return 0
    except OSError as error:
        return error.errno or 0
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def execute_unlinked(path: str) -> int:
    program = os.open(path, os.O_RDONLY)
    os.unlink(path)
    child = os.fork()
    if child == 0:
        try:
            os.execve(program, ["file"], {})
        except OSError as error:
            os._exit(200 + (error.errno or 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def spawn(path: str) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn(path, [path], {}), 0)[1])


def execute_with_descriptor(path: str) -> bytes:
    reading, writing = os.pipe()
    descriptor = os.open(path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        os.dup2(descriptor, 0)
        os.dup2(writing, 1)
        os.execve("/usr/bin/head", ["head", "-c", "100"], {})
    os.waitpid(child, 0)
    return os.read(reading, 1000)


def load_library(path: str) -> int:
    return ctypes.CDLL(path).zlibVersion.argtypes is None


def execute_by_interpreter(path: str, program: str) -> int:
    child = os.fork()
    if child == 0:
        os.execve(path, [path, program], {})
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def first(*patterns: str) -> str:
    """The first file of this machine that one of these patterns matches; else the first pattern."""
    return next((file for pattern in patterns for file in sorted(glob.glob(pattern))), patterns[0])


def copied(file: str) -> Callable[[Scene], str]:
    """Makes "file" a copy of a file of this machine."""

    def make(scene: Scene) -> str:
        shutil.copy(file, scene.backing / "file")
        (scene.backing / "file").chmod(0o755)
        return str(scene.path / "file")

    return make


def script_of_ours(scene: Scene) -> str:
    """A script. Its interpreter is a script in the same directory, whose interpreter is the system's shell."""
    (scene.backing / "interpreter").write_text("#!/bin/sh\nexit 6\n")
    (scene.backing / "interpreter").chmod(0o755)
    return written(f"#!{scene.path}/interpreter\n")(scene)


def program(scene: Scene) -> str:
    """Makes "file" a program that exits with 0."""
    write_executable(scene.backing / "file")
    return str(scene.path / "file")


def failing_program(scene: Scene) -> str:
    """Makes "file" a program that exits with 1."""
    write_executable(scene.backing / "file", 1)
    return str(scene.path / "file")


def written(text: str) -> Callable[[Scene], str]:
    """Makes "file" an executable script with this text."""

    def make(scene: Scene) -> str:
        (scene.backing / "file").write_text(text)
        (scene.backing / "file").chmod(0o755)
        return str(scene.path / "file")

    return make


def content(scene: Scene) -> str:
    """Makes "file" an executable file that is not a program."""
    return scene.file(mode=0o755)


def executed(
    name: str,
    make: Callable[[Scene], str],
    act: Callable[..., object],
    *arguments: object,
    differs: str | tuple[str, ...] = (),
    unsteady: bool = False,
    programs: tuple[str, ...] = (),
) -> Workload:
    """A workload: an accessor executes the file that `make` makes, while a listener hears all."""

    async def script(scene: Scene) -> None:
        path = make(scene)
        listener = await scene.listen(scene.everywhere())
        await scene.call(act, path, *arguments, what=name)
        listener.close()

    return Workload("executing", name, script, differs, unsteady=unsteady, programs=programs)


CHECKS = Need("AT_EXECVE_CHECK of execveat(2)", check_execution, (), errno.EINVAL.__eq__)


async def written_while_it_runs(scene: Scene) -> None:
    """open(2) of a running program for writing. The events of its start are not noted; they only have to be watched."""
    write_executable(scene.backing / "file", None)
    await scene.listen(scene.everywhere(), noted=False)
    await scene.call(write_while_it_runs, str(scene.path / "file"), what="open for writing")


START = "program start"
LOADER = first("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")
LIBRARY = first("/lib/*-linux-gnu/libz.so.1", "/usr/lib/*-linux-gnu/libz.so.1", "/usr/lib*/libz.so.1")
TRUE = shutil.which("true") or "true"
SHELL, PERL, HEAD = "/bin/sh", "/usr/bin/perl", "/usr/bin/head"
EXECUTING = [
    executed("a program", program, execute, differs=START, unsteady=True),
    executed("a program that fails", failing_program, execute, differs=START, unsteady=True),
    executed("by descriptor", program, execute_by_descriptor, differs=START, unsteady=True),
    executed("in a thread", program, execute_in_thread, differs=START, unsteady=True),
    executed("a script", written("#!/bin/sh\nexit 7\n"), execute, programs=(SHELL,)),
    executed(
        "a script with arguments", written('#!/bin/sh -e\nexit "$1"\n'), execute, "9", programs=(SHELL,)
    ),
    executed(
        "a script of another interpreter", written("#!/usr/bin/perl\nexit 3\n"), execute, programs=(PERL,)
    ),
    executed("a script without an interpreter", written("#!/missing\n"), execute),
    executed("a script that names no interpreter", written("exit 5\n"), execute),
    executed("a script whose interpreter is a script", script_of_ours, execute, programs=(SHELL,)),
    executed("a program that has been unlinked", program, execute_unlinked, differs=START, unsteady=True),
    executed("by posix_spawn", program, spawn, differs=START, unsteady=True),
    executed(
        "a program's interpreter",
        copied(LOADER),
        execute_by_interpreter,
        TRUE,
        differs=START,
        unsteady=True,
        programs=(LOADER, TRUE),
    ),
    executed("a library", copied(LIBRARY), load_library, differs=START, unsteady=True, programs=(LIBRARY,)),
    executed("what a program inherits", content, execute_with_descriptor, differs="pid", programs=(HEAD,)),
    executed("what is no program", content, execute),
    executed("what is empty", written(""), execute),
    executed("what may not be executed", lambda scene: scene.file(mode=0o644), execute),
    needing(CHECKS, executed("a check", program, check_execution)),
    needing(CHECKS, executed("a check of what is no program", content, check_execution)),
    Workload("executing", "written while it runs", written_while_it_runs, "running programs"),
]


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
PROCESSES = [
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
WORKLOADS = [*EXECUTING, *PROCESSES]
