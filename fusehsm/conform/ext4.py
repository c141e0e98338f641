"""A small ext4 of our own in a sparse file: a filesystem where the real kernel makes pre-content events."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fusehsm.held_signals import signals_held

_PATIENCE = 60.0  # seconds for one command


def _tool(name: str) -> str:
    # What makes and mounts filesystems is often not in the PATH of an ordinary process.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise FileNotFoundError(f"{name}: not found; install it (Debian: e2fsprogs, mount)")
    return found


def _run(*command: str) -> None:
    # In a session of its own: Ctrl-C is for us, not for what makes or unmakes a file system.
    with signals_held():
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, start_new_session=True
        )
    if result.returncode:
        raise OSError(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")


@contextlib.contextmanager
def ext4_image(path: Path | str, size_mb: int = 64) -> Iterator[Path]:
    """Make `path` (a directory, created) the root of a new ext4 of that many MiB, in the sparse file `path`.img. Needs root.

    Unmounts at the end whatever happened, lazily if something still uses it; the loop device goes with its last user. Raises OSError in one
    line when a tool is missing or fails.
    """
    make_filesystem, mount, unmount = _tool("mkfs.ext4"), _tool("mount"), _tool("umount")
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
        # Looked up: mount(8) may have failed, or have run out of time at its very end.
        if os.path.ismount(mount_point):
            try:
                _run(unmount, str(mount_point))
            except OSError:
                _run(unmount, "-l", str(mount_point))
        image.unlink(missing_ok=True)
