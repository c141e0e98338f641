"""Nothing is unmounted that others have mounted: in the same place, on top, inside, or there by now instead."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.conform.sides import ext4_image
from fusehsm.linux.mountinfo import MountId, id_at, id_of, read_mounts
from fusehsm.linux.syscalls import MNT_DETACH, umount2
from tests.conftest import MakeMount
from tests.support import harness, leftovers
from tests.support.harness import PATIENCE, Mount, fusehsm, is_dead
from tests.support.kernel_and_run import RUN, STEP, Program, mounts_at, processes_at, wait_until
from tests.support.listener_steps import SIZE, make_files
from tests.support.requirements import require_root

pytestmark = [pytest.mark.any_engine, pytest.mark.fuse]
WAITS = 'echo ready; until test -e "$0"; do sleep 0.02; done; exit 7'


@pytest.fixture
def place(places: Callable[[str], Path], fuse: None) -> Iterator[Path]:
    """A directory of stubs; nothing is mounted there or below afterwards."""
    require_root()
    place = places("whose")
    make_files(place)
    yield place
    for pid in processes_at(place):
        leftovers.kill(pid)
    for mount in reversed(list(read_mounts())):
        if f"{mount.mount_point}/".startswith(f"{place}/"):
            with suppress(OSError):  # below a dead one, with which it goes
                umount2(os.fsencode(mount.mount_point), MNT_DETACH)


@contextmanager
def tmpfs(place: Path) -> Iterator[MountId]:
    """A mount that another program makes there."""
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    mount_id = id_at(str(place))
    yield mount_id
    if mount_id.number in [mount.number for mount in mounted(place)]:
        subprocess.run(["umount", "-l", place], check=False)


def mounted(place: Path) -> list[MountId]:
    """What is mounted at exactly that place, the last one last."""
    return [id_of(mount) for mount in read_mounts() if mount.mount_point == str(place)]


def is_served(accessor: Accessor, place: Path) -> bool:
    stub = str(place / "stub")
    return bool(accessor.call("read_file", stub, timeout=STEP) == bytes(SIZE))


def running_on(place: Path, end: Path, *more: str) -> Program:
    """A command under `fusehsm run` that ends with 7 when that file is there."""
    program = Program([*RUN, "--mount", str(place), *more, "--", "sh", "-c", WAITS, str(end)])
    program.wait_ready()
    return program


def server_of(place: Path) -> int:
    """The process that serves the mount of `fusehsm run` there."""
    (pid,) = [pid for pid in processes_at(place) if "--lifeline" in leftovers.command_line(pid)]
    return pid


# Refused


@pytest.mark.parametrize("keep", [(), ("--keep",)], ids=["", "kept"])
@pytest.mark.parametrize("alive", [True, False], ids=["served", "dead"])
def test_a_refused_mount(alive: bool, keep: tuple[str, ...], place: Path, accessor: Accessor) -> None:
    with Mount(place, place) as other:
        theirs = mounted(place)
        if not alive:
            other.kill_daemon()
        done = fusehsm("run", "--mount", place, *keep, "--", "true", timeout=STEP)
        assert done.returncode == 1
        assert f"run fusehsm umount {place}" in done.stderr
        assert mounted(place) == theirs
        assert is_served(accessor, place) if alive else is_dead(place)


@pytest.mark.parametrize("keep", [(), ("--keep",)], ids=["", "kept"])
@pytest.mark.parametrize("theirs_first", [False, True])
def test_one_of_two_mounts_is_refused(
    theirs_first: bool, keep: tuple[str, ...], place: Path, places: Callable[[str], Path], accessor: Accessor
) -> None:
    """The other one goes again, and only that."""
    free = places("free")
    with Mount(place, place):
        theirs = mounted(place)
        order = (place, free) if theirs_first else (free, place)
        words = [word for directory in order for word in ("--mount", directory)]
        assert fusehsm("run", *words, *keep, "--", "true", timeout=STEP).returncode == 1
        assert mounts_at(free) == 0
        assert mounted(place) == theirs
        assert is_served(accessor, place)


def test_a_mount_below_is_refused(place: Path, accessor: Accessor) -> None:
    """A mount in place covers what was mounted below it before, which is there again afterwards."""
    inner = place / "below"
    with Mount(inner, inner):
        theirs = id_of(next(mount for mount in read_mounts() if mount.mount_point == str(inner)))
        words = ("--mount", place, "--mount", inner)
        assert fusehsm("run", *words, "--", "true", timeout=STEP).returncode == 1
        assert mounts_at(place) == 0
        assert mounted(inner) == [theirs]
        assert accessor.call("read_file", str(inner / "inner"), timeout=STEP) == bytes(SIZE)


# Replaced


@pytest.mark.parametrize("how", ["killed", "detached"])
def test_another_mount_instead(how: str, place: Path, accessor: Accessor, tmp_path: Path) -> None:
    """The first one's daemon is killed, or it is unmounted while it is in use; the new one gets its number in mountinfo, if it can."""
    with running_on(place, tmp_path / "end") as running:
        if how == "killed":
            leftovers.kill(server_of(place))
            assert fusehsm("umount", place, timeout=STEP).returncode == 0
        else:
            accessor.call("open", str(place / "stub"), os.O_RDONLY)
            subprocess.run(["umount", "-l", place], check=True)
        with Mount(place, place):
            theirs = mounted(place)
            (tmp_path / "end").touch()
            assert running.end() == 7
            assert mounted(place) == theirs
            assert is_served(accessor, place)


def test_a_dead_mount_goes_with_the_command(place: Path, tmp_path: Path) -> None:
    with running_on(place, tmp_path / "end") as running:
        leftovers.kill(server_of(place))
        assert is_dead(place)
        (tmp_path / "end").touch()
        assert running.end() == 7
        assert mounts_at(place) == 0


def test_umount_takes_what_it_has_seen(make_mount: MakeMount) -> None:
    """And not what lies on top."""
    mount = make_mount()
    with tmpfs(mount.path) as theirs:
        done = fusehsm("umount", mount.path, timeout=STEP)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert mounted(mount.path)[-1] == theirs
    assert fusehsm("umount", mount.path, timeout=STEP).returncode == 0


# On top, and inside


@pytest.mark.parametrize("where", ["on top", "inside"])
@pytest.mark.parametrize("alive", [True, False], ids=["served", "killed"])
def test_what_is_mounted_on_it_stays(where: str, alive: bool, place: Path, tmp_path: Path) -> None:
    """The mount itself stays then, too: what was reached through it is refused, not read as zeros."""
    with (
        running_on(place, tmp_path / "end") as running,
        tmpfs(place if where == "on top" else place / "below") as theirs,
    ):
        if not alive:
            leftovers.kill(server_of(place))
        ours = mounted(place)[0]
        (tmp_path / "end").touch()
        assert running.end() == 7
        there = place if where == "on top" else place / "below"
        left = [mount for mount in read_mounts() if mount.mount_point == str(there)]
        assert left[-1].mount_id == theirs.number
        assert mounted(place)[0].number == ours.number
        if alive:
            (said,) = running.complaints.wait_for_end(STEP)
            assert f"{place}: left mounted: {there} is mounted on it; " in said


@pytest.mark.parametrize("where", ["on top", "inside"])
def test_a_daemon_that_is_told_to_end(where: str, make_mount: MakeMount) -> None:
    mount = make_mount()
    inner = mount.path / "inner"
    (mount.source / "inner").mkdir()
    there = mount.path if where == "on top" else inner
    with tmpfs(there) as theirs:
        assert mount.stop() == 0
        assert any(m.mount_id == theirs.number and m.mount_point == str(there) for m in read_mounts())
        assert any("left mounted" in line for line in mount.log.wait_for_end(PATIENCE))
        refused = fusehsm("umount", mount.path, timeout=STEP)
        assert refused.returncode == 1
        assert any(m.mount_id == theirs.number and m.mount_point == str(there) for m in read_mounts())
        subprocess.run(["umount", "-l", there], check=where == "on top")
    if where == "on top":
        assert is_dead(mount.path)
        assert fusehsm("umount", mount.path, timeout=STEP).returncode == 0


def test_it_waits_for_what_is_inside(make_mount: MakeMount) -> None:
    """A process that gets its signal at the same time may still need the mount."""
    mount = make_mount()
    (mount.source / "inner").mkdir()
    with tmpfs(mount.path / "inner"):
        mount.process.send_signal(signal.SIGTERM)
        subprocess.run(["umount", mount.path / "inner"], check=True, timeout=STEP)
        assert mount.process.wait(PATIENCE) == 0
    assert not mounted(mount.path)


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_nested_mounts_of_one_command(how: str, place: Path, tmp_path: Path) -> None:
    inner = place / "below"
    with running_on(place, tmp_path / "end", "--mount", str(inner)) as running:
        assert (mounts_at(place), mounts_at(inner)) == (1, 1)
        if how == "ended":
            (tmp_path / "end").touch()
            assert running.end() == 7
        else:
            leftovers.kill(running.process.pid)
            wait_until(lambda: not mounts_at(place))
        assert (mounts_at(place), mounts_at(inner)) == (0, 0)
        # The command's own calls end with ENOSYS between the supervisor's death and theirs: a program that starts then says so.
        assert [line for line in running.complaints.lines if not line.startswith("sleep: ")] == []


# On the real kernel


WATCH = """
import sys, trio
from fusehsm.backends.opening import open_group
from fusehsm.linux.mountinfo import read_mounts
async def main():
    async with open_group(sys.argv[1], backend="kernel"):
        print(len([mount for mount in read_mounts() if mount.mount_point.startswith(sys.argv[1])]))
        if len(sys.argv) > 2:
            import subprocess
            subprocess.run(["mount", "-t", "tmpfs", "none", sys.argv[2]], check=True)
trio.run(main)
print(*[mount.filesystem_type for mount in read_mounts() if mount.mount_point.startswith(sys.argv[1])])
"""


def watched(place: Path, propagation: str, *more: Path) -> list[str]:
    """Watch a directory with a tmpfs below it, in a mount namespace; `more`: where another is mounted meanwhile."""
    script = 'mount -t tmpfs none "$1/below" && exec "$0" -c "$2" "$1" "${@:3}"'
    command = [
        "unshare",
        "-m",
        "--propagation",
        propagation,
        "bash",
        "-c",
        script,
        sys.executable,
        str(place),
        WATCH,
    ]
    done = subprocess.run(
        [*command, *map(str, more)],
        env=harness.environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.kernel
@pytest.mark.parametrize("propagation", ["shared", "private"])
def test_what_is_mounted_below_a_watched_directory(
    propagation: str, kernel_events: Path, place: Path
) -> None:
    """Its copies go with the bind mount, and not the originals, as where mounts are shared."""
    seen, left = watched(place, propagation)
    assert seen == "3"  # the tmpfs, the directory on itself, the copy of the tmpfs
    assert left == "tmpfs"


@pytest.mark.kernel
@pytest.mark.parametrize("propagation", ["shared", "private"])
def test_what_is_mounted_meanwhile_in_a_watched_directory(
    propagation: str, kernel_events: Path, place: Path
) -> None:
    (place / "new").mkdir()
    *_, left = watched(place, propagation, place / "new")
    assert left.split().count("tmpfs") >= 2


# Images


def test_an_image_that_cannot_be_made(place: Path) -> None:
    with tmpfs(place) as theirs:
        with pytest.raises(OSError, match=r"mkfs\.ext4"), ext4_image(place, 0):
            pass
        assert mounted(place) == [theirs]


def test_an_image_that_others_have_mounted_something_on(places: Callable[[str], Path]) -> None:
    require_root()
    place = places("image")
    image = ext4_image(place, 8)
    image.__enter__()
    try:
        with tmpfs(place) as theirs:
            image.__exit__(None, None, None)
            assert mounted(place)[-1] == theirs
    finally:
        subprocess.run(["umount", place], check=True)
