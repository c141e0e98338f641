"""What one user can hold of what a daemon has: never so much that the others, or the control socket, have none."""

import errno
import fcntl
import os
import struct
import threading
import time

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from tests.conftest import MakeAccessor, MakeMount
from tests.support.harness import PATIENCE, Mount, fusehsm
from tests.support.requirements import require_root

pytestmark = [pytest.mark.fuse, pytest.mark.root]

DESCRIPTORS = 300  # of the daemon
MANY = 2 * DESCRIPTORS
USER, OTHER = 54321, 54322


@pytest.fixture(params=["exact", "first-access"])
def mount(make_mount: MakeMount, request: pytest.FixtureRequest) -> Mount:
    require_root()
    made = make_mount(
        "--allow-other", "--events", request.param, "--cache", "shared", descriptors=DESCRIPTORS
    )
    (made.source / "public").mkdir()
    os.chmod(made.source / "public", 0o1777)
    for number in range(50):
        (made.source / "public" / f"file-{number}").write_bytes(b"content")
    return made


def hold(path: str, number: int, how: str) -> tuple[int, int]:
    """Open so much, and keep it; how much that was, and the errno that ended it."""
    held: list[int] = []
    os.held = held  # type: ignore[attr-defined]
    for each in range(number):
        try:
            if how == "directories":
                held.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
            elif how == "directories that are read":
                held.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
                os.listdir(held[-1])
            else:
                name = f"{path}/mine-{os.getpid()}-{each}"
                held.append(os.open(name, os.O_RDWR | os.O_CREAT, 0o600))
                os.write(held[-1], b"mine")
                if how == "removed files":
                    os.unlink(name)
        except OSError as error:
            return len(held), error.errno or 0
    return len(held), 0


@pytest.mark.parametrize(
    "how",
    ["directories", "directories that are read", "files", "removed files"],
    ids=lambda how: how.replace(" ", "-"),
)
async def test_what_a_user_holds_is_not_missed_by_others(
    mount: Mount, make_accessor: MakeAccessor, how: str
) -> None:
    user, other = make_accessor(uid=USER, gid=USER), make_accessor(uid=OTHER, gid=OTHER)
    place = str(mount.path / "public")
    held, ended = await user.run(hold, place, MANY, how)
    assert (held, ended) == (MANY, 0)
    names = await other.run("listdir", place)
    assert {f"file-{number}" for number in range(50)} <= {*names}
    for number in range(50):
        assert await other.run("read_file", f"{place}/file-{number}") == b"content"
    assert (await other.run(hold, place, 10, "removed files")) == (10, 0)
    status = fusehsm("status", str(mount.path))
    assert status.returncode == 0, status.stderr


LOCKS = DESCRIPTORS // 3 // 2  # whose owners have a descriptor at once
MANY_RANGES, RANGES = 5000, 4096
MANY_WAITS, WAITS = 600, 512


@pytest.fixture
def locking(make_mount: MakeMount) -> Mount:
    require_root()
    made = make_mount("--allow-other", "--locks", "shared", descriptors=DESCRIPTORS)
    for name in ("user", "other", "root"):
        (made.source / name).write_bytes(bytes(4096))
        os.chmod(made.source / name, 0o666)
    return made


def lock_opens(path: str, number: int, wholly: bool) -> tuple[int, int]:
    """Lock a file for reading through so many open files; how many these are, and the errno that ended it."""
    held: list[int] = []
    os.held = held  # type: ignore[attr-defined]
    shared = struct.pack("=hh4xqqi4x", fcntl.F_RDLCK, 0, 0, 1, 0)
    for each in range(number):
        held.append(os.open(path, os.O_RDWR))
        try:
            if wholly:
                fcntl.flock(held[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)
            else:
                fcntl.fcntl(held[-1], fcntl.F_OFD_SETLK, shared)
        except OSError as error:
            return each, error.errno or 0
    return number, 0


def lock_ranges(path: str, number: int) -> tuple[int, int]:
    """Lock so many single bytes of a file that do not touch; how many these are, and the errno that ended it."""
    held = os.open(path, os.O_RDWR)
    os.held = held  # type: ignore[attr-defined]
    for each in range(number):
        try:
            lock = struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, 0, 2 * each, 1, 0)
            fcntl.fcntl(held, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            return each, error.errno or 0
    return number, 0


def unlock_ranges(number: int) -> None:
    """Give so many of those bytes back."""
    for each in range(number):
        unlock = struct.pack("=hh4xqqi4x", fcntl.F_UNLCK, 0, 2 * each, 1, 0)
        fcntl.fcntl(os.held, fcntl.F_OFD_SETLK, unlock)  # type: ignore[attr-defined]


def two_users_and_root(make_accessor: MakeAccessor) -> tuple[Accessor, Accessor, Accessor]:
    return (
        make_accessor(uid=USER, gid=USER),
        make_accessor(uid=OTHER, gid=OTHER),
        make_accessor(),
    )


@pytest.mark.engine("devfuse")
@pytest.mark.parametrize("wholly", [True, False], ids=["flock", "fcntl"])
async def test_a_users_locks_leave_descriptors_for_those_of_others(
    locking: Mount, make_accessor: MakeAccessor, wholly: bool
) -> None:
    user, other, root = two_users_and_root(make_accessor)
    path = str(locking.path / "user")
    assert await user.run(lock_opens, path, MANY, wholly) == (LOCKS // 2, errno.ENOLCK)
    assert await other.run(lock_opens, str(locking.path / "other"), 10, wholly) == (10, 0)
    assert await root.run(lock_opens, str(locking.path / "root"), 10, wholly) == (10, 0)
    # What has ended counts no more, as soon as the kernel has told of it.
    user.kill()
    with trio.fail_after(PATIENCE):
        while await make_accessor(uid=USER, gid=USER).run(lock_opens, path, 10, wholly) != (10, 0):
            await trio.sleep(0.1)


@pytest.mark.engine("devfuse")
async def test_a_users_locked_ranges_have_a_limit(locking: Mount, make_accessor: MakeAccessor) -> None:
    user, other, root = two_users_and_root(make_accessor)
    assert await user.run(lock_ranges, str(locking.path / "user"), MANY_RANGES) == (RANGES, errno.ENOLCK)
    assert await other.run(lock_ranges, str(locking.path / "other"), 50) == (50, 0)
    assert await root.run(lock_ranges, str(locking.path / "root"), RANGES + 50) == (RANGES + 50, 0)
    # The user who has given some back is refused by another's lock only.
    await user.run(unlock_ranges, 100)
    assert await make_accessor(uid=USER, gid=USER).run(lock_ranges, str(locking.path / "other"), 1) == (
        0,
        errno.EAGAIN,
    )


def wait_for_lock(path: str, number: int, ends: int) -> list[int]:
    """Wait in so many threads for the lock of a file; the errnos of the first `ends` of them."""
    errors: list[int] = []

    def wait() -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            lock = struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, lock)
            errors.append(0)
        except OSError as error:
            errors.append(error.errno or 0)

    threading.stack_size(1 << 16)
    for _ in range(number):
        threading.Thread(target=wait, daemon=True).start()
    while len(errors) < ends:
        time.sleep(0.01)
    time.sleep(0.2)
    return list(errors)


@pytest.mark.engine("devfuse")
async def test_a_users_waits_for_a_lock_have_a_limit(locking: Mount, make_accessor: MakeAccessor) -> None:
    user, other, holder = two_users_and_root(make_accessor)
    path = str(locking.path / "user")
    assert await holder.run(lock_ranges, path, 1) == (1, 0)
    refused = MANY_WAITS - WAITS
    assert await user.run(wait_for_lock, path, MANY_WAITS, refused) == [errno.ENOLCK] * refused
    waiting = other.start(wait_for_lock, path, 1, 1)
    user.kill()
    await holder.run(unlock_ranges, 1)
    assert await waiting.wait() == [0]
