"""Notifications: who is told, of whom, and when."""

import os

import pytest

from fusehsm.backends.opening import open_group
from fusehsm.conform.accessor import Accessor
from tests.conform.divergences.sides import READ_ONLY, Side
from tests.support.async_listener import Listener
from tests.support.closing import close_in_child

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


async def test_notifications_in_first_access_mode(
    kernel: Side, first_access: Side, accessor: Accessor
) -> None:
    for side in (kernel, first_access):
        path = side.file("noticed")
        async with side.listening("OPEN", "ACCESS", "CLOSE_NOWRITE", "PRE_ACCESS") as listener:
            await accessor.run("pread_path", path, 100, 0)
            if side is kernel:
                await listener.wait_until_named("OPEN", "ACCESS", "CLOSE_NOWRITE", "PRE_ACCESS")
            else:
                # One queue: what the first file's accesses made stands before the second's event.
                await accessor.run("pread_path", side.file("noticed-too"), 100, 0)
                assert {name for event in listener.take() for name in event.names} == {"PRE_ACCESS"}


async def test_notifications_of_files_opened_before_the_mark(
    kernel: Side, exact: Side, accessor: Accessor
) -> None:
    for side in (kernel, exact):
        descriptor = await accessor.run("open", side.file("early"), os.O_RDWR)
        async with side.listening("ACCESS", "MODIFY") as listener:
            await accessor.run("pread", descriptor, 100, 0)
            await accessor.run("pwrite", descriptor, b"new", 0)
            await listener.wait_until_named("MODIFY")
            names = {name for event in listener.take() for name in event.names}
            assert names == ({"ACCESS", "MODIFY"} if side is kernel else {"MODIFY"})


async def closed_by(listener: Listener) -> int:
    """The process that the notification of a close names."""
    await listener.wait_until(
        lambda: any(name.startswith("CLOSE") for event in listener.heard for name in event.names)
    )
    (event,) = listener.take()
    return event.pid


async def test_who_closes(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("closed")
        async with side.listening("CLOSE_WRITE") as listener:
            descriptor = await accessor.run("open", path, os.O_RDWR)
            child = await accessor.run(close_in_child, descriptor)
            expected = accessor.pid if side.diverges("who closes") else child
            assert await closed_by(listener) == expected


async def test_who_closes_what_was_marked_late(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        descriptor = await accessor.run("open", side.file("closed"), os.O_RDWR)
        async with side.listening("CLOSE_WRITE") as listener:
            child = await accessor.run(close_in_child, descriptor)
            assert await closed_by(listener) == (child if side is kernel else accessor.pid)
        (side.backing / "directory").mkdir()
        async with side.listening("CLOSE_NOWRITE", "ONDIR") as listener:
            descriptor = await accessor.run("open", str(side.path / "directory"), os.O_RDONLY)
            child = await accessor.run(close_in_child, descriptor)
            assert await closed_by(listener) == (child if side is kernel else accessor.pid)


async def test_closing_is_told_in_order(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path, other = side.file("closed"), side.file("opened")
        async with side.listening("OPEN", "CLOSE_NOWRITE") as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            await accessor.run("close", descriptor)
            if side is kernel:
                await listener.wait_until_named("CLOSE_NOWRITE")
            await accessor.run("open", other, os.O_RDONLY)
            await listener.wait_until(
                lambda other=other: any(event.path == other for event in listener.heard)  # type: ignore[misc]
            )
            names = [name for event in listener.take() for name in sorted(event.names, reverse=True)]
            assert names == ["OPEN", "CLOSE_NOWRITE", "OPEN"]


async def test_many_notifications_are_merged(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        paths = [side.file(f"many-{number}", 100) for number in range(100)]
        end = side.file("many-end")
        async with open_group(
            side.path,
            ("OPEN",),
            mark=side.mark,
            event_f_flags=READ_ONLY,
            backend="kernel" if side is kernel else "fuse",
        ) as group:
            for path in paths * 3:
                await accessor.run("close", await accessor.run("open", path, os.O_RDONLY))
            seen: list[str] = []
            await accessor.run("close", await accessor.run("open", end, os.O_RDONLY))
            while end not in seen:
                await group.wait_readable()
                for event in group.take_events():
                    seen.append(event.path)
                    os.close(event.fd)
        assert list(dict.fromkeys(seen)) == [*paths, end]
        assert (len(seen) == len(paths) + 1) == (side is kernel)
