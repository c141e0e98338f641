"""A populate that dies at a certain moment."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import harness


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[[Path, Path, int, bool], bool]]:
    """Runs populate until a certain system call; returns whether it got so far."""
    with harness.start(
        [sys.executable, "-m", "tests.support.tier.killed"], stdin=subprocess.PIPE, stderr=None
    ) as process:

        def run(store: Path, target: Path, call: int, unnamed: bool) -> bool:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([str(store), str(target), call, unnamed]) + "\n")
            process.stdin.flush()
            return bool(json.loads(process.stdout.readline()))

        yield run
        assert process.stdin is not None
        process.stdin.close()
