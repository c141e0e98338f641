"""What differs from kernel to kernel: the rows of the table in docs/old-kernels.md. `make oldkernel` runs this on the old ones, too.

What the events' own tests expect is the same on all of them, or is an entry of fusehsm/conform/divergences.py.
"""

import errno
import fcntl
import os
import select
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.control.client import request
from fusehsm.control.protocol import Status
from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.fuse_mount import mount
from fusehsm.engines.fuse_protocol import Init
from fusehsm.linux import proc
from fusehsm.linux.mountinfo import mount_of
from fusehsm.linux.syscalls import kernel_version
from tests.conftest import MakeMount
from tests.support.async_listener import listening
from tests.support.harness import PATIENCE, Mount, unmount_lazily

pytestmark = [pytest.mark.fuse, pytest.mark.any_engine, pytest.mark.engine("devfuse")]
# The kernel's protocol 7.x, where that has been looked at.
MINORS = {(5, 10): 32, (6, 1): 38}
# The first kernel that offers it.
OFFERED_SINCE = {
    Init.NO_OPENDIR_SUPPORT: (5, 1),
    Init.HANDLE_KILLPRIV_V2: (5, 12),
    Init.INIT_EXT: (5, 17),
    Init.DIRECT_IO_ALLOW_MMAP: (6, 6),
}


def test_what_the_kernel_offers(fuse: None, mount_point: Path) -> None:
    connection = mount(str(mount_point), frozenset(("subtype=fusehsm", "fsname=none")))
    try:
        assert select.select([connection.descriptor], [], [], PATIENCE)[0]
        body = protocol.decode_request(os.read(connection.descriptor, protocol.BUFFER_SIZE)).body
        major, minor, _, flags = protocol.INIT_IN.unpack_from(body)
        if flags & Init.INIT_EXT:
            flags |= protocol.INIT_IN_FLAGS2.unpack_from(body, protocol.INIT_IN.size)[0] << 32
        assert (major, minor) == (7, MINORS.get(kernel_version(), minor))
        offered = {flag: bool(flags & flag) for flag in OFFERED_SINCE}
        assert offered == {flag: kernel_version() >= since for flag, since in OFFERED_SINCE.items()}
    finally:
        connection.close()
        unmount_lazily(mount_point)


async def test_inode_numbers_of_open_files(accessor: Accessor, exact: Mount, tmp_path: Path) -> None:
    """In /proc/PID/fdinfo/FD, by which a request finds the call that it is part of. Where they are not there, statx(2) tells them."""
    watched = exact.path / "numbered"
    watched.write_bytes(b"")
    for path in (tmp_path, watched):
        number = await accessor.run("open", str(path), os.O_RDONLY)
        found = proc.descriptor_of(accessor.pid, number)
        assert found is not None
        assert found.inode == proc.inode_of(accessor.pid, number) == path.stat().st_ino
    assert proc.inode_of(accessor.pid, 1 << 20) is None
    descriptor = await accessor.run("open", str(tmp_path), os.O_RDONLY)
    fields = await accessor.run(lambda number: open(f"/proc/self/fdinfo/{number}").read(), descriptor)  # noqa: SIM115
    assert ("\nino:" in fields) == (kernel_version() >= (5, 14))


@pytest.fixture(scope="module")
def engine() -> str:
    return "devfuse"


@pytest.fixture(scope="module")
def exact(make_shared_mount: MakeMount) -> Mount:
    return make_shared_mount("--events", "exact")


async def told(path: Path) -> dict[str, object]:
    return await request(mount_of(str(path)), Status())


async def test_what_auto_is(make_mount: MakeMount) -> None:
    status = await told(make_mount().path)
    assert status["events"] == ("exact" if kernel_version() >= (6, 6) else "per-file")


async def test_shared_mappings_in_exact_mode(exact: Mount, accessor: Accessor) -> None:
    (exact.source / "mapped").write_bytes(b"c" * 4096)
    works = kernel_version() >= (6, 6)
    assert works != any("mmap(MAP_SHARED)" in line for line in exact.log.lines)
    async with listening(exact.path):
        descriptor = await accessor.run("open", str(exact.path / "mapped"), os.O_RDONLY)
        if works:
            mapping = await accessor.run("map_file", descriptor, 4096, 0, True)
            assert await accessor.run("touch", mapping, 0) == b"c"
        else:
            with pytest.raises(OSError) as caught:
                await accessor.run("map_file", descriptor, 4096, 0, True)
            assert caught.value.errno == errno.ENODEV


async def test_whether_sent_files_pass_the_page_cache(exact: Mount, accessor: Accessor) -> None:
    """Where they go through it in exact mode, they are made to pass it by O_DIRECT, which the accessor can see."""
    (exact.source / "sent").write_bytes(b"content")
    async with listening(exact.path):
        descriptor = await accessor.run("open", str(exact.path / "sent"), os.O_RDONLY)
        await accessor.run(
            lambda number: os.sendfile(os.open("/dev/null", os.O_WRONLY), number, 0, 7), descriptor
        )
        flags = await accessor.run(lambda number: fcntl.fcntl(number, fcntl.F_GETFL), descriptor)
    assert bool(flags & os.O_DIRECT) == (kernel_version() >= (6, 5))


async def test_files_without_a_name(exact: Mount, accessor: Accessor) -> None:
    """O_TMPFILE."""
    if kernel_version() >= (6, 1):
        assert await accessor.run("open", str(exact.path), os.O_TMPFILE | os.O_RDWR) >= 0
    else:
        with pytest.raises(OSError) as caught:
            await accessor.run("open", str(exact.path), os.O_TMPFILE | os.O_RDWR)
        assert caught.value.errno == errno.EOPNOTSUPP
