"""A file system of our own whose power can be cut: what was not brought to its disk is gone."""

import fcntl
import os
import struct
import subprocess
from pathlib import Path
from typing import Final

from fusehsm.linux.mountinfo import read_mounts

_EXT4_IOC_SHUTDOWN: Final = 0x8004587D  # _IOR('X', 125, __u32)
_NOLOGFLUSH: Final = 2


class Disk:
    """An image file with an ext4 on it, mounted at `root`."""

    def __init__(self, image: Path, root: Path, size_mb: int) -> None:
        self.image = image
        self.root = root
        root.mkdir()
        with image.open("xb") as file:
            file.truncate(size_mb << 20)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", str(image))
        self._mount()

    def cut(self) -> None:
        """Everything that is not on the disk is gone, and every access fails from now on."""
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert os.fstat(fd).st_dev != os.stat(self.root.parent).st_dev
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("=I", _NOLOGFLUSH))
        finally:
            os.close(fd)

    def copy(self, image: Path) -> None:
        """What is on the disk at this moment, as another disk's image."""
        _run("cp", "--sparse=always", str(self.image), str(image))

    def replace(self, image: Path) -> None:
        """Go on with another image."""
        self.unmount()
        os.replace(image, self.image)
        self._mount()

    def restart(self) -> None:
        """Mount it anew: the journal is replayed."""
        self.unmount()
        self._mount()

    def unmount(self) -> None:
        """And what a killed fetch has left mounted below it."""
        for point in self._mount_points():
            _run("umount", point)

    def close(self) -> None:
        """Leave nothing behind."""
        for point in self._mount_points():
            _run("umount", "-l", point)
        self.image.unlink(missing_ok=True)

    def _mount_points(self) -> list[str]:
        """The last mounted first."""
        points = [mount.mount_point for mount in read_mounts()]
        root = os.path.realpath(self.root)
        return [point for point in reversed(points) if point == root or point.startswith(f"{root}/")]

    def _mount(self) -> None:
        _run("mount", "-t", "ext4", "-o", "loop", str(self.image), str(self.root))


def _run(*command: str) -> None:
    environment = {**os.environ, "PATH": os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert not done.returncode, f"{command}: {done.stderr}"
