"""Accessors that wait for an answer, on the real kernel and with the devfuse engine: they leave when killed, and stop no other accessor."""

import os
import signal
import statistics
import time

import pytest
import trio

from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.events import Event
from tests.conftest import MakeAccessor
from tests.support.async_listener import HOLD
from tests.support.devfuse_acts import act
from tests.support.kernel_and_devfuse import engine as engine
from tests.support.kernel_and_devfuse import needs_shared_mappings
from tests.support.kernel_and_devfuse import whole_world as whole_world
from tests.support.kernel_and_mount import CONTENT, MIB, PAGE, PRE_ACCESS, SIZE, Mark, P, World

pytestmark = [pytest.mark.fuse, pytest.mark.kernel, pytest.mark.any_engine]


def hold(event: Event) -> int:
    return HOLD


async def died_of(accessor: Accessor) -> int:
    """Wait for an accessor's end; the signal that killed it."""
    return await trio.to_thread.run_sync(accessor.wait_exit)


# Killed

# A look for signals a few times a second takes longer, on the average.
AT_ONCE = 0.1  # seconds
WAITING_AT = (
    "pread",
    "large pread",
    "pwrite",
    "fallocate",
    "ftruncate",
    "sendfile",
    "copy_file_range",
    "private mapping",
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
async def test_who_is_killed_leaves_at_once(
    world: World, make_accessor: MakeAccessor, number: signal.Signals
) -> None:
    """Twenty, one after the other, in every kind of call, while no event is answered."""
    paths = [world.file(f"file-{index}") for index in range(20)]
    took = []
    async with world.listener(world.everywhere(PRE_ACCESS), answer=hold) as listener:
        for index, path in enumerate(paths):
            accessor = make_accessor()
            call = accessor.start(act, path, "operate", WAITING_AT[index % len(WAITING_AT)])
            await listener.wait_for(index + 1)
            assert not call.done
            began = time.monotonic()
            accessor.signal(number)
            assert await died_of(accessor) == number
            took.append(time.monotonic() - began)
    assert statistics.median(took) < AT_ONCE, took
    assert sum(took) < 20 * AT_ONCE, took
    assert {world.content(f"file-{index}") for index in range(20)} == {CONTENT[:SIZE]}


async def test_who_is_killed_with_a_passed_descriptor_leaves_at_once(
    world: World, make_accessor: MakeAccessor
) -> None:
    paths = [world.file(name) for name in WAITING_AT]
    took = []
    accessor = make_accessor()
    async with world.listener(world.everywhere(PRE_ACCESS), answer=hold) as listener:
        for name, path in zip(WAITING_AT, paths, strict=True):
            call = accessor.start(act, path, "operate_with_passed_descriptor", name)
            await listener.wait_for(1)
            (event,) = listener.take()
            assert event.pid != accessor.pid
            began = time.monotonic()
            os.kill(event.pid, signal.SIGKILL)
            assert await call.wait() == signal.SIGKILL
            took.append(time.monotonic() - began)
    assert statistics.median(took) < AT_ONCE, took
    assert {world.content(name) for name in WAITING_AT} == {CONTENT[:SIZE]}


async def test_a_process_of_many_waiting_threads_can_be_killed(
    world: World, make_accessor: MakeAccessor
) -> None:
    path = world.file()
    victim, other = make_accessor(), make_accessor()
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        victim.start(act, path, "many_reads", 0, 200)
        await listener.wait_for(200)
        call = other.start("pread_path", path, 100, 5000)
        await listener.wait_for(201)
        began = time.monotonic()
        victim.kill()
        assert await died_of(victim) == signal.SIGKILL
        assert time.monotonic() - began < 2
        assert not call.done
        listener.release()
        assert await call.wait() == CONTENT[5000:5100]


@pytest.mark.parametrize("is_killed", [False, True], ids=["answered", "killed"])
@pytest.mark.parametrize("name", WAITING_AT, ids=lambda name: name.replace(" ", "-"))
async def test_a_signal_with_a_handler_does_not_end_the_wait(
    world: World, make_accessor: MakeAccessor, name: str, is_killed: bool
) -> None:
    """The call goes on when it is answered, and is not made again; but SIGKILL after such a signal ends it."""
    path = world.file()
    accessor, victim = make_accessor(), make_accessor()
    holding = True
    async with world.listener(
        Mark(PRE_ACCESS, path), answer=lambda event: HOLD if holding else 0
    ) as listener:
        call = accessor.start(act, path, "operate_despite_signals", name)
        await listener.wait_for(1)
        victim.start("pread_path", path, 100, 0)
        await listener.wait_for(2)
        accessor.signal(signal.SIGUSR1)
        accessor.signal(signal.SIGINT)
        # When this one's death has been noticed, so have the signals before.
        victim.kill()
        assert await died_of(victim) == signal.SIGKILL
        assert not call.done
        listener.take()
        if is_killed:
            accessor.kill()
            assert await died_of(accessor) == signal.SIGKILL
            with pytest.raises(AccessorDied):
                call.result()
            assert listener.take() == []
        else:
            holding = False
            listener.release()
            assert await call.wait() == [signal.SIGINT, signal.SIGUSR1]
            # Python makes calls anew that fail with EINTR: those that move pages through a pipe do.
            assert listener.take() == [] or name in ("sendfile", "copy_file_range")
    if is_killed:
        assert world.content() == CONTENT[:SIZE]


# Writers of one file


async def test_writers_of_one_file(world: World, make_accessor: MakeAccessor) -> None:
    """All their events are there at once, and the accessor that is answered first ends first."""
    path = world.file()
    writers = [make_accessor() for _ in range(5)]
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        calls = []
        for index, writer in enumerate(writers):
            calls.append(writer.start("pwrite_path", path, bytes([65 + index]) * 100, index * PAGE))
            await listener.wait_for(index + 1)
        heard = listener.take()
        assert world.heard(heard) == [P(index * PAGE, PAGE) for index in range(4)] + [P(4 * PAGE, PAGE)]
        assert [event.pid for event in heard] == [writer.pid for writer in writers]
        for event, call in reversed(list(zip(listener.take_held(), calls, strict=True))):
            assert not call.done
            listener.group.answer(event, 0)
            os.close(event.fd)
            assert await call.wait() == 100
    content = bytearray(CONTENT[:SIZE])
    for index in range(5):
        content[index * PAGE : index * PAGE + 100] = bytes([65 + index]) * 100
    assert world.content() == content


async def test_writers_that_make_a_file_longer(world: World, make_accessor: MakeAccessor) -> None:
    """On the real kernel they do not wait for each other either; here they do ("writers of one file")."""
    path = world.file()
    writers = [make_accessor() for _ in range(3)]
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        calls = [
            writer.start("pwrite_path", path, b"longer", SIZE + index * PAGE)
            for index, writer in enumerate(writers)
        ]
        if world.is_kernel:
            await listener.wait_for(3)
        while not all(call.done for call in calls):
            with trio.move_on_after(0.01):
                await listener.wait_for(len(listener.heard) + 1)
            listener.release()
        assert sorted(event.offset or 0 for event in listener.take()) == [4 * PAGE, 5 * PAGE, 6 * PAGE]
    content = bytearray(CONTENT[:SIZE].ljust(SIZE + 2 * PAGE + 6, b"\0"))
    for index in range(3):
        content[SIZE + index * PAGE : SIZE + index * PAGE + 6] = b"longer"
    assert world.content() == content


async def test_writers_through_one_descriptor(world: World, make_accessor: MakeAccessor) -> None:
    """Threads with calls of several requests each, whose pieces mix."""
    path = world.file(size=5 * MIB)
    accessor, other = make_accessor(), make_accessor()
    async with world.listener(Mark(PRE_ACCESS, path), answer=hold) as listener:
        call = accessor.start(act, path, "write_in_threads", [0, MIB + 100])
        second = other.start("pwrite_path", path, b"o" * 100, 4 * MIB)
        await listener.wait_for(3)
        assert sorted(event.offset or 0 for event in listener.take()) == [0, MIB, 4 * MIB]
        listener.release()
        assert await call.wait() == [MIB + 50] * 2
        assert await second.wait() == 100
        assert listener.take() == []
    content = bytearray(CONTENT[: 5 * MIB])
    content[: MIB + 50] = b"0" * (MIB + 50)
    content[MIB + 100 : 2 * MIB + 150] = b"1" * (MIB + 50)
    content[4 * MIB : 4 * MIB + 100] = b"o" * 100
    assert world.content() == content


async def test_write_back_does_not_wait(world: World, accessor: Accessor) -> None:
    """What is written through a mapping reaches the file while no event is answered: memory reclaim may wait for it."""
    needs_shared_mappings(world)
    path = world.file()
    holding = False
    async with world.listener(
        Mark(PRE_ACCESS, path), answer=lambda event: HOLD if holding else 0
    ) as listener:
        await accessor.run(act, path, "share_and_dirty")
        holding = True
        await accessor.run(act, path, "write_back")
        assert listener.release() == 0
    assert world.content() == b"dirty" + CONTENT[5:SIZE]


@pytest.mark.parametrize(
    "name", ["private mapping", "shared mapping", "sendfile"], ids=lambda name: name.replace(" ", "-")
)
async def test_a_page_that_waits_does_not_stop_others_of_its_file(
    world: World, make_accessor: MakeAccessor, name: str
) -> None:
    """The kernel has it locked until it is answered; others open the file, and read and write elsewhere in it."""
    needs_shared_mappings(world)
    path = world.file()
    waiting, other = make_accessor(), make_accessor()
    async with world.listener(
        Mark(PRE_ACCESS, path), answer=lambda event: HOLD if event.pid == waiting.pid else 0
    ) as listener:
        call = waiting.start(act, path, "operate", name)
        await listener.wait_for(1)
        for _ in range(2):
            assert await other.run("pread_path", path, 100, 9000) == CONTENT[9000:9100]
            assert await other.run("pwrite_path", path, b"new", 13000) == 3
        assert (await other.run("stat", path)).st_size == SIZE
        await other.run("utime", path, (1, 2))
        assert (await other.run("stat", path)).st_mtime == 2
        assert not call.done
        listener.release()
        await call.wait()
        # What the file's time is in truth shows when nobody waits.
        assert (await other.run("stat", path)).st_mtime_ns == (world.backing / "file").stat().st_mtime_ns


# Many

PROCESSES, THREADS = 20, 500


async def test_ten_thousand_wait_and_stop_nobody(world: World, make_accessor: MakeAccessor) -> None:
    path, other, watched = world.file(), world.file("other"), world.file("watched")
    bystander = make_accessor()
    async with world.listener(
        Mark(PRE_ACCESS, path), Mark(PRE_ACCESS, watched), answer=lambda e: HOLD if e.path == path else 0
    ) as listener:
        readers = [make_accessor() for _ in range(PROCESSES)]
        calls = [
            reader.start(act, path, "many_reads", index * THREADS, THREADS)
            for index, reader in enumerate(readers)
        ]
        await listener.wait_for(PROCESSES * THREADS)
        assert {event.pid for event in listener.take()} == {reader.pid for reader in readers}
        assert (await bystander.run("stat", path)).st_size == SIZE
        assert sorted(await bystander.run("listdir", str(world.path))) == ["file", "other", "watched"]
        assert await bystander.run("read_file", other) == CONTENT[:SIZE]
        assert await bystander.run("pwrite_path", other, b"new", 0) == 3
        # Also those who are asked for, and answered.
        assert await bystander.run("pread_path", watched, 100, 5000) == CONTENT[5000:5100]
        assert world.heard(listener.take()) == [P(PAGE, PAGE, "watched")]
        assert not any(call.done for call in calls)
        if world.is_kernel:
            # Each answer wakes everybody who waits there: ten thousand answers take a minute. A group that closes allows all at once.
            for event in listener.take_held():
                os.close(event.fd)
        else:
            assert listener.release() == PROCESSES * THREADS
    for index, call in enumerate(calls):
        assert await call.wait() == CONTENT[index * THREADS : (index + 1) * THREADS]
