"""One expectation, two worlds: accessors that wait for an answer. They can be killed, and hundreds of them stop no other accessor."""

import mmap
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.conform.workloads.denying import map_and_touch
from fusehsm.events import Event
from tests.conftest import MakeAccessor, MakeMount
from tests.support.async_listener import HOLD
from tests.support.harness import NOBODY, PATIENCE
from tests.support.kernel_and_mount import (
    CONTENT,
    EVERYTHING,
    OPEN_PERM,
    PAGE,
    PRE_ACCESS,
    Mark,
    O,
    P,
    World,
    WorldListener,
)

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


def hold(event: Event) -> int:
    return HOLD


async def died_of(accessor: Accessor) -> int:
    """Wait for an accessor's end; the signal that killed it."""
    return await trio.to_thread.run_sync(accessor.wait_exit)


def answer_late(listener: WorldListener, event: Event) -> None:
    """The accessor is dead: an answer is taken all the same, once."""
    listener.group.answer(event, 0)
    with pytest.raises(FileNotFoundError):
        listener.group.answer(event, 0)
    os.close(event.fd)


def execute_here(path: str) -> None:
    os.execv(path, [path])


CALLS: dict[str, tuple[Callable[..., object] | str, tuple[object, ...], int]] = {
    "open": ("open", (os.O_RDONLY,), OPEN_PERM),
    "open_truncating": ("open", (os.O_WRONLY | os.O_TRUNC,), OPEN_PERM),
    "pread": ("pread_path", (100, 5000), PRE_ACCESS),
    "large_pread": ("pread_path", (3 << 20, 5000), PRE_ACCESS),
    "pwrite": ("pwrite_path", (b"new", 5000), PRE_ACCESS),
    "truncate": ("truncate", (5000,), PRE_ACCESS),
    "touch": (map_and_touch, (), PRE_ACCESS),
    "execve": (execute_here, (), OPEN_PERM),
}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("name", CALLS)
async def test_who_waits_can_be_killed(
    world: World, make_accessor: MakeAccessor, name: str, number: signal.Signals
) -> None:
    """While the event stays unanswered: by SIGKILL, and by Ctrl-C and others whose default action it is."""
    operation, arguments, mask = CALLS[name]
    path = world.file()
    (world.backing / "file").chmod(0o755)
    accessor = make_accessor()
    async with world.listener(world.everywhere(mask), answer=hold) as listener:
        call = accessor.start(operation, path, *arguments)
        await listener.wait_for(1)
        assert not call.done
        accessor.signal(number)
        assert await died_of(accessor) == number
        with pytest.raises(AccessorDied):
            call.result()
        (event,) = listener.take_held()
        assert len(listener.take()) == 1
        answer_late(listener, event)
    assert world.content() == CONTENT[:20000]


async def test_a_killed_thread_takes_its_process_along(world: World, make_accessor: MakeAccessor) -> None:
    path = world.file()
    accessor = make_accessor()
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        accessor.start(many_reads, path, 5, PAGE)
        await listener.wait_for(5)
        accessor.signal(signal.SIGKILL)
        assert await died_of(accessor) == signal.SIGKILL
        for event in listener.take_held():
            answer_late(listener, event)


async def test_nothing_is_left_for_others_of_one_who_was_killed(
    world: World, make_accessor: MakeAccessor
) -> None:
    """The next one is asked for, and gets its bytes."""
    path = world.file()
    victim, other = make_accessor(), make_accessor()
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        victim.start("pread_path", path, 100, 5000)
        await listener.wait_for(1)
        call = other.start("pread_path", path, 100, 5000)
        await listener.wait_for(2)
        victim.signal(signal.SIGKILL)
        assert await died_of(victim) == signal.SIGKILL
        assert not call.done
        assert [event.pid for event in listener.take()] == [victim.pid, other.pid]
        listener.release()
        assert await call.wait() == CONTENT[5000:5100]


def send(path: str) -> int:
    return os.sendfile(os.memfd_create("target"), os.open(path, os.O_RDONLY), 4096, 4096)


def populate(path: str) -> None:
    mmap.mmap(os.open(path, os.O_RDONLY), 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE, offset=4096)


def write_by(descriptor: int) -> int:
    return os.pwrite(descriptor, b"mine", 5000)


@pytest.mark.parametrize("act", [send, map_and_touch, populate], ids=lambda act: act.__name__)
async def test_no_page_stays_locked_of_who_was_killed(
    world: World, make_accessor: MakeAccessor, act: Callable[[str], object]
) -> None:
    """While its event stays unanswered: who is not asked writes there, as a listener does that fills through a descriptor of its own, and who is
    asked is heard."""
    path = world.file()
    victim, writer, other = make_accessor(), make_accessor(), make_accessor()
    descriptor = await writer.run("open", path, os.O_RDWR)
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        victim.start(act, path)
        await listener.wait_for(1)
        writing = writer.start(write_by, descriptor)
        victim.signal(signal.SIGKILL)
        assert await died_of(victim) == signal.SIGKILL
        with trio.fail_after(PATIENCE):
            assert await writing.wait() == 4
        call = other.start(act, path)
        with trio.fail_after(PATIENCE):
            await listener.wait_for(2)
        assert [event.pid for event in listener.take()] == [victim.pid, other.pid]
        listener.release()
        await call.wait()
    assert world.content()[5000:5004] == b"mine"


@pytest.mark.parametrize("act", [send, map_and_touch], ids=lambda act: act.__name__)
async def test_who_waits_for_a_page_and_is_killed_takes_nobody_along(
    world: World, make_accessor: MakeAccessor, act: Callable[[str], object]
) -> None:
    """Two want the same page; the one that was asked for first is killed. The other gets it."""
    path = world.file()
    victim, other = make_accessor(), make_accessor()
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        victim.start(act, path)
        await listener.wait_for(1)
        call = other.start(act, path)
        victim.signal(signal.SIGKILL)
        assert await died_of(victim) == signal.SIGKILL
        with trio.fail_after(PATIENCE):
            await listener.wait_for(2)
        listener.release()
        assert await call.wait() in (4096, CONTENT[9096:9097])


def count_signals(path: str, count: int) -> tuple[bytes, list[int]]:
    """Read, with a handler for SIGUSR1 and one for SIGINT."""
    seen: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: seen.append(number))
    descriptor = os.open(path, os.O_RDONLY)
    data = os.pread(descriptor, count, 5000)
    return data, sorted(seen)


@pytest.mark.parametrize("count", [100, 10000])
async def test_a_signal_with_a_handler_does_not_end_the_wait(
    world: World, make_accessor: MakeAccessor, count: int
) -> None:
    path = world.file()
    accessor, victim = make_accessor(), make_accessor()
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        call = accessor.start(count_signals, path, count)
        await listener.wait_for(1)
        victim.start("pread_path", path, 100, 0)
        await listener.wait_for(2)
        accessor.signal(signal.SIGUSR1)
        accessor.signal(signal.SIGINT)
        # When this one was noticed and is dead, the look for signals has passed the other too.
        victim.signal(signal.SIGKILL)
        assert await died_of(victim) == signal.SIGKILL
        assert not call.done
        listener.release()
        data, seen = await call.wait()
        assert (data, seen) == (CONTENT[5000 : 5000 + count], [signal.SIGINT, signal.SIGUSR1])
        # Not asked again: the call was not begun anew.
        assert len(listener.take()) == 2


async def test_signals_that_are_ignored_or_blocked_do_not_kill(
    world: World, make_accessor: MakeAccessor
) -> None:
    path = world.file()
    accessor, victim = make_accessor(), make_accessor()
    await accessor.run(ignore_and_block)
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        call = accessor.start("pread_path", path, 100, 5000)
        await listener.wait_for(1)
        victim.start("pread_path", path, 100, 0)
        await listener.wait_for(2)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGWINCH):
            accessor.signal(number)
        victim.signal(signal.SIGKILL)
        assert await died_of(victim) == signal.SIGKILL
        assert not call.done
        listener.release()
        assert await call.wait() == CONTENT[5000:5100]


def ignore_and_block() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


# Many


@pytest.fixture(scope="module")
def first_access(make_shared_mount: MakeMount) -> World:
    mount = make_shared_mount("--events", "first-access", "--allow-other")
    return World("first-access", mount.source, mount.path, mount.pid)


def many_reads(path: str, number: int, step: int, first: int = 0) -> list[bytes]:
    """One byte in each of so many threads, `step` bytes apart, all at once."""
    descriptor = os.open(path, os.O_RDONLY)
    data = [b""] * number

    def read(index: int) -> None:
        data[index] = os.pread(descriptor, 1, (first + index) * step)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return data


PROCESSES, THREADS, STEP = 10, 100, 1 << 18


async def many_wait(world: World, make_accessor: MakeAccessor, name: str) -> None:
    path = str(world.path / f"{name}-watched")
    with (world.backing / f"{name}-watched").open("wb") as file:
        for index in range(PROCESSES * THREADS):
            file.seek(index * STEP)
            file.write(bytes([1 + index % 255]))
        file.truncate(PROCESSES * THREADS * STEP)
    other = world.file(f"{name}-other")
    third = world.file(f"{name}-third")
    bystander = make_accessor()
    allowing = False  # at the end: what is read ahead comes late
    async with world.listener(
        Mark(PRE_ACCESS, path), answer=lambda event: 0 if allowing else HOLD
    ) as listener:
        readers = [make_accessor() for _ in range(PROCESSES)]
        calls = [
            reader.start(many_reads, path, THREADS, STEP, index * THREADS)
            for index, reader in enumerate(readers)
        ]
        await listener.wait_for(PROCESSES * THREADS)
        assert {event.pid for event in listener.take()} == {reader.pid for reader in readers}
        # Others look, read and write,
        assert (await bystander.run("stat", path)).st_size == PROCESSES * THREADS * STEP
        assert f"{name}-other" in await bystander.run("listdir", str(world.path))
        assert await bystander.run("read_file", other) == CONTENT[:20000]
        assert await bystander.run("pwrite_path", other, b"new", 0) == 3
        # and so does the listener itself, through the mount.
        assert await trio.to_thread.run_sync(Path(third).read_bytes) == CONTENT[:20000]
        assert (await trio.to_thread.run_sync(os.stat, path)).st_size == PROCESSES * THREADS * STEP
        assert not any(call.done for call in calls)
        allowing = True
        listener.release()
        for index, call in enumerate(calls):
            expected = [bytes([1 + (index * THREADS + n) % 255]) for n in range(THREADS)]
            assert await call.wait() == expected


async def test_a_thousand_wait_and_stop_nobody(world: World, make_accessor: MakeAccessor) -> None:
    await many_wait(world, make_accessor, "many")


async def test_a_thousand_wait_for_the_page_cache(first_access: World, make_accessor: MakeAccessor) -> None:
    await many_wait(first_access, make_accessor, "cached")


async def test_hundreds_of_opens_wait(world: World, make_accessor: MakeAccessor) -> None:
    path = world.file()
    other = world.file("other")
    accessor, bystander = make_accessor(), make_accessor()
    async with world.listener(Mark(OPEN_PERM, path), answer=hold) as listener:
        call = accessor.start(many_opens, path, 200)
        await listener.wait_for(200)
        assert await bystander.run("read_file", other) == CONTENT[:20000]
        assert (await bystander.run("stat", path)).st_size == 20000
        assert world.heard(listener.take()) == [O] * 200
        assert listener.release() == 200
        assert await call.wait() == 200


def many_opens(path: str, number: int) -> int:
    descriptors: list[int] = []
    threads = [
        threading.Thread(target=lambda: descriptors.append(os.open(path, os.O_RDONLY))) for _ in range(number)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(descriptors)


async def test_one_who_waits_does_not_stop_others_of_the_same_file(
    world: World, make_accessor: MakeAccessor
) -> None:
    path = world.file()
    waiting, other = make_accessor(), make_accessor()
    held: list[Event] = []

    def answer(event: Event) -> int:
        if event.mask & PRE_ACCESS and not held and event.path == path:
            held.append(event)
            return HOLD
        return 0

    async with world.listener(world.everywhere(EVERYTHING), answer=answer) as listener:
        call = waiting.start("pread_path", path, 100, 5000)
        await listener.wait_until_named("PRE_ACCESS")
        listener.take()
        assert await other.run("pread_path", path, 100, 5000) == CONTENT[5000:5100]
        assert await other.run("pwrite_path", path, b"new", 5000) == 3
        assert world.heard(listener.take())[:2] == [O, P(PAGE, PAGE)]
        assert not call.done
        listener.release()
        assert await call.wait() == b"new" + CONTENT[5003:5100]


def create(path: str, mode: int) -> int:
    return os.write(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode), b"new")


async def test_a_new_file_that_waits_does_not_stop_its_directory(
    world: World, make_accessor: MakeAccessor
) -> None:
    """The directory is not locked while the open of a file that has just been created waits for its answer."""
    world.file("there")
    creators, bystander = [make_accessor(), make_accessor()], make_accessor()
    async with world.listener(world.everywhere(OPEN_PERM), answer=hold) as listener:
        calls = []
        for number, creator in enumerate(creators):
            calls.append(creator.start(create, str(world.path / f"new-{number}"), 0o600))
            await listener.wait_for(number + 1)
        assert (await bystander.run("stat", str(world.path / "there"))).st_size == 20000
        assert (await trio.to_thread.run_sync(os.stat, world.path / "new-0")).st_size == 0
        await bystander.run("mkdir", str(world.path / "made"))
        await bystander.run("rename", str(world.path / "there"), str(world.path / "moved"))
        assert sorted(await bystander.run("listdir", str(world.path))) == ["made", "moved", "new-0", "new-1"]
        assert world.heard(listener.take()) == [O.of("new-0"), O.of("new-1")]
        assert not any(call.done for call in calls)
        listener.release()
        assert [await call.wait() for call in calls] == [3, 3]


async def test_new_files_that_their_makers_may_not_write(world: World, make_accessor: MakeAccessor) -> None:
    """The process that makes a file may write to it through that descriptor, whatever its mode: git does so."""
    os.chmod(world.backing, 0o777)
    nobody = make_accessor(uid=NOBODY, gid=NOBODY)
    for marks in ([], [world.everywhere(EVERYTHING)]):
        async with world.listener(*marks) as listener:
            path = world.path / f"new-{len(marks)}"
            assert await nobody.run(create, str(path), 0o444) == 3
            assert world.heard(listener.take()) == [O.of(path.name), P(0, PAGE, path.name)] * len(marks)
        status = os.stat(world.backing / path.name)
        assert (status.st_uid, status.st_gid, status.st_mode) == (NOBODY, NOBODY, 0o100444)
        assert world.content(path.name) == b"new"


async def test_a_file_made_behind_the_mount_is_opened(world: World, accessor: Accessor) -> None:
    """O_CREAT of a name that was not there a moment ago, and is now."""
    path = str(world.path / "file")
    async with world.listener(world.everywhere(OPEN_PERM)) as listener:
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                await accessor.run("stat", path)
            world_file = world.backing / "file"
            await trio.to_thread.run_sync(world_file.write_bytes, b"there")
            listener.take()  # the real kernel has heard that too
            descriptor = await accessor.run("open", path, os.O_CREAT | os.O_RDWR, 0o600)
            assert world.heard(listener.take()) == [O]
            assert await accessor.run("pread", descriptor, 100, 0) == b"there"
            await accessor.run("close", descriptor)
            await accessor.run("unlink", path)
