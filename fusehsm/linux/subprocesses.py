"""Makes the command and the environment that start this same fusehsm in another process."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_PACKAGES = str(Path(__file__).resolve().parents[2])


def own_command(*arguments: str) -> list[str]:
    """The words of a command. Python does not search the working directory for modules (-P).

    Another user may own that directory, or it is about to be mounted.
    """
    return [sys.executable, "-P", "-m", "fusehsm", *arguments]


def own_environment() -> Mapping[str, str]:
    """The environment for own_command(). It names this package's directory, so that a checkout which is not installed is found, too."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (_PACKAGES, os.environ.get("PYTHONPATH")))),
    }
