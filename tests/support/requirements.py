"""What a test needs of the machine. Elsewhere than in CI a lack skips it; in CI it is a failure: no silent holes there."""

import os
import shutil

import pytest

from fusehsm.linux.syscalls import kernel_version

IN_CI = "FUSEHSM_TESTS_CI"  # the environment variable that tests/conftest.py makes of CI
_PRE_CONTENT_KERNEL = (6, 14)


def require(condition: bool, reason: str) -> None:
    """Go on if the condition holds; else skip with this reason, or fail with it where the environment has CI set."""
    if condition:
        return
    if os.environ.get(IN_CI):
        pytest.fail(f"in CI nothing may be skipped, but here: {reason}", pytrace=False)
    pytest.skip(reason)


def require_root() -> None:
    """Mounts, loop devices and pre-content groups need it."""
    require(os.geteuid() == 0, "needs root")


def require_pre_content_kernel() -> None:
    """A kernel that has pre-content events, and the rights to use them."""
    require_root()
    require(
        kernel_version() >= _PRE_CONTENT_KERNEL, f"needs Linux 6.14 or later, this is {os.uname().release}"
    )


def require_fuse() -> None:
    """Go on if FUSE file systems can be mounted here; else skip, or fail in CI."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        require(False, f"needs /dev/fuse: {error.strerror}")
    require(os.geteuid() == 0 or shutil.which("fusermount3") is not None, "needs fusermount3")
