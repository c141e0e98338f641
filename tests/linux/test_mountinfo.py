"""What /proc/self/mountinfo is read as."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.linux.mountinfo import Mount, mount_of, mount_of_descriptor, read_mounts
from tests.conftest import MakeMount
from tests.support.harness import PATIENCE, environment

pytestmark = pytest.mark.any_engine


@pytest.mark.parametrize(
    "name", ["plain", "with space", "tab\tnewline\nbackslash\\", "octal\\040", os.fsdecode(b"\xff\xfe")]
)
def test_mount_points_are_read_whatever_their_names(places: Callable[[str], Path], name: str) -> None:
    place = places("mounted") / name
    place.mkdir()
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        (found,) = [mount for mount in read_mounts() if mount.mount_point == str(place)]
        assert found == mount_of(place)
        assert found.root.endswith(f"/{name}")
        assert found.filesystem_type == "ext4"
        assert os.makedev(*found.device) == place.stat().st_dev
        assert not found.is_fusehsm
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_mount_of_ours_is_known_with_its_owner(make_mount: MakeMount) -> None:
    mount = make_mount()
    found = mount_of(mount.path)
    assert found.is_fusehsm
    assert found.owner_uid == os.getuid()
    assert found.device == mount.device
    (mount.source / "file").touch()
    assert mount_of(mount.path / "file") == found


def test_the_owner_is_the_user_who_mounted() -> None:
    line = "60 27 0:41 / /home/u/mnt rw,nosuid - fuse.fusehsm /home/u/src rw,user_id=1000,group_id=1000\n"
    assert Mount.parse(line) == Mount(
        60, (0, 41), "/", "/home/u/mnt", "fuse.fusehsm", "/home/u/src", 1000, 27
    )
    with_tags = "60 27 0:41 / /mnt rw shared:1 master:2 - fuse.fusehsm src rw\n"
    assert Mount.parse(with_tags).owner_uid == 0


def test_what_is_on_no_mount() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(FileNotFoundError, match="no mount"):
            mount_of_descriptor(reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_dead_mount_is_still_recognised(make_mount: MakeMount) -> None:
    mount = make_mount()
    device = mount.device
    mount.kill_daemon()
    assert mount_of(mount.path).device == device
    with pytest.raises(OSError):
        mount_of(mount.path / "file")


CHROOT = """
import os, sys
from fusehsm.linux import mountinfo
os.chroot(sys.argv[1])
try:
    print(mountinfo.mount_of("/").root)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.root
@pytest.mark.parametrize("is_mount", [False, True], ids=["a directory", "a mount"])
def test_the_root_of_a_chroot(is_mount: bool, tmp_path: Path) -> None:
    """The kernel lists the mounts below the root directory of a process, so the mount above is missing."""
    (tmp_path / "proc").mkdir()
    bind = 'mount --bind "$1" "$1"; ' if is_mount else ""
    script = f'set -e; {bind}mount -t proc proc "$1/proc"; exec "$2" -c "$3" "$1"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, CHROOT]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    if is_mount:
        assert done.stdout.strip().endswith(tmp_path.name)
    else:
        assert "run mount --bind DIR DIR before chroot DIR" in done.stdout
