"""Fuzzing archives: whoever made one, populate ends with 0 or 1, within bounds, and neither it nor the store's content leaves DST or the archive."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import fuzzing, harness
from tests.support.fuzzing import PATIENCE, Case, Plan
from tests.support.tier import archive_fuzz
from tests.support.tier.fetching import fetching, run
from tests.support.tier.trees import files_of

pytestmark = [pytest.mark.root, pytest.mark.fuzz]

CASES = 200
FETCHED = 100  # every so many cases, what was populated is fetched, too


class Forks:
    """A process that tries archives (tests/support/tier/archive_fuzz.py)."""

    def __init__(self, *flaw: str) -> None:
        self._process = harness.start(
            [sys.executable, "-m", "tests.support.tier.archive_fuzz", *flaw],
            stdin=subprocess.PIPE,
            stderr=None,
        )

    def attempt(self, archive: Path, target: Path, log: Path) -> int:
        """The exit code. AssertionError if it does not end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            json.dumps([str(archive), str(target), str(log), archive_fuzz.MEMORY]) + "\n"
        )
        self._process.stdin.flush()
        impatience = threading.Timer(2 * PATIENCE, self._process.kill)
        impatience.start()
        answer = self._process.stdout.readline()
        impatience.cancel()
        assert answer, "it does not end"
        return int(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)


def attack(place: Path, plan: Plan, cases: int, *flaw: str) -> None:
    """Try the cases. DST of each is place/inside/DST, and nothing else below `place` may change."""
    outside = place / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"not yours")
    before = fuzzing.described(outside)
    work = place / "work"
    work.mkdir()
    forks = Forks(*flaw)

    def attempt(case: Case) -> None:
        ending, data = archive_fuzz.make(case.random)
        archive, log = work / f"archive.{ending}", work / "log"
        archive.write_bytes(data)
        target = place / "DST"
        target.mkdir()
        code = forks.attempt(archive, target, log)
        words = log.read_text(errors="replace")
        story = f"exit code {code}: {words[-3000:]}"
        assert code in (0, 1), story
        assert "Traceback" not in words, story
        assert "\x1b" not in words, story
        assert fuzzing.described(outside) == before, f"something outside DST has changed: {story}"
        assert sorted(path.name for path in place.iterdir()) == ["DST", "outside", "work"], story
        if case.number % FETCHED == FETCHED - 1 and code == 0:
            fetch_all(archive, target)
        run("chmod", "-R", "u+rwx", target)
        shutil.rmtree(target)

    try:
        plan.run(cases, attempt)
    finally:
        forks.close()


def fetch_all(archive: Path, target: Path) -> None:
    """Every stub reads as the archive has it, or not at all."""
    with fetching(archive_fuzz.url_of(archive), target, "--deadline", "1s") as serving:
        for path in [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]:
            done = run("cat", path)
            assert done.returncode in (0, 1)
        _, said = serving.end()
    assert "Traceback" not in said
    assert files_of(target) is not None


def test_odd_and_damaged_archives(places: Callable[[str], Path], fuzz_plan: Plan) -> None:
    attack(places("archives"), fuzz_plan, CASES)


FLAWS = {"strange-names": "AssertionError", "any-content": "exit code 77"}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_fault_is_found(flaw: str, places: Callable[[str], Path]) -> None:
    """A fault that is put into populate on purpose (tests/support/flawed.py) is found within the fixed number of cases."""
    with pytest.raises(AssertionError, match=FLAWS[flaw]):
        attack(places("archives"), fuzzing.flaw_plan(), CASES, f"archive-{flaw}")
