"""Appending: nothing is lost where others append to the same file in SRC, and where a listener makes it longer meanwhile."""

import errno
import fcntl
import mmap
import os
import subprocess
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from fusehsm.linux.syscalls import kernel_version
from tests.support.async_listener import listening
from tests.support.kernel_and_mount import World
from tests.support.posix_trees import Errno, Tree, outcome

pytestmark = pytest.mark.fuse

MIB = 1 << 20
RWF_NOAPPEND = 0x20  # pwritev2(2)
HOW = ["O_APPEND", "pwrite", "F_SETFL", "F_SETFL off", "RWF_APPEND", "at its end"]
if kernel_version() >= (6, 9):
    HOW.append("RWF_NOAPPEND")


def append(path: Path, data: bytes) -> None:
    """As a shell's >> does it."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    assert os.write(fd, data) == len(data)
    os.close(fd)


def test_by_turns(tree: Tree) -> None:
    def act(path: Path) -> object:
        append(path / "log", b"first\n")
        kept = os.open(path / "log", os.O_RDWR | os.O_APPEND)
        # What is cached or mapped must not stay as it is where somebody appends.
        with mmap.mmap(kept, 6, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
            for turn in range(40):
                assert mapped[:6] == b"first\n"
                append(tree.backing / "log", b"below %d %s\n" % (turn, b"." * 90))
                if turn % 2:
                    append(path / "log", b"mount %d\n" % turn)
                else:
                    os.write(kept, b"mount %d\n" % turn)
                    os.pread(kept, 10_000, 0)
        return (path / "log").read_bytes() == (tree.backing / "log").read_bytes()

    assert tree.run(act)
    lines = (tree.backing / "log").read_bytes().splitlines()
    assert [line.split(b" .")[0] for line in lines[1:]] == [
        b"%s %d" % (side, turn) for turn in range(40) for side in (b"below", b"mount")
    ]


@pytest.mark.parametrize("how", HOW)
def test_where_it_goes(tree: Tree, how: str) -> None:
    """What decides is how a file is open at that moment, and one call's own flag; the offset is the caller's guess."""

    def act(path: Path) -> None:
        name = path / "file"
        name.write_bytes(b"0123456789")
        fd = os.open(
            name,
            os.O_RDWR | (os.O_APPEND if how in ("O_APPEND", "pwrite", "RWF_NOAPPEND", "F_SETFL off") else 0),
        )
        assert os.fstat(fd).st_size == 10
        append(tree.backing / "file", b"below")
        if how == "O_APPEND":
            os.write(fd, b"mount")
        elif how == "F_SETFL":
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
            os.write(fd, b"mount")
        elif how == "F_SETFL off":
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
            os.pwrite(fd, b"mount", 10)
        elif how == "pwrite":
            os.pwrite(fd, b"mount", 0)  # appends all the same (pwrite(2))
        elif how == "RWF_APPEND":
            os.pwritev(fd, [b"mo", b"unt"], 0, os.RWF_APPEND)
        elif how == "RWF_NOAPPEND":
            os.pwritev(fd, [b"mo", b"unt"], 10, RWF_NOAPPEND)
        else:
            os.pwrite(fd, b"mount", 10)
        os.close(fd)

    tree.run(act)
    placed = how in ("F_SETFL off", "RWF_NOAPPEND", "at its end")
    assert (tree.backing / "file").read_bytes() == b"0123456789" + (b"mount" if placed else b"belowmount")


def test_much_at_once(tree: Tree) -> None:
    """It travels in pieces, of which each follows the last."""
    much = b"".join(b"%d " % number for number in range(700_000))

    def act(path: Path) -> object:
        append(path / "file", b"first")
        fd = os.open(path / "file", os.O_WRONLY | os.O_APPEND)
        append(tree.backing / "file", b"below" * 1000)
        written = os.write(fd, much)
        append(tree.backing / "file", b"below")
        return written, os.write(fd, b"last")

    assert tree.run(act) == (len(much), 4)
    assert (tree.backing / "file").read_bytes() == b"first" + b"below" * 1000 + much + b"below" + b"last"


def test_all_at_the_same_time(tree: Tree) -> None:
    """Whole lines of three processes, two through the mount and one below it."""

    def act(path: Path) -> tuple[list[int], bytes]:
        append(path / "log", b"")
        children = []
        for name, directory in ((b"A", path), (b"B", path), (b"C", tree.backing)):
            child = os.fork()
            if child == 0:
                fd = os.open(directory / "log", os.O_WRONLY | os.O_APPEND)
                for number in range(150):
                    os.write(fd, b"%s %d %s\n" % (name, number, name * (number * 7 % 200)))
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        append(path / "log", b"end\n")
        content = (tree.backing / "log").read_bytes()
        assert (path / "log").read_bytes() == content
        os.truncate(path / "log", 0)
        return codes, content

    codes, content = tree.run(act)
    assert codes == [0, 0, 0]
    expected = {
        b"%s %d %s" % (name, n, name * (n * 7 % 200)) for name in (b"A", b"B", b"C") for n in range(150)
    }
    if tree.world == "private":
        # What is appended through the page cache comes page by page.
        assert len(content) == sum(len(line) + 1 for line in expected) + 4
    else:
        assert sorted(content.splitlines()) == sorted([*expected, b"end"])


def test_a_file_that_can_only_be_appended_to(tree: Tree) -> None:
    def chattr(change: str) -> None:
        subprocess.run(["chattr", change, tree.backing / "log"], check=True)

    def act(path: Path) -> object:
        append(path / "log", b"one ")
        chattr("+a")
        try:
            append(path / "log", b"two ")
            fd = os.open(path / "log", os.O_RDWR | os.O_APPEND)
            append(tree.backing / "log", b"three ")
            os.write(fd, b"four")

            def overwrite() -> None:
                # Where the kernel opens files without asking, it is the writing that fails.
                plain = os.open(path / "log", os.O_WRONLY)
                os.pwrite(plain, b"ONE", 0)

            failed = [
                outcome(overwrite),
                outcome(os.truncate, path / "log", 0),
                outcome(os.unlink, path / "log"),
            ]
            os.write(fd, b" five")
        finally:
            chattr("-a")
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.pwrite(fd, b"ONE", 0)
        return failed

    assert tree.run(act) == [Errno(errno.EPERM)] * 3
    assert (tree.backing / "log").read_bytes() == b"ONE two three four five"


async def test_what_a_listener_has_made_longer(world: World, accessor: Accessor) -> None:
    """The end of the file is where it is once the listener has answered."""
    (world.backing / "stub").write_bytes(b"\0" * 10)

    def fill(event: Event) -> int:
        os.pwrite(event.fd, b"filled " * 1000, 0)
        return 0

    async with listening(
        world.path / "stub", ("PRE_ACCESS",), answer=fill, event_f_flags=os.O_RDWR | os.O_CLOEXEC
    ):
        await accessor.run(
            lambda path: os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"appended"),
            str(world.path / "stub"),
        )
    assert (world.backing / "stub").read_bytes() == b"filled " * 1000 + b"appended"
