"""The list of divergences: each is shown by a test, docs/divergences.md tells of all, the README of the most important ones."""

import ast
from pathlib import Path

import pytest

from fusehsm.conform.divergences import DIVERGENCES, Divergence, Topic, markdown_page, markdown_summary
from tests.support.harness import ROOT


def test_every_entry_names_a_test_of_this_directory() -> None:
    tests = {
        node.name
        for file in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.AsyncFunctionDef)
    }
    assert {entry.test for entry in DIVERGENCES} <= tests
    assert len({entry.name for entry in DIVERGENCES}) == len(DIVERGENCES)


def test_the_page_has_all_of_them() -> None:
    page = (ROOT / "docs/divergences.md").read_text()
    assert page == markdown_page(), "python -m fusehsm.conform.divergences > docs/divergences.md"
    assert all(f"\n| {entry.name} | " in page for entry in DIVERGENCES)


def test_the_readme_has_the_most_important_ones() -> None:
    readme = (ROOT / "README.md").read_text()
    assert markdown_summary() in readme, "python -m fusehsm.conform.divergences --summary"


@pytest.mark.parametrize("entry", DIVERGENCES, ids=lambda entry: entry.name)
def test_each_cell_is_one_sentence(entry: Divergence) -> None:
    for cell in (entry.difference, entry.reason, entry.safe):
        assert cell.endswith(".")
        assert ". " not in cell
        assert ";" not in cell
        assert "|" not in cell


def test_the_topics_come_in_order() -> None:
    order = list(Topic)
    topics = [order.index(entry.topic) for entry in DIVERGENCES]
    assert topics == sorted(topics)
    assert set(topics) == set(range(len(order)))
