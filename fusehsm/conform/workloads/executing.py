"""execve(2) of programs, of scripts and of files that are neither."""

import ctypes
import glob
import os
import shutil
import threading
from collections.abc import Callable

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import Scene
from fusehsm.conform.workload import Workload

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
        os.execve(path, [path, "1000"], {})
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


def copied_file(*patterns: str) -> Callable[[Scene], str]:
    """Makes "file" a copy of the system's first file that one of these patterns matches."""

    def make(scene: Scene) -> str:
        found = next((file for pattern in patterns for file in sorted(glob.glob(pattern))), None)
        if found is None:
            raise FileNotFoundError(patterns[0])
        shutil.copy(found, scene.backing / "file")
        (scene.backing / "file").chmod(0o755)
        return str(scene.path / "file")

    return make


def script_of_ours(scene: Scene) -> str:
    """A script. Its interpreter is a script in the same directory, whose interpreter is the system's shell."""
    (scene.backing / "interpreter").write_text("#!/bin/sh\nexit 6\n")
    (scene.backing / "interpreter").chmod(0o755)
    return written(f"#!{scene.path}/interpreter\n")(scene)


def copied(program: str) -> Callable[[Scene], str]:
    """Makes "file" a copy of a program of the system."""

    def make(scene: Scene) -> str:
        found = shutil.which(program)
        if found is None:
            raise FileNotFoundError(program)
        shutil.copy(found, scene.backing / "file")
        return str(scene.path / "file")

    return make


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


def row(
    name: str,
    make: Callable[[Scene], str],
    act: Callable[..., object],
    *arguments: object,
    differs: str | tuple[str, ...] = (),
    unsteady: bool = False,
) -> Workload:
    """A workload: an accessor executes the file that `make` makes, while a listener hears all."""

    async def script(scene: Scene) -> None:
        path = make(scene)
        listener = await scene.listen(scene.everywhere())
        await scene.call(act, path, *arguments, what=name)
        listener.close()

    return Workload("executing", name, script, differs, unsteady=unsteady)


async def written_while_it_runs(scene: Scene) -> None:
    """open(2) of a running program for writing. The events of its start are not noted; they only have to be watched."""
    path = copied("sleep")(scene)
    await scene.listen(scene.everywhere(), noted=False)
    await scene.call(write_while_it_runs, path, what="open for writing")


START = "program start"
LOADER = copied_file("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")
LIBRARY = copied_file("/lib/*-linux-gnu/libz.so.1", "/usr/lib/*-linux-gnu/libz.so.1", "/usr/lib*/libz.so.1")
TRUE = shutil.which("true") or "/bin/true"
WORKLOADS = [
    row("a program", copied("true"), execute, differs=START, unsteady=True),
    row("a program that fails", copied("false"), execute, differs=START, unsteady=True),
    row("by descriptor", copied("true"), execute_by_descriptor, differs=START, unsteady=True),
    row("in a thread", copied("true"), execute_in_thread, differs=START, unsteady=True),
    row("a script", written("#!/bin/sh\nexit 7\n"), execute),
    row("a script with arguments", written('#!/bin/sh -e\nexit "$1"\n'), execute, "9"),
    row("a script of another interpreter", written("#!/usr/bin/perl\nexit 3\n"), execute),
    row("a script without an interpreter", written("#!/missing\n"), execute),
    row("a script that names no interpreter", written("exit 5\n"), execute),
    row("a script whose interpreter is a script", script_of_ours, execute),
    row("a program that has been unlinked", copied("true"), execute_unlinked, differs=START, unsteady=True),
    row("by posix_spawn", copied("true"), spawn, differs=START, unsteady=True),
    row("a program's interpreter", LOADER, execute_by_interpreter, TRUE, differs=START, unsteady=True),
    row("a library", LIBRARY, load_library, differs=START, unsteady=True),
    row("what a program inherits", content, execute_with_descriptor, differs="pid"),
    row("what is no program", content, execute),
    row("what is empty", written(""), execute),
    row("what may not be executed", lambda scene: scene.file(mode=0o644), execute),
    row("a check", copied("true"), check_execution),
    row("a check of what is no program", content, check_execution),
    Workload("executing", "written while it runs", written_while_it_runs, "running programs"),
]
