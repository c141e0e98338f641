"""The harness itself: accessors come back with results, errors and signals, and can be given up on."""

import errno
import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor, AccessorDied, AccessorTimeout
from fusehsm.linux.mountinfo import mount_of, read_mounts
from tests.conftest import MakeAccessor
from tests.support import harness, leftovers
from tests.support.harness import NOBODY, PATIENCE, ROOT
from tests.support.requirements import IN_CI


def test_results_and_errors_come_back(accessor: Accessor, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    descriptor = accessor.call("open", str(file), os.O_RDONLY)
    assert accessor.call("pread", descriptor, 4, 3) == b"tent"
    assert accessor.call("stat", str(file)).st_size == 7
    assert accessor.call(lambda path: [os.getpid(), os.path.getsize(path)], str(file)) == [accessor.pid, 7]
    with pytest.raises(OSError) as caught:
        accessor.call("open", str(tmp_path / "missing"), os.O_RDONLY)
    assert caught.value.errno == errno.ENOENT


def test_a_fault_that_is_denied_is_told_by_its_signal(accessor: Accessor, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8192))
    descriptor = accessor.call("open", str(file), os.O_RDWR)
    mapping = accessor.call("map_file", descriptor, 8192, 0, True, True)
    accessor.call("put", mapping, 4096, b"written")
    assert accessor.call("touch", mapping, 4096, 7) == b"written"
    accessor.call("ftruncate", descriptor, 4096)
    with pytest.raises(AccessorDied) as caught:
        accessor.call("touch", mapping, 4096)
    assert caught.value.signal == signal.SIGBUS


def test_one_that_waits_is_given_up_on_and_killed(accessor: Accessor) -> None:
    with pytest.raises(AccessorTimeout):
        accessor.call(lambda: signal.pause(), timeout=0.01)
    assert accessor.wait_exit() == signal.SIGKILL


@pytest.mark.root
def test_other_users(make_accessor: MakeAccessor, tmp_path: Path) -> None:
    accessor = make_accessor(uid=NOBODY, gid=NOBODY)
    assert accessor.call(lambda: (os.getresuid(), os.getresgid(), os.getgroups())) == (
        (NOBODY,) * 3,
        (NOBODY,) * 3,
        [],
    )
    tmp_path.chmod(0o700)
    with pytest.raises(PermissionError):
        accessor.call("listdir", str(tmp_path))


async def test_in_an_event_loop(accessor: Accessor) -> None:
    assert await accessor.run("getpid") == accessor.pid
    with pytest.raises(AccessorTimeout):
        await accessor.run(lambda: signal.pause(), timeout=0.01)


def test_programs(accessor: Accessor, tmp_path: Path) -> None:
    assert accessor.call("execute", "/bin/sh", "-c", "echo out; exit 3") == (3, b"out\n")
    with pytest.raises(FileNotFoundError):
        accessor.call("execute", str(tmp_path / "missing"))


def test_the_image_is_ext4(ext4: Path) -> None:
    assert mount_of(ext4).filesystem_type == "ext4"


# Sessions of their own, with the same conftest.py


def session(tmp_path: Path, test: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    file = tmp_path / "test_inner.py"
    file.write_text(test)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
    ]
    outer = {name: value for name, value in harness.environment().items() if name not in ("CI", IN_CI)}
    return subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(file)],
        env={**outer, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_what_a_session_leaves_behind_fails_it_and_is_removed(tmp_path: Path) -> None:
    done = session(
        tmp_path,
        "import pathlib, subprocess\n"
        "def test_it(request, tmp_path):\n"
        "    child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(child.pid))\n",
    )
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    pid = int((tmp_path / "pid").read_text())
    assert f"LEFT BEHIND: process {pid}: sleep 1000" in done.stdout
    assert leftovers.command_line(pid) in ("gone", "")  # a zombie at most, until its new parent looks


@pytest.mark.root
def test_mounts_and_loop_devices_are_left_behind_too(tmp_path: Path) -> None:
    done = session(
        tmp_path,
        "import subprocess\n"
        "def test_it(session_directory):\n"
        "    place = session_directory / 'place'\n"
        "    place.mkdir()\n"
        "    subprocess.run(['mount', '-t', 'tmpfs', 'none', place], check=True)\n"
        "    image = session_directory / 'image'\n"
        "    image.write_bytes(bytes(1 << 20))\n"
        "    subprocess.run(['losetup', '-f', image], check=True)\n",
    )
    assert done.returncode == 1
    assert done.stdout.count("LEFT BEHIND: mount of tmpfs at ") == 1
    (device,) = re.findall(r"LEFT BEHIND: loop device (/dev/loop\d+) of ", done.stdout)
    assert (
        f"{device}:"
        not in subprocess.run(["losetup", "-l"], capture_output=True, text=True, check=True).stdout
    )
    assert not any(
        "/fusehsm-tests-" in mount.mount_point and mount.mount_point.endswith("/place")
        for mount in read_mounts()
    )


def test_a_skip_is_a_failure_in_ci(tmp_path: Path) -> None:
    test = "import pytest\ndef test_it():\n    pytest.skip('no such machine')\n"
    done = session(tmp_path, test)
    assert (done.returncode, "1 skipped" in done.stdout) == (0, True)
    done = session(tmp_path, test, CI="true")
    assert (done.returncode, "1 failed" in done.stdout) == (1, True)
    assert "in CI nothing may be skipped: Skipped: no such machine" in done.stdout


def test_a_difference_of_much_is_shown_soon_in_ci(tmp_path: Path) -> None:
    test = "import os\ndef test_it():\n    assert os.urandom(100_000) == os.urandom(100_000)\n"
    done = session(tmp_path, test, CI="true")
    assert (done.returncode, "1 failed" in done.stdout) == (1, True)
    assert len(done.stdout) < 100_000


@pytest.mark.root
def test_a_session_that_is_killed_is_cleared_up_after(tmp_path: Path) -> None:
    done = session(
        tmp_path,
        "import os, pathlib, signal, subprocess\n"
        "def test_it(session_directory):\n"
        "    place = session_directory / 'place'\n"
        "    place.mkdir()\n"
        "    subprocess.run(['mount', '-t', 'tmpfs', 'none', place], check=True)\n"
        "    child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'seen').write_text(f'{{child.pid}} {{session_directory}}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    # Its guardian holds the other end of the output: that it has ended means that the guardian has.
    assert done.returncode == -signal.SIGKILL
    pid, directory = (tmp_path / "seen").read_text().split()
    assert leftovers.command_line(int(pid)) in ("gone", "")
    assert not Path(directory).exists()


def test_a_session_that_hangs_in_the_kernel_is_killed(tmp_path: Path, kernel_events: Path) -> None:
    done = session(
        tmp_path,
        "import os\n"
        "from fusehsm.linux import syscalls\n"
        "from tests.support import harness\n"
        "def test_it(ext4):\n"
        "    group = syscalls.fanotify_init(8, os.O_RDONLY)\n"
        "    syscalls.fanotify_mark(group, 0x101, 0x10000, path=os.fsencode(ext4))\n"
        "    (ext4 / 'file').write_bytes(b'')  # asks this very process\n",
        FUSEHSM_TESTS_LONGEST="4",
    )
    assert done.returncode == -signal.SIGKILL
    assert "test_inner.py::test_it: no end after 5 s; killing the tests" in done.stderr
    assert "fanotify" in done.stderr


def test_a_session_that_hangs_says_where(tmp_path: Path) -> None:
    done = session(tmp_path, "import time\ndef test_it():\n    time.sleep(1000)\n", FUSEHSM_TESTS_LONGEST="4")
    assert done.returncode == -signal.SIGKILL
    assert "test_it: no end after 5 s; killing the tests" in done.stderr
    assert 'test_inner.py", line 3 in test_it' in done.stderr


def test_a_session_that_waits_for_tests_is_left_alone(tmp_path: Path) -> None:
    """A process that shares tests with others has nothing to do at the end, until the last of them is ready."""
    waits = subprocess.Popen(["sh", "-c", "trap '' USR2; exec sleep 1000"])  # guardian.SHOW
    directory = tmp_path / "directory"
    directory.mkdir()
    watches = subprocess.Popen(
        [sys.executable, "-m", "tests.support.guardian", str(waits.pid), uuid.uuid4().hex, directory, "1"],
        cwd=ROOT,
        env=harness.environment(),
        stdin=subprocess.PIPE,
    )
    assert watches.stdin is not None
    try:
        watches.stdin.write(b"a test\n\n")
        watches.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            waits.wait(4)
        watches.stdin.write(b"another\n")
        watches.stdin.flush()
        assert waits.wait(harness.PATIENCE) == -signal.SIGKILL
    finally:
        waits.kill()
        watches.stdin.close()
        assert watches.wait(harness.PATIENCE) == 0
