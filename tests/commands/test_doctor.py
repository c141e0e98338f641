"""`fusehsm doctor`: says what is true of this machine, and of ones that lack something."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusehsm.backends.opening import kernel_can_watch
from tests.support import harness
from tests.support.harness import NOBODY, PATIENCE, fusehsm
from tests.support.requirements import require_root


def checks_of(output: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(output)["checks"]}


@pytest.mark.fuse
def test_here(fuse: None, ext4: Path) -> None:
    done = fusehsm("doctor", "--json", ext4)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["can_mount"] is True
    checks = checks_of(done.stdout)
    for check in checks.values():
        assert set(check) == {"name", "verdict", "found", "fix"}
        assert check["verdict"] in ("good", "limited")
        assert (check["fix"] is None) == (check["verdict"] == "good")
    assert checks["Python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    assert checks["trial mount"]["verdict"] == "good"
    assert checks["unmodified listeners"]["verdict"] == "good"
    try:
        kernel_can_watch(str(ext4))
        expected = "good"
    except OSError:
        expected = "limited"
    assert checks["kernel's own events"]["verdict"] == expected
    assert os.uname().release in checks["kernel's own events"]["found"]
    # Nothing of the trials stays.
    assert [name for name in os.listdir(ext4) if "doctor" in name] == []


@pytest.mark.fuse
def test_for_people(fuse: None) -> None:
    done = fusehsm("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "fusehsm can mount here"
    assert any(
        line.split() == ["good", "/dev/fuse", "can", "be", "opened"] for line in done.stdout.splitlines()
    )


def test_a_filesystem_without_events_of_its_own() -> None:
    check = checks_of(fusehsm("doctor", "--json", "/proc").stdout)["kernel's own events"]
    assert check["verdict"] == "limited"
    assert check["fix"] == "fusehsm mount /proc /proc"


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    done = fusehsm("doctor", tmp_path / "missing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fusehsm: {tmp_path}/missing: {os.strerror(errno.ENOENT)}\n"


# Machines that lack something: made by hiding it, in a mount namespace of the command's own.


def doctor_where(
    script: str, tmp_path: Path, *prefix: str, env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """`fusehsm doctor --json` after a shell script run as root, in which $1 is an empty directory."""
    require_root()
    program, environment, _ = harness.command_of(NOBODY if prefix else None)
    command = ["unshare", "--mount", "sh", "-c", f'set -e\n{script}\nshift\nexec "$@"', "sh", str(tmp_path)]
    command += [*prefix, *program, "doctor", "--json"]
    environment = {**environment, **(env or {})}
    with harness.start(command, env=harness.environment(**environment), cwd="/") as process:
        output, complaint = process.communicate(timeout=PATIENCE)
    assert complaint == ""
    return subprocess.CompletedProcess(command, process.returncode, output, complaint)


AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")


@pytest.mark.root
def test_without_the_fuse_device(tmp_path: Path) -> None:
    done = doctor_where(
        'mount -t tmpfs none "$1"; mknod "$1/fuse" c 10 2; mount --bind "$1/fuse" /dev/fuse', tmp_path
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["can_mount"] is False
    checks = checks_of(done.stdout)
    assert checks["/dev/fuse"]["verdict"] == "bad"
    assert "modprobe fuse" in checks["/dev/fuse"]["fix"]
    assert checks["trial mount"]["verdict"] == "bad"
    assert checks["trial mount"]["found"].startswith("/dev/fuse: ")


@pytest.mark.root
def test_a_fuse_device_that_is_closed_to_us(mount_point: Path) -> None:
    script = 'mount -t tmpfs none "$1"; mknod -m 600 "$1/fuse" c 10 229; mount --bind "$1/fuse" /dev/fuse'
    done = doctor_where(script, mount_point, *AS_NOBODY)
    assert done.returncode == 1
    assert "chmod 666 /dev/fuse" in checks_of(done.stdout)["/dev/fuse"]["fix"]


@pytest.mark.root
def test_an_ordinary_user(mount_point: Path) -> None:
    script = """
        mount -t tmpfs none "$1"; mknod -m 666 "$1/fuse" c 10 229; mount --bind "$1/fuse" /dev/fuse
        : > "$1/fuse.conf"; mount --bind "$1/fuse.conf" /etc/fuse.conf
        mkdir -m 1777 "$1/tmp"; mkdir -m 700 "$1/run"; chown 65534:65534 "$1/run"
    """
    places = {"TMPDIR": f"{mount_point}/tmp", "XDG_RUNTIME_DIR": f"{mount_point}/run"}
    done = doctor_where(script, mount_point, *AS_NOBODY, env=places)
    assert done.returncode == 0
    checks = checks_of(done.stdout)
    assert checks["trial mount"]["verdict"] == "good"
    assert checks["--allow-other"]["fix"] == "echo user_allow_other >> /etc/fuse.conf, as root"
    assert checks["read-ahead setting"]["fix"] == "mount as root"
    assert checks["kernel's own events"]["verdict"] == "limited"

    copy = 'cp "$(command -v fusermount3)" "$1/copy"; chmod 755 "$1/copy"; mount --bind "$1/copy" "$(command -v fusermount3)"'
    done = doctor_where(f"{script}\n{copy}", mount_point, *AS_NOBODY, env=places)
    assert done.returncode == 1
    check = checks_of(done.stdout)["fusermount3"]
    assert check["verdict"] == "bad"
    assert check["fix"].startswith("chmod u+s /")


@pytest.mark.root
def test_without_mtab(mount_point: Path) -> None:
    script = """
        mount -t tmpfs none "$1"; mkdir "$1/etc"; cp -a /etc/passwd /etc/group /etc/ld.so.* "$1/etc"; mount --bind "$1/etc" /etc
        mknod -m 666 "$1/fuse" c 10 229; mount --bind "$1/fuse" /dev/fuse
        mkdir -m 1777 "$1/tmp"; mkdir -m 700 "$1/run"; chown 65534:65534 "$1/run"
    """
    places = {"TMPDIR": f"{mount_point}/tmp", "XDG_RUNTIME_DIR": f"{mount_point}/run"}
    done = doctor_where(script, mount_point, *AS_NOBODY, env=places)
    assert done.returncode == 0
    checks = checks_of(done.stdout)
    assert "/etc/mtab" in checks["fusermount3"]["fix"]
    assert checks["trial mount"]["verdict"] == "limited"
    assert "cannot be unmounted" in checks["trial mount"]["found"]


@pytest.mark.root
def test_few_files_may_be_open(tmp_path: Path) -> None:
    done = doctor_where("ulimit -n 1024", tmp_path)
    assert done.returncode == 0
    check = checks_of(done.stdout)["open files"]
    assert check["verdict"] == "limited"
    assert "1024" in check["found"]
