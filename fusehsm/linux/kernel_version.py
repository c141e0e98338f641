"""Tells the version of the running kernel, for the few places that depend on it."""

import os
import re


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel; (0, 0) if its release string does not begin with two numbers."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
