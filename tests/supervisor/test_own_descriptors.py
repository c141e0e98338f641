"""Listeners that fill files through descriptors of their own, and know files by (st_dev, st_ino).

Natively and with `fusehsm run --listener` every accessor gets the content. In plain `fusehsm run` the listener uses the mount that waits for it: an
accessor gets the content or an error, or a line says that it got zeros. It never waits for ever, and nothing is silent.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeAccessor
from tests.support.kernel_and_run import STEP, Program, RunWorld, standing
from tests.support.listener_program_fixtures import WORLDS
from tests.support.listener_programs.building import program

pytestmark = pytest.mark.any_engine

SIZE = 70_000
CONTENT = b"C" * SIZE
HOW = ("event", "holes", "kept", "path", "chmod")


def read(path: str, size: int) -> bytes:
    """open(2), read(2)."""
    with open(path, "rb", buffering=0) as file:
        return file.read(size) or b""


def map_and_read(path: str, size: int) -> bytes:
    """A page fault for each page, in a child: SIGBUS would end the accessor."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with (
            open(path, "rb", buffering=0) as file,
            mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapping,
        ):
            data = bytes(mapping)
        while data:
            data = data[os.write(writing, data) :]
        os._exit(0)
    os.close(writing)
    got = b""
    while piece := os.read(reading, 1 << 16):
        got += piece
    os.close(reading)
    if os.waitpid(child, 0)[1]:
        raise OSError(errno.EFAULT, "killed by a signal")
    return got


def send(path: str, size: int) -> bytes:
    """sendfile(2) to a memory file."""
    target = os.memfd_create("target")
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < size:
            done += os.sendfile(target, file.fileno(), done, size - done) or size
    data = os.pread(target, size, 0)
    os.close(target)
    return data


def append(path: str, size: int) -> bytes:
    """write(2) at the end, then a read."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        os.write(descriptor, b"x")
        return os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


ACCESSES: dict[str, Callable[[str, int], bytes]] = {
    "read": read,
    "mmap": map_and_read,
    "sendfile": send,
    "append": append,
}


@pytest.fixture(params=WORLDS, scope="module")
def own_world(
    request: pytest.FixtureRequest, places: Callable[[str], Path], fuse: None
) -> Iterator[RunWorld]:
    """A directory in each world, for all tests here."""
    if request.param == "kernel":
        request.getfixturevalue("kernel_events")
    with standing(request.param, places("own")) as world:
        yield world


@pytest.mark.parametrize("how", HOW)
def test_fills_through_own_descriptors(
    how: str, own_world: RunWorld, session_directory: Path, make_accessor: MakeAccessor
) -> None:
    files = {access: own_world.place / f"{how}-{access}" for access in ACCESSES}
    for file in files.values():
        with file.open("wb") as made:
            made.truncate(SIZE)
    command = own_world.command(
        *program(session_directory, "own"), how, str(own_world.place), *map(str, files.values())
    )
    if "--mount" in command:
        command[command.index("--mount") : 0] = ["--deadlock-timeout", "1"]
    got: dict[str, object] = {}
    with Program(command) as listener:
        listener.wait_ready()
        for access, file in files.items():
            try:
                got[access] = make_accessor().call(ACCESSES[access], str(file), SIZE, timeout=STEP)
            except OSError as error:
                got[access] = error.errno
        listener.process.terminate()
        listener.end()
    said = listener.complaints.wait_for_end(STEP)
    if own_world.name != "run":
        assert got == dict.fromkeys(ACCESSES, CONTENT), said
        return
    if how == "holes":
        # It sees them, unless FUSE holds the inode's lock as for a write.
        assert got["read"] == got["mmap"] == got["sendfile"] == CONTENT, said
    for access, file in files.items():
        if got[access] == CONTENT:
            continue
        about = [line for line in said if str(file) in line]
        assert len(about) == 1, (access, got[access], said)
        assert "--listener" in about[0]
        assert got[access] in (bytes(SIZE), errno.EDEADLK, errno.EFAULT), access
        # Zeros are told of as such.
        assert ("reads zeros" in about[0]) == (got[access] == bytes(SIZE))
