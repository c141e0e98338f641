"""Which engine a test's mounts get: each test that mounts runs once for each engine, unless it says that they do not matter to it.

A test's ids tell its engine. `pytest --engine NAME` runs the tests of one engine only (and all that have none).

A test that has nothing to do with engines has the mark `any_engine`, and takes the one that `auto` is; a module of one
engine's tests has `pytestmark = pytest.mark.engine(NAME)`. What is known to differ is an entry of
fusehsm/conform/divergences.py with the engines that have it; tests ask `diverges(NAME, ENGINE)` what to expect.
"""

from collections.abc import Iterable

import pytest
from _pytest.mark.structures import ParameterSet

from fusehsm.conform.divergences import ENGINES, applying

_MARKS = {"kernel": pytest.mark.kernel}


def parameters(*without: str, words: Iterable[str] = ("",)) -> list[ParameterSet]:
    """Parameters of a fixture: those without an engine, then each word for each engine, as (word, engine); `word` alone is the id of the
    first, `engine-word` of the others."""
    return [
        *(pytest.param((word, ""), id=word, marks=_MARKS.get(word, ())) for word in without),
        *(
            pytest.param(
                (word, engine),
                marks=[pytest.mark.engine(engine), pytest.mark.fuse],
                id=f"{engine}-{word}" if word else engine,
            )
            for engine in ENGINES
            for word in words
        ),
    ]


def diverges(name: str, engine: str) -> bool:
    """Whether the divergence of that name is that engine's; the real kernel ("") has none."""
    return bool(engine) and applying(name, engine)


def of(request: pytest.FixtureRequest) -> str:
    """The engine of the tests for which a fixture is made, as `--engine` of the command has it."""
    mark = request.node.get_closest_marker("engine")
    chosen = getattr(request, "param", None) or (mark.args[0] if mark else None)
    return chosen or request.config.getoption("--engine") or "auto"


# What conftest.py hands to pytest


def add_option(parser: pytest.Parser) -> None:
    """--engine NAME."""
    parser.addoption(
        "--engine",
        choices=ENGINES,
        help="run only this engine's tests, and those that have nothing to do with engines",
    )


def generate(metafunc: pytest.Metafunc) -> None:
    """Run a test that mounts for each engine."""
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if "engine" in metafunc.fixturenames and not marks & {"any_engine", "engine"}:
        values = [pytest.param(name, marks=pytest.mark.engine(name)) for name in ENGINES]
        metafunc.parametrize("engine", values, indirect=True, scope="module")


def modify_items(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out other engines' tests."""
    wanted = config.getoption("--engine")
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        mark = item.get_closest_marker("engine")
        engine = mark.args[0] if mark else ""
        (left_out if wanted and engine and engine != wanted else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
