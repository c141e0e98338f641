"""Commands whose stderr is a terminal."""

import os
import pty
from collections.abc import Sequence

import pytest

from tests.support import harness


def on_a_terminal(command: Sequence[str]) -> tuple[bytes, str]:
    """What the terminal has been sent when the command has ended, and its stdout."""
    ours, theirs = pty.openpty()
    try:
        process = harness.start(command, stderr=theirs, env=harness.environment(TERM="xterm"))
        os.close(theirs)
        shown = b""
        with pytest.raises(OSError, match="Input/output"):  # the terminal's end
            while True:
                shown += os.read(ours, 4096)
        output, _ = process.communicate(timeout=harness.PATIENCE)
    finally:
        os.close(ours)
    return shown, output
