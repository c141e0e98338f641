"""A small ext4 file system in a sparse file, on which the real kernel makes pre-content events."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import mount_of_descriptor, mounts_on
from fusehsm.linux.signals import signals_held

_PATIENCE = 60.0  # seconds for one command


def _tool(name: str) -> str:
    # The tools that make and mount file systems are often not in the PATH of an ordinary process.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise FileNotFoundError(f"{name}: not found; install it (Debian: e2fsprogs, mount)")
    return found


def _run(*command: str) -> None:
    # In a session of its own, so that Ctrl-C reaches fusehsm and not the tool.
    with signals_held():
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, start_new_session=True
        )
    if result.returncode:
        raise OSError(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")


@contextlib.contextmanager
def ext4_image(path: Path | str, size_mb: int = 64) -> Iterator[Path]:
    """Make a new ext4 of `size_mb` MiB in the sparse file `path`.img and mount it at `path`, a directory that is created. Needs root.

    Unmounts it at the end whatever happened, also where something still uses it, but nothing that others have mounted; the loop device goes with
    its last user. Raises OSError in one line when a tool is missing or fails.
    """
    make_filesystem, mount = _tool("mkfs.ext4"), _tool("mount")
    mount_point = Path(path)
    image = mount_point.with_name(mount_point.name + ".img")
    mount_point.mkdir(parents=True, exist_ok=True)
    with image.open("xb") as file:
        file.truncate(size_mb << 20)
    try:
        _run(make_filesystem, "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", str(image))
        _run(mount, "-t", "ext4", "-o", "loop", str(image), str(mount_point))
        yield mount_point
    finally:
        _unmount(mount_point, image)
        image.unlink(missing_ok=True)


def _unmount(mount_point: Path, image: Path) -> None:
    """Unmount the image, if it is what is mounted there: mount(8) may have failed, or have run out of time at its very end."""
    try:
        descriptor = os.open(mount_point, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        mount = mount_of_descriptor(descriptor)
        if mount.mount_point != str(mount_point.resolve()) or _image_of(mount.source) != image.resolve():
            return
        for above in mounts_on(mount.mount_id):
            raise OSError(f"{mount_point}: left mounted: {above.mount_point} is mounted on it; unmount both")
        # By descriptor: the path may lead to another mount meanwhile.
        syscalls.umount2(b"/proc/self/fd/%d" % descriptor, syscalls.MNT_DETACH)
    finally:
        os.close(descriptor)


def _image_of(source: str) -> Path | None:
    """The file that a loop device has its content in."""
    try:
        return Path(Path("/sys/block", Path(source).name, "loop/backing_file").read_text().rstrip("\n"))
    except OSError:
        return None
