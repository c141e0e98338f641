"""The list of divergences: each is shown by a test, and the README tells of all."""

import ast
from pathlib import Path

from fusehsm.conform.divergences import DIVERGENCES, markdown_table
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


def test_the_readme_has_the_whole_table() -> None:
    assert markdown_table() in (ROOT / "README.md").read_text()
