"""Another process's lease on a file of SRC (fcntl(2), F_SETLEASE) makes those wait who open that file, and nobody else."""

import os
from collections.abc import Callable

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from tests.conftest import MakeAccessor, MakeMount
from tests.support.async_listener import listening
from tests.support.harness import Mount

pytestmark = pytest.mark.fuse

CONTENT = b"of the holder"
OTHER = b"of another"


@pytest.fixture(scope="module", params=["exact", "first-access"])
def mount(make_shared_mount: MakeMount, request: pytest.FixtureRequest) -> Mount:
    made = make_shared_mount("--events", request.param, "--cache", "shared")
    (made.source / "other").write_bytes(OTHER)
    return made


@pytest.fixture
def leased(mount: Mount, request: pytest.FixtureRequest) -> str:
    """The name of a new file, whose content is CONTENT."""
    name = f"leased-{request.node.name}".replace("/", "-")
    (mount.source / name).write_bytes(CONTENT)
    return name


def hold(path: str, kind: str) -> int:
    """Take a lease on a file, and do not give it back when somebody asks for it (SIGIO)."""
    import fcntl
    import signal

    signal.signal(signal.SIGIO, signal.SIG_IGN)
    descriptor = os.open(path, os.O_RDWR if kind == "F_WRLCK" else os.O_RDONLY)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, getattr(fcntl, kind))
    return descriptor


def overwrite(path: str) -> int:
    """Open a file with O_TRUNC, and write it anew."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    return os.write(descriptor, b"new")


async def read_other(mount: Mount, accessor: Accessor) -> None:
    found: bytes = await accessor.run("read_file", str(mount.path / "other"))
    assert found == OTHER


@pytest.mark.parametrize(
    ("kind", "action", "arguments", "result", "left"),
    [
        ("F_WRLCK", "read_file", (), CONTENT, CONTENT),
        ("F_WRLCK", "pwrite_path", (b"OF", 0), 2, b"OF the holder"),
        ("F_RDLCK", "pwrite_path", (b"OF", 0), 2, b"OF the holder"),
        ("F_RDLCK", "truncate", (2,), None, b"of"),
        ("F_RDLCK", overwrite, (), 3, b"new"),
    ],
    ids=["read", "write", "write-read-lease", "truncate", "overwrite"],
)
async def test_one_waits_and_the_others_do_not(
    mount: Mount,
    leased: str,
    make_accessor: MakeAccessor,
    kind: str,
    action: str | Callable[..., object],
    arguments: tuple[object, ...],
    result: object,
    left: bytes,
) -> None:
    holder, waiting, other = make_accessor(), make_accessor(), make_accessor()
    descriptor = await holder.run(hold, str(mount.source / leased), kind)
    call = waiting.start(action, str(mount.path / leased), *arguments)
    for _ in range(3):
        await read_other(mount, other)
    assert not call.done
    await holder.run("close", descriptor)
    assert await call.wait() == result
    assert (mount.source / leased).read_bytes() == left


async def test_without_patience(mount: Mount, leased: str, make_accessor: MakeAccessor) -> None:
    """open(2) with O_NONBLOCK fails with EAGAIN, as on the file itself."""
    holder, accessor = make_accessor(), make_accessor()
    await holder.run(hold, str(mount.source / leased), "F_WRLCK")
    for path in (mount.source / leased, mount.path / leased):
        with pytest.raises(BlockingIOError):
            await accessor.run("open", str(path), os.O_RDONLY | os.O_NONBLOCK)


async def test_one_that_waits_can_be_killed(mount: Mount, leased: str, make_accessor: MakeAccessor) -> None:
    holder, waiting, other = make_accessor(), make_accessor(), make_accessor()
    await holder.run(hold, str(mount.source / leased), "F_WRLCK")
    waiting.start("read_file", str(mount.path / leased))
    await read_other(mount, other)
    waiting.kill()
    assert await trio.to_thread.run_sync(waiting.wait_exit) == 9


async def test_the_event_of_a_leased_file(mount: Mount, leased: str, make_accessor: MakeAccessor) -> None:
    """The listener's descriptor is for writing, which breaks a read lease. It cannot be opened yet: the access is denied, as the kernel does where
    a descriptor cannot be opened, and everybody else goes on. Later it can."""
    holder, waiting, other = make_accessor(), make_accessor(), make_accessor()
    descriptor = await holder.run(hold, str(mount.source / leased), "F_RDLCK")
    async with listening(mount.path) as listener:
        with pytest.raises(PermissionError):
            await waiting.run("read_file", str(mount.path / leased))
        await read_other(mount, other)
        assert {event.path for event in listener.take()} == {str(mount.path / "other")}
        await holder.run("close", descriptor)
        assert await waiting.run("read_file", str(mount.path / leased)) == CONTENT
