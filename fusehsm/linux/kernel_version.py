"""Which kernel runs, where that decides what is possible."""

import os
import re


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel; (0, 0) where its release does not begin with them."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
