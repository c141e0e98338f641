"""What scripts, documents, docstrings and comments name is there: files, modules, tests, workloads, targets of make."""

import ast
import functools
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fusehsm.conform.workloads import WORKLOADS
from tests.support.harness import ROOT

TREES = ("fusehsm", "tests", "docs", "scripts", "bench", "examples")
PACKAGES = ("fusehsm", "tests", "bench", "examples")
LOOSE = ("Makefile", "README.md", "CHANGELOG.md", "pyproject.toml")
PATH = re.compile(rf"(?<![\w/.~$}}-])(?:{'|'.join(TREES)})/[\w./*-]*")
MODULE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"(?<![\w/.*-])(?:[\w-]+/)*[\w*-]+\.(?:py|sh|md)\b")
TEST = re.compile(r"\btest_\w+")
TARGET = re.compile(r"`make ([a-z]\w*)")
WORKLOAD = re.compile(
    rf"(?<![\w/-])(?:{'|'.join({workload.family for workload in WORKLOADS})})/[\w@,*-]+(?<!,)"
)
SETTING = re.compile(r"\bFUSEHSM_\w+")
COMMENT = re.compile(r"(?:^|\s)# (.*)", re.MULTILINE)
# Names that stand for others, files that are made when they are needed, and the recording, which is not read here.
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")
MADE = ("bench/results", "tests/test_inner.py", "fusehsm/conform/recorded/kernel.json")


@functools.cache
def files() -> dict[str, str]:
    """The text of every file of the project, by its path; what is recorded or measured left out, and this one, which names what is not there."""
    found = [path for tree in TREES for path in sorted((ROOT / tree).rglob("*"))]
    found += [ROOT / name for name in LOOSE]
    return {
        str(path.relative_to(ROOT)): path.read_text(errors="replace")
        for path in found
        if path != Path(__file__)
        and path.is_file()
        and path.suffix not in (".pyc", ".json")
        and "__pycache__" not in path.parts
    }


@functools.cache
def directories() -> frozenset[str]:
    return frozenset(str(parent) for name in files() for parent in Path(name).parents)


@functools.cache
def prose_of(name: str) -> str:
    """What people read in a file: of Python the docstrings and comments, of shell the comments, of everything else all."""
    text = files()[name]
    if name.endswith(".py"):
        tree = ast.parse(text)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        return "\n".join((*docstrings, *COMMENT.findall(text)))
    if name.endswith(".sh"):
        return "\n".join(COMMENT.findall(text))
    return text


def is_among(name: str, known: Collection[str]) -> bool:
    """`*` stands for anything."""
    return name in known or ("*" in name and any(fnmatchcase(one, name) for one in known))


def is_there(path: str) -> bool:
    """A file or directory, by its path from the root."""
    path = path.rstrip("/.")
    if path.startswith(MADE) or PLACEHOLDER.search(path):
        return True
    return is_among(path, files().keys() | directories())


def is_module(name: str) -> bool:
    """A module, or what one defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in files():
                return length == len(parts) or re.search(rf"\b{parts[length]}\b", files()[file]) is not None
        if path in directories():
            return length == len(parts)
    return False


def missing(names: Iterator[tuple[str, str]]) -> list[str]:
    return [f"{file}: {name}" for file, name in names]


def test_paths() -> None:
    """From the root, wherever they stand: a list of tests for another kernel is as easily forgotten as a comment."""
    found = ((file, path) for file, text in files().items() for path in PATH.findall(text))
    assert missing((file, path) for file, path in found if not is_there(path)) == []


def test_files_that_are_named_without_their_directory() -> None:
    ours = {Path(name).name for name in files()}
    found = ((file, name) for file in files() for name in FILE.findall(prose_of(file)))
    wrong = (
        (file, name)
        for file, name in found
        if not is_among(Path(name).name, ours) and not PLACEHOLDER.search(name)
    )
    assert missing(wrong) == []


def test_modules() -> None:
    found = ((file, name) for file, text in files().items() for name in MODULE.findall(text))
    wrong = ((file, name) for file, name in found if not is_module(name))
    assert missing(wrong) == []


def test_tests() -> None:
    """In prose, and in the list for old kernels."""
    known = {Path(name).stem for name in files()}
    for name, text in files().items():
        if name.startswith("tests/") and name.endswith(".py"):
            known.update(re.findall(r"def (test_\w+)", text))
    found = ((file, name) for file in files() for name in TEST.findall(prose_of(file)))
    wrong = ((file, name) for file, name in found if not any(one.startswith(name) for one in known))
    assert missing(wrong) == []


def test_workloads() -> None:
    keys = {workload.key for workload in WORKLOADS}
    # A page that tells how to add a workload names one that is not there yet.
    documents = [name for name in files() if name.endswith(".md") and name != "docs/howto-workload.md"]
    found = ((file, name) for file in documents for name in WORKLOAD.findall(files()[file]))
    assert missing((file, name) for file, name in found if not is_among(name, keys)) == []


def test_settings() -> None:
    """What a script sets for the tests is read by them."""
    python = "".join(text for name, text in files().items() if name.endswith(".py"))
    found = (
        (file, name) for file in files() if file.endswith(".sh") for name in SETTING.findall(files()[file])
    )
    assert missing((file, name) for file, name in found if f'"{name}"' not in python) == []


def test_targets_of_make() -> None:
    targets = set(re.findall(r"^(\w+):", files()["Makefile"], re.MULTILINE))
    found = (
        (file, name) for file in files() if file.endswith(".md") for name in TARGET.findall(files()[file])
    )
    assert missing((file, name) for file, name in found if name not in targets) == []


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("tests/test_readme.py", True),
        ("tests/test_read*.py", True),
        ("fusehsm/engines/", True),
        ("bench/results/DATE.json", True),
        ("tests/test_what_was_here.py", False),
    ],
)
def test_a_path_that_is_gone_is_found(name: str, there: bool) -> None:
    assert is_there(name) is there


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("fusehsm.linux.mountinfo", True),
        ("fusehsm.linux.mountinfo.read_mounts", True),
        ("fusehsm.engines", True),
        ("fusehsm.linux.mountinfo.nothing_of_that_name", False),
        ("fusehsm.nothing_of_that_name", False),
    ],
)
def test_a_module_that_is_gone_is_found(name: str, there: bool) -> None:
    assert is_module(name) is there
