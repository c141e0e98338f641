"""Any tree, populated from a local directory, is the same tree with stubs for files, and a second run leaves it alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from fusehsm.tier.populate.create import Outcome
from tests.support.tier.populated import plant
from tests.support.tier.trees import changes_since, describe, expect_stubs

pytestmark = pytest.mark.any_engine


@dataclass(frozen=True)
class File:
    """`data`: (offset, length) of what is no hole."""

    size: int
    data: tuple[tuple[int, int], ...]
    mode: int
    owner: tuple[int, int]
    mtime_ns: int


@dataclass(frozen=True)
class Link:
    target: bytes


@dataclass(frozen=True)
class Twin:
    """Another name for one of the files so far."""

    of: int


@dataclass(frozen=True)
class Directory:
    mode: int
    mtime_ns: int
    entries: dict[bytes, object]


names = st.binary(min_size=1, max_size=12).filter(
    lambda name: not set(name) & {0, ord("/")} and name not in (b".", b"..")
)
times = st.integers(-(1 << 30) * 10**9, (1 << 32) * 10**9)
files = st.builds(
    File,
    st.integers(0, 1 << 22),
    st.lists(st.tuples(st.integers(0, 1 << 22), st.integers(1, 10_000)), max_size=3).map(tuple),
    st.integers(0, 0o7777),
    st.tuples(st.sampled_from((0, 1, 65534, 4_000_000)), st.sampled_from((0, 7, 65534))),
    times,
)
links = st.builds(Link, st.binary(min_size=1, max_size=40).filter(lambda target: 0 not in target))
twins = st.builds(Twin, st.integers(0, 1 << 16))
trees = st.recursive(
    st.one_of(files, links, twins),
    lambda below: st.builds(
        Directory, st.integers(0, 0o7777), times, st.dictionaries(names, below, max_size=5)
    ),
    max_leaves=25,
)


def make(path: bytes, item: object, made: list[bytes]) -> None:
    match item:
        case File():
            with open(path, "xb") as file:
                file.truncate(item.size)
                for offset, length in item.data:
                    file.seek(offset)
                    file.write(b"x" * max(0, min(length, item.size - offset)))
            os.chown(path, *item.owner)
            os.chmod(path, item.mode)
            os.utime(path, ns=(0, item.mtime_ns))
            made.append(path)
        case Link():
            os.symlink(item.target, path)
            os.utime(path, ns=(0, 123456789), follow_symlinks=False)
        case Twin():
            if made:
                os.link(made[item.of % len(made)], path)
        case Directory():
            os.mkdir(path)
            for name, below in item.entries.items():
                make(path + b"/" + name, below, made)
            os.chmod(path, item.mode)
            os.utime(path, ns=(0, item.mtime_ns))


@pytest.mark.root
@given(st.dictionaries(names, trees, max_size=6))
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_tree(places: Callable[[str], Path], tree: dict[bytes, object]) -> None:
    store, target = places("any-store"), places("any")
    made: list[bytes] = []
    for name, item in tree.items():
        make(os.fsencode(store) + b"/" + name, item, made)
    outcomes, complaints = plant(store, target)
    assert complaints == []
    assert set(outcomes.values()) <= {Outcome.NEW}
    assert describe(target) == describe(store)
    expect_stubs(target)
    before = changes_since(target)
    outcomes, complaints = plant(store, target)
    assert (set(outcomes.values()) <= {Outcome.RIGHT}, complaints) == (True, [])
    assert changes_since(target) == before
