"""How to start this very fusehsm in another process."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_PACKAGES = str(Path(__file__).resolve().parents[2])


def own_command(*arguments: str) -> list[str]:
    """The words of a command. Modules are not looked for in the working directory, which may be anybody's, or be about to be mounted."""
    return [sys.executable, "-P", "-m", "fusehsm", *arguments]


def own_environment() -> Mapping[str, str]:
    """The environment that own_command() wants: from a checkout that is not installed it would not be found otherwise."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (_PACKAGES, os.environ.get("PYTHONPATH")))),
    }
