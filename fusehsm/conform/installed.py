"""The programs of this machine that workloads run: whether they are installed, and whether they are the recorded ones."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

_ANSWERS_WITHIN: Final = 10.0  # seconds; a program prints its version in milliseconds


def missing(programs: Iterable[str]) -> str:
    """The first of these programs or files that is not installed; "" if all are. A name is searched in the PATH."""
    for program in programs:
        if not (os.path.exists(program) if os.path.isabs(program) else shutil.which(program)):
            return program
    return ""


def other(programs: Sequence[str], recorded: Sequence[str]) -> str:
    """The first program that is not the recorded one, in words for people; "" if all are. `recorded`: a version() for each."""
    for program, then in zip(programs, recorded, strict=True):
        now = version(program)
        if now != then:
            return f"{program} is “{now}” here and “{then}” in the recording"
    return ""


@cache
def version(program: str) -> str:
    """The first line that `program --version` prints, after the name of its file. A program without a version is known by its size in bytes.

    "" if it is not installed.
    """
    found = shutil.which(program)
    if found is None:
        return ""
    path = os.path.realpath(found)
    try:
        done = subprocess.run(
            [os.path.basename(program), "--version"],
            executable=found,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            timeout=_ANSWERS_WITHIN,
            check=False,
        )
        lines = done.stdout.decode(errors="replace").split("\n") if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    line = next((each.strip() for each in lines if each.strip()), f"{os.path.getsize(path)} bytes")
    return f"{os.path.basename(path)}: {line}"
