"""The documentation leads nowhere that does not exist: links, sections, and the functions that docs/architecture.md names."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.harness import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# A walk's row: a room, functions of it, and what happens there.
STEP = re.compile(r"^\| `([\w/]+(?:/|\.py))` \| (`[^|]+) \| [^|]+ \|$", re.MULTILINE)


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """What `#...` may follow the page's name in a link: its headings, as code forges make anchors of them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    """Those to places in this repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


def test_the_index_has_every_page() -> None:
    listed = {target.partition("#")[0] for target in links(ROOT / "docs/index.md")}
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"} <= listed


@cache
def functions_of(room: str) -> set[str]:
    """`function` and `Class.method` of a folder or a module of fusehsm/. Leading underscores do not count: who may call what may change."""
    place = ROOT / "fusehsm" / room
    names: set[str] = set()
    for module in sorted(place.glob("*.py")) if place.is_dir() else [place]:
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name.lstrip("_"))
            if isinstance(node, ast.ClassDef):
                methods = (
                    each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                )
                names.update(
                    name
                    for each in methods
                    for name in (f"{node.name.lstrip('_')}.{each.name}", each.name.lstrip("_"))
                )
    return names


def test_the_walks_through_the_architecture_name_functions_that_are_there() -> None:
    steps = STEP.findall((ROOT / "docs/architecture.md").read_text())
    assert len(steps) > 30
    missing = [
        f"{room}: {name}"
        for room, cell in steps
        for name in re.findall(r"`([\w.]+)`", cell)
        if name.lstrip("_") not in functions_of(room)
    ]
    assert not missing


def test_cited_facts_have_a_section() -> None:
    sections = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs/facts.md").read_text(), re.MULTILINE))
    assert sections == {str(number) for number in range(1, len(sections) + 1)}
    sources = [*ROOT.glob("fusehsm/**/*.py"), *ROOT.glob("tests/**/*.py"), *PAGES]
    for source in sources:
        for cited in re.findall(r"facts\.md\)?, sections? ([\d, and]+)", source.read_text()):
            assert set(re.findall(r"\d+", cited)) <= sections, f"{source}: section {cited}"
