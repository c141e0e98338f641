"""The tables of rule_rows.py and the scenarios of group_scenarios.py, on the running kernel: where we differ, it is right.

The same rows are held against fusehsm in test_rules.py, test_marks.py and test_group.py.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor, Zygote
from fusehsm.fanotify.abi import FAN_MARK_DONT_FOLLOW, FAN_MARK_FLUSH, FAN_MARK_ONLYDIR, LINUX_6_14
from fusehsm.fanotify.marks import MarkTable
from fusehsm.fanotify.rules import ObjectKind, check_mark
from fusehsm.linux.syscalls import fanotify_init
from tests.support.group_scenarios import SCENARIOS, Make, check_errnos, check_response
from tests.support.kernel_groups import KernelGroup, KernelSide, Scene, make_targets
from tests.support.row_tests import error_of, row_names
from tests.support.rule_rows import (
    CONTENT,
    EOC,
    NOTIF,
    ONDIR,
    PRE,
    A,
    MarkRow,
    O,
    P,
    ResponseRow,
    X,
    errno_rows,
    init_rows,
    mark_rows,
    response_rows,
)

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def targets(kernel_events: Path) -> dict[str, Path]:
    """Objects to mark, on the ext4 image."""
    place = kernel_events / "rules"
    place.mkdir()
    return make_targets(place)


@pytest.mark.parametrize(("flags", "event_f_flags", "expected"), list(init_rows()))
def test_init(flags: int, event_f_flags: int, expected: int, kernel_events: Path) -> None:
    def init() -> None:
        os.close(fanotify_init(flags, event_f_flags))

    assert error_of(init) == expected


def test_marks(targets: dict[str, Path]) -> None:
    """All rows in one test: there are four hundred, of a few microseconds each."""
    for row in mark_rows():
        check_mark_row(row, targets)


def check_mark_row(row: MarkRow, targets: dict[str, Path]) -> None:
    with ExitStack() as stack:
        if row.written:
            stack.callback(os.close, os.open(targets["file"], os.O_WRONLY))
        group = KernelGroup(row.group_class)
        stack.callback(group.close)
        found = [error_of(group.mark, step.flags, step.mask, targets[step.target]) for step in row.steps]
        assert found == [step.errno for step in row.steps], row.name


# Marks at random, against the group's fdinfo


class _Pair:
    """A real group and our table, given the same calls."""

    def __init__(self, group_class: int, dialect_marks: MarkTable, written: bool) -> None:
        self.group_class = group_class
        self.group = KernelGroup(group_class)
        self.table = dialect_marks
        self.written = written

    def ours(self, flags: int, mask: int, path: Path, kind: ObjectKind) -> None:
        check_mark(self.group_class, LINUX_6_14, flags, mask, kind)
        if flags & FAN_MARK_FLUSH:
            self.table.flush(flags)
            return
        self.table.modify(
            flags,
            mask,
            path.stat().st_ino,
            opened_for_write=self.written and kind is ObjectKind.REGULAR,
            is_dir=kind is ObjectKind.DIRECTORY,
        )

    def our_marks(self) -> list[tuple[object, ...]]:
        rows = self.table.describe()
        return sorted((r["type"], r["inode"] or 0, r["mflags"], r["mask"], r["ignored_mask"]) for r in rows)


def _random_call(chance: random.Random) -> tuple[int, int]:
    flags = chance.choice([1, 1, 1, 1, 2, 2, 0x80])
    flags |= chance.choice([0, 0, 0, 0x10, 0x100]) | chance.choice([0, 0, 0x20, 0x400, 0x420])
    flags |= chance.choice([0, 0, 0x40]) | chance.choice([0, 0, 0x200])
    if flags & FAN_MARK_FLUSH and chance.random() < 0.8:
        flags &= 0x190
    if chance.random() < 0.03:
        flags ^= 1 << chance.randrange(32)
    # These two say how a path is looked up, which is not the table's business.
    flags &= ~(FAN_MARK_ONLYDIR | FAN_MARK_DONT_FOLLOW)
    mask = 0
    for bit in chance.sample([P, O, A, X, ONDIR, EOC, 0x20, 0x2, 0x18], chance.choice([0, 1, 1, 2, 2, 3])):
        mask |= bit
    if chance.random() < 0.03:
        mask |= 1 << chance.randrange(64)
    return flags, mask


@pytest.mark.parametrize("seed", range(8))
def test_marks_at_random(seed: int, targets: dict[str, Path]) -> None:
    """Every call has our errno, and leaves the marks that our table has."""
    chance = random.Random(seed)
    objects = [
        (targets["file"], ObjectKind.REGULAR),
        (targets["dir"], ObjectKind.DIRECTORY),
        (targets["fifo"], ObjectKind.OTHER),
    ]
    for _ in range(60):
        with ExitStack() as stack:
            written = chance.random() < 0.15
            if written:
                stack.callback(os.close, os.open(targets["file"], os.O_RDWR))
            pair = _Pair(chance.choice([PRE, PRE, PRE, CONTENT, NOTIF]), MarkTable(LINUX_6_14), written)
            stack.callback(pair.group.close)
            log = []
            for _ in range(chance.randrange(1, 14)):
                flags, mask = _random_call(chance)
                path, kind = chance.choice(objects)
                theirs = error_of(pair.group.mark, flags, mask, path)
                log.append(f"{flags:#x} {mask:#x} {kind.name} written={written}: {theirs}")
                assert error_of(pair.ours, flags, mask, path, kind) == theirs, log
                assert pair.our_marks() == pair.group.marks(), log


# Groups


@pytest.fixture(scope="module")
def scene(kernel_events: Path, zygote: Zygote) -> Iterator[Scene]:
    """Files and accessors for all scenarios."""
    place = kernel_events / "groups"
    place.mkdir()
    with ExitStack() as stack:
        yield Scene(place, lambda: stack.enter_context(Accessor(zygote)))


@pytest.fixture
def make(scene: Scene) -> Iterator[Make]:
    """Real groups; they go with the test, then the accessors are free for the next one."""
    with ExitStack() as after, ExitStack() as stack:

        def make_side(flags: int = PRE, event_f_flags: int = os.O_RDONLY) -> KernelSide:
            return KernelSide(scene, after, stack, flags, event_f_flags)

        yield make_side


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_scenario(scenario: Callable[[Make], None], make: Make) -> None:
    scenario(make)


@pytest.mark.parametrize("row", list(response_rows()), ids=row_names)
def test_response(row: ResponseRow, make: Make) -> None:
    check_response(make, row)


@pytest.mark.parametrize("group_class", [CONTENT, PRE], ids=["CONTENT", "PRE"])
def test_every_errno(group_class: int, make: Make) -> None:
    check_errnos(make, errno_rows(group_class), group_class)
