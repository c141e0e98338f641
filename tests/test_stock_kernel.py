"""What must work on any kernel, in a few steps: mount, read, deny, a C listener under `fusehsm run`, populate and fetch.

`.ci/run` runs this under Debian's Linux 6.1 in an emulated machine (scripts/oldkernel.sh), where everything takes long: no assertion is about time.
"""

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from tests.conftest import MakeMount
from tests.support import harness
from tests.support.async_listener import listening
from tests.support.harness import PATIENCE, LogReader, fusehsm
from tests.support.tier.fetching import fetching

pytestmark = [pytest.mark.fuse, pytest.mark.any_engine]

CONTENT = b"fetched when you looked\n"  # as in examples/hsmd.c


async def test_what_a_listener_fills_is_read(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--events", "exact")
    stub = mount.source / "stub"
    stub.touch()
    os.truncate(stub, len(CONTENT))

    def fill(event: Event) -> int:
        os.pwrite(event.fd, CONTENT, 0)
        return 0

    async with listening(mount.path, answer=fill) as listener:
        assert await accessor.run("pread_path", str(mount.path / "stub"), len(CONTENT), 0) == CONTENT
        assert listener.briefly()[0] == ("PRE_ACCESS", 0, 4096)


async def test_what_a_listener_denies_is_refused(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--events", "exact")
    (mount.source / "stub").write_bytes(bytes(4096))
    async with listening(mount.path, answer=lambda event: errno.EBUSY):
        with pytest.raises(OSError) as caught:
            await accessor.run("pread_path", str(mount.path / "stub"), 1, 0)
    assert caught.value.errno == errno.EBUSY


def test_a_c_listener_under_run(
    fuse: None, places: Callable[[str], Path], accessor: Accessor, tmp_path: Path
) -> None:
    program, place = tmp_path / "hsmd", places("run")
    source = harness.ROOT / "examples" / "hsmd.c"
    subprocess.run(["gcc", "-o", program, source], check=True, timeout=PATIENCE)
    (place / "hello").touch()
    os.truncate(place / "hello", len(CONTENT))
    command = [*harness.COMMAND, "run", "--mount", str(place), "--", str(program), str(place)]
    with harness.start(command) as process:
        try:
            assert process.stdout is not None
            output = LogReader(process.stdout)
            output.wait_for(lambda line: line == "listening")
            assert accessor.call("pread_path", str(place / "hello"), len(CONTENT), 0) == CONTENT
            output.wait_for(lambda line: line == "PRE_ACCESS 0 4096")
            process.terminate()
            process.wait(PATIENCE)
        finally:
            process.kill()
    assert not os.path.ismount(place)
    assert (place / "hello").read_bytes() == CONTENT


def test_populate_and_fetch(fuse: None, places: Callable[[str], Path], accessor: Accessor) -> None:
    store, place = places("store"), places("populated")
    contents = {f"file {number}": f"content {number}\n".encode() * 1000 for number in range(10)}
    for name, content in contents.items():
        (store / name).write_bytes(content)
    done = fusehsm("populate", store, place)
    assert done.returncode == 0, done.stderr
    with fetching(store, place, "--backend", "fuse") as served:
        found = {name: accessor.call("read_file", str(place / name)) for name in contents}
        served.end()
    assert found == contents
    assert {name: (place / name).read_bytes() for name in contents} == contents
