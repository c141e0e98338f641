"""Fuzzing stores' answers: a server that lies never makes other content than the store's, nor an error that nobody expects."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fusehsm.tier.stores.base import Kind, Store, StoreError
from fusehsm.tier.stores.http import HttpStore
from fusehsm.tier.stores.open import open_store
from tests.support import flawed, fuzzing
from tests.support.fuzzing import Case, Plan
from tests.support.tier.lying_server import BUCKET, FILES, LIES, Liar, lying_server

pytestmark = pytest.mark.fuzz

CASES = {"http": 2000, "s3": 40}  # s3's client tries again, with pauses


@pytest.fixture
def liar() -> Iterator[Liar]:
    with lying_server() as liar:
        yield liar


@pytest.fixture(params=list(CASES))
def kind(request: pytest.FixtureRequest, liar: Liar, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    for key, value in {
        "AWS_ENDPOINT_URL": liar.url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(key, value)
    return name


def attack(kind: str, liar: Liar, plan: Plan, cases: int) -> None:
    """Try the cases: each has lies of its own, and a list or a read that is told them."""
    url = f"{liar.url}/" if kind == "http" else f"s3://{BUCKET}"
    with ExitStack() as stack:
        store = stack.enter_context(open_store(url))
        versions = {entry.path: entry.version for entry in store.tree() if entry.kind is Kind.FILE}
        assert set(versions) == set(FILES), "the server is honest at first"

        def attempt(case: Case) -> None:
            choose = case.random
            liar.lies, liar.choose = choose.choices(LIES, k=choose.choice((1, 1, 2))), choose
            liar.left, liar.said = choose.choice((1, 2, 100)), []
            try:
                if choose.random() < 0.3:
                    look(store)
                else:
                    path = choose.choice(list(FILES))
                    read(
                        store,
                        path,
                        str(versions[path]),
                        choose.randrange(60_000),
                        choose.choice((1, 4096, 100_000)),
                    )
            except BaseException as error:
                error.add_note("the server said: " + "\n".join(liar.said[-10:]))
                raise
            finally:
                liar.left = 0

        plan.run(cases, attempt)


def look(store: Store) -> None:
    """A list is complete or has complaints, and no number in it is odd."""
    complaints: list[StoreError] = []
    try:
        for entry in store.tree(complaints.append):
            assert entry.size is None or entry.size >= 0
    except OSError:
        pass


def read(store: Store, path: str, version: str, offset: int, length: int) -> None:
    """What is read is what the store has, in full, or an error."""
    truth = FILES[path]
    length = max(0, min(length, len(truth) - offset))
    try:
        got = dict(store.content(path, offset, length, version)) if length else {}
    except OSError:
        return
    end = offset
    for start in sorted(got):
        assert start == end or not truth[end:start].strip(b"\0"), "a piece is missing"
        same = got[start] == truth[start : start + len(got[start])]
        assert same, f"other bytes than the store's in {path}"
        end = start + len(got[start])
    assert end == offset + length, "less than was asked for, and no error"


def test_a_server_that_lies(kind: str, liar: Liar, fuzz_plan: Plan) -> None:
    attack(kind, liar, fuzz_plan, CASES[kind])


@pytest.mark.parametrize("flaw", ["lengths"])
def test_a_fault_is_found(flaw: str, liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is left out on purpose (tests/support/flawed.py) is found within the fixed number of cases."""
    monkeypatch.setattr(HttpStore, "_body", HttpStore._body)  # so that it comes back
    flawed.FLAWS[f"http-{flaw}"]()
    with pytest.raises(AssertionError):
        attack("http", liar, fuzzing.flaw_plan(), CASES["http"])
