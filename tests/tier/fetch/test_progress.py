"""What a terminal shows while a fetch works."""

import os
import pty
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import harness
from tests.support.tier.fetching import clear, run
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = [pytest.mark.any_engine, pytest.mark.fuse]


def test_a_line_that_changes_and_complaints_above_it(places: Callable[[str], Path], target: Path) -> None:
    store = places("store")
    (store / "big").write_bytes(content_of(3 << 20))
    (store / "gone").write_bytes(content_of(10))
    plant(store, target)
    (store / "gone").unlink()
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def watch() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:
                return
            if not data:
                return
            seen.append(data)

    def text() -> str:
        return b"".join(seen).decode()

    def wait_for(pattern: str) -> None:
        end = time.monotonic() + harness.PATIENCE
        while not re.search(pattern, text()):
            assert time.monotonic() < end, text()
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    command = [
        *harness.COMMAND,
        "fetch",
        "--backend",
        "fuse",
        "--limit-rate",
        "1M",
        "--read-ahead",
        "0",
        str(store),
        str(target),
    ]
    with harness.start(command, stderr=theirs, env=harness.environment(TERM="xterm")) as process:
        os.close(theirs)
        try:
            wait_for("nothing under way")
            reader = subprocess.Popen(["cat", str(target / "big")], stdout=subprocess.DEVNULL)
            wait_for(r"2\.1 MB fetched, [0-9.]+ [kM]?B/s, 1 requests under way: big \(66 %\)")
            assert "Input/output error" in run("cat", target / "gone").stderr
            wait_for("fusehsm: gone: is no longer in .*")
            assert reader.wait(harness.PATIENCE) == 0
            process.terminate()
            assert process.wait(harness.PATIENCE) == 0
        finally:
            process.kill()
            clear(target)
    watcher.join(harness.PATIENCE)
    os.close(ours)
