"""A differential of rights: ordinary users act in a plain directory and through root's shared mount; results, errnos and remains are the same."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.support import fuzzing
from tests.support.fuzzing import Case, Plan
from tests.support.harness import Mount
from tests.support.posix_trees import expect_same, in_child, state
from tests.support.rights_fuzz import USERS, Stage, make_tree

pytestmark = [pytest.mark.root, pytest.mark.fuzz]

CASES = 60
STAGES = 4
ACTS = 25


def attack(plain: Path, mount: Mount, plan: Plan, cases: int, acls: bool = False) -> None:
    """Try the cases. Each has a tree of its own on both sides, in which several users act one after the other."""

    def attempt(case: Case) -> None:
        choose = case.random
        tree, stages = choose.getstate(), []
        names = f"case-{case.number}"
        places = plain / names, mount.source / names
        for place in places:
            choose.setstate(tree)
            place.mkdir()
            make_tree(place, choose, acls)
        for _ in range(STAGES):
            stages.append(Stage(choose.choice(USERS), choose.randrange(1 << 60), ACTS))
        for number, stage in enumerate(stages):
            uid, gid, groups = stage.user
            expected, got = (
                in_child(lambda: stage.perform(root / names), uid=uid, gid=gid, groups=groups)  # noqa: B023
                for root in (plain, mount.path)
            )
            for position, (one, other) in enumerate(zip(expected, got, strict=True)):
                assert one == other, (
                    f"user {stage.user}, stage {number}: act {position} and those before: {got[:position]}"
                )
            left, shown = (
                in_child(lambda: state(os.fsencode(root / names)))  # noqa: B023
                for root in (plain, mount.source)
            )
            try:
                expect_same(shown, left)
            except AssertionError as error:
                error.add_note(
                    f"after stage {number} of user {stage.user}, which did\n" + "\n".join(map(str, got))
                )
                raise

    plan.run(cases, attempt)
    assert mount.process.poll() is None
    assert not [line for line in mount.log.lines if "Traceback" in line], mount.log.lines


def test_the_same_with_and_without_a_mount(
    make_mount: MakeMount, places: Callable[[str], Path], fuzz_plan: Plan
) -> None:
    backing = places("backing")
    backing.chmod(0o755)
    plain = places("plain")
    plain.chmod(0o755)
    attack(plain, make_mount("--allow-other", source=backing), fuzz_plan, CASES)


@pytest.mark.any_engine
@pytest.mark.parametrize("flaw", ["roots-rights", "keeps-set-ids", "umask"])
def test_a_fault_is_found(flaw: str, make_mount: MakeMount, places: Callable[[str], Path]) -> None:
    """A fault that is put into the daemon on purpose (tests/support/flawed.py) is found within the fixed number of cases."""
    backing, plain = places("backing"), places("plain")
    for place in (backing, plain):
        place.chmod(0o755)
    flawed = (sys.executable, "-m", "tests.support.flawed", f"rights-{flaw}")
    mount = make_mount("--allow-other", source=backing, program=flawed)
    with pytest.raises(AssertionError, match="user "):
        attack(plain, mount, fuzzing.flaw_plan(), CASES)
