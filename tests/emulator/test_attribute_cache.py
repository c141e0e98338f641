"""What the kernel shows of a watched file's attributes after many events, each of which it was not asked about."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from tests.support.devfuse_acts import act
from tests.support.devfuse_cached import described
from tests.support.harness import Mount

pytestmark = pytest.mark.fuse

PAGE = 4096
SIZE = 32 * PAGE
# Before and after the file has had so many events that nobody looks at it any more.
FILLED = (0, 2, 3, 9, 10, 20)
LAST = 31  # the page that a listener fills when it has answered

FILLING = f"""
import os, threading

PAGE, FILLED, LAST = {PAGE}, {FILLED}, {LAST}


async def answer(event):
    page = event.offset // PAGE
    if page in FILLED:
        os.pwrite(event.fd, b"x" * PAGE, event.offset)
    if page == LAST:
        kept = os.dup(event.fd)

        def fill():
            os.pwrite(kept, b"x" * PAGE, LAST * PAGE)
            os.close(kept)

        threading.Timer(0.3, fill).start()
"""


@pytest.fixture(scope="module")
def filled(make_shared_mount: Callable[..., Mount], session_directory: Path) -> Mount:
    """A mount in exact mode with that handler inside."""
    modules = session_directory / "attribute-cache"
    modules.mkdir(exist_ok=True)
    (modules / "filling.py").write_text(FILLING)
    env = {"PYTHONPATH": f"{modules}:{os.getcwd()}"}
    options = ("--events", "exact", "--cache", "private", "--handler", "filling:answer")
    return make_shared_mount(*options, cwd=modules, env=env)


def read_and_look(path: str, pages: range, looks_between: bool) -> list[tuple[int, int]]:
    """Read those pages one by one; the size and blocks that the kernel shows after each, or after the last one alone."""
    import subprocess

    size, shown = 4096, []
    # Unlike os.stat(), it does not ask for the time of access, which every read makes the kernel ask for.
    look = ["stat", "-c", "%s %b", path]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for page in pages:
            os.pread(descriptor, size, page * size)
            if looks_between or page == pages[-1]:
                output = subprocess.run(look, check=True, capture_output=True).stdout
                shown.append((int(output.split()[0]), int(output.split()[1])))
    finally:
        os.close(descriptor)
    return shown


def stub(mount: Mount, name: str) -> tuple[str, Path]:
    """A stub whose attributes the kernel has; its path on the mount and on the backing."""
    backing = mount.source / name
    backing.touch()
    os.truncate(backing, SIZE)
    path = mount.path / name
    # Older than a change that could be taken for the next one.
    os.utime(backing, ns=(time.time_ns() - 10**9,) * 2)
    return str(path), backing


async def test_after_each_of_many_events(filled: Mount, accessor: Accessor) -> None:
    """What a handler fills shows when its answer is there, whether it is asked for after each event or after many."""
    for index, last in enumerate(FILLED):
        path, backing = stub(filled, f"now and then {index}")
        await accessor.run("stat", path)
        pages = range(last + 1)
        shown = await accessor.run(read_and_look, path, pages, False)
        assert shown == [described(backing)[:2]]
        assert shown[0][1] * 512 == PAGE * sum(page <= last for page in FILLED)
    path, backing = stub(filled, "each time")
    await accessor.run("stat", path)
    shown = await accessor.run(read_and_look, path, range(LAST), True)
    assert [blocks * 512 // PAGE for _, blocks in shown] == [
        sum(filled_page <= page for filled_page in FILLED) for page in range(LAST)
    ]
    assert shown[-1] == described(backing)[:2]


async def test_what_is_filled_late_after_many_events(filled: Mount, accessor: Accessor) -> None:
    """A handler that fills when it has answered is noticed, too."""
    path, backing = stub(filled, "late")
    await accessor.run("stat", path)
    await accessor.run(read_and_look, path, range(LAST + 1), False)
    blocks = (len(FILLED) + 1) * PAGE // 512
    with trio.fail_after(20):
        while (shown := await accessor.run(act, path, "devfuse_cached.described"))[1] != blocks:
            await trio.sleep(0.02)
    assert shown == described(backing)
