"""Listener programs that know nothing of fusehsm: what they hear, what accessors get, and what becomes of the files.

Every expectation is held against the real kernel and against `fusehsm run`. Programs are in C (dynamic and static), Go, Rust and Python.
"""

import errno
import signal

import pytest

from fusehsm.conform.accessor import Accessor
from tests.conftest import MakeAccessor
from tests.support.kernel_and_mount import Failed
from tests.support.kernel_and_run import STEP, RunWorld, Start, ended_by, mounts_at
from tests.support.listener_programs.building import rust_compiler
from tests.support.listener_steps import (
    FILES,
    INNER,
    LEFT,
    PAGE,
    SECRET,
    SERIES,
    SIZE,
    Step,
    asked,
    finish,
    planned,
    read_in_thread,
    read_often,
    take,
)

pytestmark = pytest.mark.any_engine
pytest_plugins = ["tests.support.listener_program_fixtures"]

EPERM = Failed(errno.EPERM)


def several_at_once(world: RunWorld, make_accessor: MakeAccessor) -> list[str]:
    """Four accessors, each with a file of its own; the listener's lines in any order."""
    names = [name for name in FILES if name.startswith("many")]
    accessors = [make_accessor() for _ in names]
    calls = [
        accessor.start("pread_path", str(world.place / name), SIZE, 0)
        for accessor, name in zip(accessors, names, strict=True)
    ]
    assert [call.result(STEP) for call in calls] == [planned(0, SIZE)] * len(names)
    return [asked(0, 5 * PAGE, name) for name in names]


# Ways to wait


STYLES = (
    "blocking",
    "poll",
    "epoll",
    "epoll-edge",
    "select",
    "readv",
    "fionread",
    "writev",
    "threads",
    "workers",
    "early",
    "copy",
    "exec",
    "alarm",
    "alarm-restart",
)
STATIC = ("blocking", "poll", "threads", "workers", "exec", "alarm")
BUILDS = (
    *(("dynamic", style) for style in STYLES),
    *(("static", style) for style in STATIC),
    ("go", "blocking"),
    ("go", "netpoll"),
    *((("rust", "blocking"), ("rust", "poll")) if rust_compiler() else ()),
    ("python", "blocking"),
    ("python", "poll"),
)


@pytest.mark.parametrize(("build", "style"), BUILDS)
def test_ways_to_wait(
    build: str, style: str, run_world: RunWorld, start: Start, make_accessor: MakeAccessor
) -> None:
    accessor = make_accessor()
    listener = start(style, "--deny", "*.denied=EIO", build=build)
    if style == "alarm":
        listener.output.wait_for(lambda line: line == "interrupted", STEP)
    series: tuple[Step, ...] = SERIES
    left = LEFT
    if style == "early" and not run_world.is_kernel:
        # While a truncation waits FUSE holds the inode's lock, while a fault does, the page's, and the listener's own write waits for those.
        series = tuple(step for step in SERIES if step.file not in ("cut", "mapped"))
        left = {name: content for name, content in LEFT.items() if name not in ("cut", "mapped")}
    expected = take(accessor, run_world.place, series)
    at_once = several_at_once(run_world, make_accessor)
    said = finish(run_world, listener, accessor)
    if style == "alarm":
        said.remove("interrupted")
    assert said[: len(expected)] == expected
    assert sorted(said[len(expected) :]) == at_once
    assert {name: (run_world.place / name).read_bytes() for name in left} == left


def test_one_event_for_each_edge(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start("epoll-edge-one", "--deny", "*.denied=EIO")
    expected = take(accessor, run_world.place, SERIES)
    assert finish(run_world, listener, accessor) == expected


def test_pyfanotify(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start("any", build="pyfanotify", marks=())
    steps = (
        Step("pread_path", "stub", (10, 0), bytes(10), ("heard stub access|close_nowrite|open",)),
        Step("pwrite_path", "written", (b"x", 0), 1, ("heard written modify|close_write|open",)),
    )
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == expected


CROWDED = (
    ("dynamic", "blocking"),
    ("dynamic", "epoll-edge"),
    ("dynamic", "readv"),
    ("dynamic", "writev"),
    ("dynamic", "threads"),
    ("dynamic", "workers"),
    ("dynamic", "alarm"),
    ("dynamic", "alarm-restart"),
    ("static", "threads"),
    ("go", "blocking"),
    ("go", "netpoll"),
)


@pytest.mark.parametrize(("build", "style"), CROWDED)
def test_many_at_once(
    build: str, style: str, run_world: RunWorld, start: Start, make_accessor: MakeAccessor
) -> None:
    """No event is lost, and none comes twice, when several processes read as fast as they are answered."""
    listener = start(style, build=build)
    accessors = [make_accessor() for _ in range(4)]
    calls = [
        accessor.start(read_often, str(run_world.place / f"many-{number}"), 100)
        for number, accessor in enumerate(accessors)
    ]
    assert [call.result(2 * STEP) for call in calls] == [planned(0, 1)] * 4
    said = [line for line in finish(run_world, listener, accessors[0]) if line != "interrupted"]
    assert sorted(said) == [asked(0, PAGE, f"many-{number}") for number in range(4) for _ in range(100)]


# What events tell


def test_who_accesses(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start("pidfd")
    steps = (Step("pread_path", "stub", (10, 0), planned(0, 10), (asked(0, PAGE),)),)
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == [f"{line} pidfd=same cloexec=1,1" for line in expected]


def test_which_thread_accesses(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start("tid")
    steps = (
        Step("pread_path", "stub", (10, 0), planned(0, 10), (f"{asked(0, PAGE)} leader",)),
        Step(read_in_thread, "stub", (10,), planned(0, 10), (f"{asked(0, PAGE)} thread",)),
    )
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == expected


@pytest.mark.parametrize(
    ("style", "line"),
    [("few-descriptors", "read: EMFILE"), ("few-descriptors-reported", "PRE_ACCESS 0 4096 - EMFILE")],
)
def test_no_descriptor_left(
    style: str, line: str, run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start(style)
    steps = (
        Step("pread_path", "stub", (10, 0), EPERM, (line,)),
        Step("pread_path", "stub", (10, 0), planned(0, 10), (asked(0, PAGE),)),
    )
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == expected


# Lives and deaths


def test_death_of_a_listener_that_holds_events(
    run_world: RunWorld, start: Start, make_accessor: MakeAccessor
) -> None:
    first, second, third = (make_accessor() for _ in range(3))
    listener = start("death", keep=True)
    expected = take(
        first,
        run_world.place,
        (Step("pread_path", "stub", (10, 0), planned(0, 10), (asked(0, PAGE),)),),
    )
    read = second.start("pread_path", str(run_world.place / "whole"), 10, 0)
    listener.output.wait_for(lambda line: line.endswith("HELD"), STEP)
    queued = third.start("pread_path", str(run_world.place / "mapped"), 10, 0)
    # Nobody has filled anything, and nobody has said no.
    assert (read.result(STEP), queued.result(STEP)) == (bytes(10), bytes(10))
    assert ended_by(listener.end(), signal.SIGKILL)
    expected += [asked(0, PAGE, "whole", "HELD"), "queued 24"]
    assert listener.lines[-len(expected) :] == expected
    # Nobody is asked any more.
    take(first, run_world.place, (Step("pread_path", "cut", (10, 0), bytes(10)),))
    assert mounts_at(run_world.place) == 1


def test_becoming_a_program_without_the_group(
    run_world: RunWorld, start: Start, make_accessor: MakeAccessor
) -> None:
    first, second = make_accessor(), make_accessor()
    listener = start("exec-away")
    read = first.start("pread_path", str(run_world.place / "stub"), 10, 0)
    listener.output.wait_for(lambda line: line.endswith("HELD"), STEP)
    queued = second.start("pread_path", str(run_world.place / "whole"), 10, 0)
    # The group went with its last descriptor: everybody is let go, and nobody is asked any more.
    assert (read.result(STEP), queued.result(STEP)) == (bytes(10), bytes(10))
    take(first, run_world.place, (Step("pread_path", "cut", (10, 0), bytes(10)),))
    assert listener.process.poll() is None
    listener.process.terminate()
    assert ended_by(listener.end(), signal.SIGTERM)


# Groups and marks


def test_groups_of_every_class(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start("groups", "--deny", "*.denied=EIO", marks=(("add|mount", "PRE_ACCESS|OPEN_PERM", ""),))

    def opened(file: str) -> tuple[str, str]:
        return f"pre OPEN_PERM - - {file} ALLOW", f"content OPEN_PERM - - {file} ALLOW"

    steps = (
        Step(
            "pread_path",
            "stub",
            (10, 0),
            planned(0, 10),
            (*opened("stub"), asked(0, PAGE, prefix="pre "), "content ACCESS_PERM - - stub ALLOW"),
        ),
        Step(
            "pwrite_path",
            "written",
            (b"x", 0),
            1,
            (*opened("written"), asked(0, PAGE, "written", prefix="pre ")),
        ),
        Step("pread_path", SECRET, (10, 0), Failed(errno.EIO), (f"pre OPEN_PERM - - {SECRET} DENY EIO",)),
    )
    expected = take(accessor, run_world.place, steps)
    closed = "notif CLOSE_WRITE - - written -"
    listener.output.wait_for(lambda line: line == closed, STEP)
    said = finish(run_world, listener, accessor)
    assert closed in said
    assert [line for line in said if line != closed] == expected
    marks = listener.lines[: listener.lines.index("ready")]
    assert [line.rpartition(": ")[2] for line in marks] == ["OK", "OK", "OK", "EINVAL"]


def read(file: str, *lines: str) -> Step:
    """The first bytes of a file, and the lines that this makes."""
    filled = bool(lines)
    return Step("pread_path", file, (10, 0), planned(0, 10) if filled else bytes(10), lines)


def again(file: str, *lines: str) -> Step:
    """read(), of what has been filled before."""
    return Step("pread_path", file, (10, 0), planned(0, 10), lines)


P, MOUNT = "PRE_ACCESS", ("add|mount", "PRE_ACCESS", "")
WHAT_IS_MARKED: dict[str, tuple[tuple[tuple[str, str, str], ...], tuple[Step, ...]]] = {
    "file": ((("add", P, "stub"),), (read("stub", asked(0, PAGE)), read("whole"))),
    "children": (
        (("add", "PRE_ACCESS|CHILD", ""),),
        (read("stub", asked(0, PAGE)), read("whole", asked(0, PAGE, "whole")), read(INNER)),
    ),
    "directory-alone": ((("add", P, ""),), (read("stub"),)),
    "filesystem": (
        (("add|filesystem", P, ""),),
        (read("stub", asked(0, PAGE)), read("whole", asked(0, PAGE, "whole"))),
    ),
    "all-kinds": (
        (MOUNT, ("add|filesystem", P, ""), ("add", "PRE_ACCESS|CHILD", ""), ("add", P, "stub")),
        (read("stub", asked(0, PAGE)), read("whole", asked(0, PAGE, "whole"))),
    ),
    "ignored-surviving": (
        (MOUNT, ("add|ignored|surv", P, "stub")),
        (
            read("stub"),
            Step("pwrite_path", "stub", (b"x", 0), 1),
            Step("pread_path", "stub", (1, 0), b"x"),
            read("whole", asked(0, PAGE, "whole")),
        ),
    ),
    "ignored-until-written": (
        (MOUNT, ("add|ignored", P, "stub")),
        (
            read("stub"),
            Step("pwrite_path", "stub", (b"x", 0), 1),
            Step("pread_path", "stub", (1, 0), b"x", (asked(0, PAGE),)),
        ),
    ),
    "ignored-below-a-directory": (
        (MOUNT, ("add|ignore|surv", "PRE_ACCESS|CHILD", "below")),
        (read(INNER), read("stub", asked(0, PAGE))),
    ),
    "ignored-then-not": (
        (MOUNT, ("add|ignore|surv", P, "stub"), ("remove|ignore", P, "stub")),
        (read("stub", asked(0, PAGE)),),
    ),
    "removed": (
        (MOUNT, ("remove|mount", P, ""), ("add", P, "stub"), ("add", P, "whole"), ("remove", P, "whole")),
        (read("stub", asked(0, PAGE)), read("whole")),
    ),
    "flushed": (
        (MOUNT, ("add", P, "whole"), ("flush|mount", "-", "")),
        (read("stub"), read("whole", asked(0, PAGE, "whole"))),
    ),
    "inodes-flushed": (
        (MOUNT, ("add|ignored|surv", P, "stub"), ("flush", "-", "")),
        (read("stub", asked(0, PAGE)),),
    ),
    "twice": ((MOUNT, MOUNT), (read("stub", asked(0, PAGE)),)),
}


@pytest.mark.parametrize("name", WHAT_IS_MARKED)
def test_what_is_marked(name: str, run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    marks, steps = WHAT_IS_MARKED[name]
    listener = start("blocking", marks=marks)
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == expected
    assert all(line.endswith(": OK") for line in listener.lines[: len(marks)])


IMPOSSIBLE_MARKS = (
    (("remove", P, "stub"), "ENOENT"),
    (("add", "PRE_ACCESS|ONDIR", ""), "EINVAL"),
    (("add|onlydir", P, "stub"), "ENOTDIR"),
    (("add", P, "missing"), "ENOENT"),
    (("add|ignore", P, ""), "EISDIR"),
    (("add|ignore|surv", "PRE_ACCESS|CHILD", "stub"), "ENOTDIR"),
    (("add|mount|evictable", P, ""), "EINVAL"),
    (("add", "-", "stub"), "EINVAL"),
)


def test_marks_that_cannot_be(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start("blocking", marks=tuple(mark for mark, _ in IMPOSSIBLE_MARKS))
    take(accessor, run_world.place, (read("stub"),))
    assert finish(run_world, listener, accessor) == []
    said = listener.lines[: len(IMPOSSIBLE_MARKS)]
    assert [line.rpartition(": ")[2] for line in said] == [error for _, error in IMPOSSIBLE_MARKS]


def test_a_filled_file_is_ignored_through_its_event(
    run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start("ignoring")
    whole = asked(0, PAGE, "whole")
    steps = (read("stub", asked(0, PAGE)), again("stub"), read("whole", whole), again("whole"))
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == expected


def test_a_filled_files_mark_is_removed_through_its_event(
    run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start("removing", marks=(("add", P, "stub"), ("add", P, "whole")))
    whole = asked(0, PAGE, "whole")
    steps = (read("stub", asked(0, PAGE)), again("stub"), read("whole", whole), again("whole"))
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == expected


EVERYTHING = ("add|mount", "PRE_ACCESS|OPEN_PERM|ACCESS_PERM", "")


@pytest.mark.parametrize(
    ("build", "style"),
    [("dynamic", "blocking"), ("dynamic", "writev"), ("dynamic", "epoll-edge"), ("go", "netpoll")],
)
def test_every_permission_event(
    build: str, style: str, run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start(style, "--deny", "*.denied=ENOSPC", build=build, marks=(EVERYTHING,))
    steps = (
        read("stub", "OPEN_PERM - - stub ALLOW", asked(0, PAGE), "ACCESS_PERM - - stub ALLOW"),
        Step(
            "pwrite_path",
            "stub",
            (b"x", 0),
            1,
            ("OPEN_PERM - - stub ALLOW", asked(0, PAGE)),
        ),
        Step("truncate", "cut", (PAGE,), None, (asked(PAGE, 0, "cut"),)),
        Step("pread_path", SECRET, (1, 0), Failed(errno.ENOSPC), (f"OPEN_PERM - - {SECRET} DENY ENOSPC",)),
    )
    expected = take(accessor, run_world.place, steps)
    assert finish(run_world, listener, accessor) == expected
