"""Mounts that end with the block or the process that wanted them (daemon/child.py)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusehsm.daemon.child import foreground_mount
from fusehsm.linux.mountinfo import read_mounts

pytestmark = [pytest.mark.fuse, pytest.mark.any_engine]

HOLDER = """
import sys, time
from fusehsm.daemon.child import foreground_mount
with foreground_mount(sys.argv[1], sys.argv[1]):
    print("mounted", flush=True)
    time.sleep(60)
"""


def is_mounted(path: Path) -> bool:
    return any(mount.mount_point == str(path) for mount in read_mounts())


def test_it_is_there_and_then_gone(fuse: None, tmp_path: Path) -> None:
    with foreground_mount(str(tmp_path), str(tmp_path)):
        assert is_mounted(tmp_path)
    assert not is_mounted(tmp_path)


def test_it_goes_when_its_owner_is_killed(fuse: None, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=os.getcwd()
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mounted\n"
        assert is_mounted(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    for _ in range(300):
        if not is_mounted(tmp_path):
            return
        time.sleep(0.1)
    pytest.fail("still mounted")


def test_what_the_mount_complains_of_is_told(fuse: None, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="SRC does not exist; create it"),
        foreground_mount(str(tmp_path / "missing"), str(tmp_path)),
    ):
        pass
