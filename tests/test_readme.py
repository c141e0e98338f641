"""The README is true: its handler and its session do what it shows, and it names only commands that are there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import harness, leftovers
from tests.harness import PATIENCE, ROOT, LogReader, fusehsm, unmount_lazily

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def program_in(directory: Path, tree: Path) -> Path:
    """The handler that the README shows, for another tree."""
    (program,) = blocks("python")
    script = directory / "handler.py"
    script.write_text(program.replace("/tmp/tree", str(tree)))
    return script


@pytest.fixture
def tree(fuse: None, backing: Path) -> Iterator[Path]:
    """A directory to mount on itself, unmounted whatever happened."""
    yield backing
    for pid in harness.own_processes():
        if str(backing) in leftovers.command_line(pid).split():
            leftovers.kill(pid)
    unmount_lazily(backing)


@pytest.mark.fuse
def test_the_handler_and_its_output(tree: Path, tmp_path: Path) -> None:
    (session,) = [block for block in blocks("") if block.startswith("$ ")]
    commands = [
        line[2:].replace("/tmp/tree", str(tree)) for line in session.splitlines() if line.startswith("$ ")
    ]
    printed = [
        line.replace("/tmp/tree", str(tree)) for line in session.splitlines() if not line.startswith("$ ")
    ]
    _mkdir, truncate, mount, python, head, _kill, umount = [command.split() for command in commands]
    subprocess.run(truncate, check=True)
    assert fusehsm(*mount[1:]).returncode == 0
    handler = harness.start([sys.executable, str(program_in(tmp_path, tree))], cwd=tmp_path)
    assert python == ["python", "handler.py", "&"]
    assert handler.stdout is not None
    assert handler.stderr is not None
    try:
        output, complaints = LogReader(handler.stdout), LogReader(handler.stderr)
        output.wait_for(lambda line: line == "listening")
        shown = subprocess.run(head, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        handler.terminate()
        handler.wait(PATIENCE)
        assert [*output.wait_for_end(), *shown.splitlines()] == printed
        assert complaints.wait_for_end() == []
        assert fusehsm(*umount[1:]).returncode == 0
    finally:
        handler.kill()
        handler.wait()
        handler.stdout.close()
        handler.stderr.close()
    # What was fetched is in the backing.
    assert (tree / "hello").read_text() == printed[-1] + "\n"


@pytest.mark.fuse
def test_the_handler_inside_the_mounts_own_process(tree: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"`(fusehsm mount .* --handler .*?)`", README)
    program_in(tmp_path, tree)
    (tree / "hello").touch()
    os.truncate(tree / "hello", 24)
    assert fusehsm(*command.replace("/tmp/tree", str(tree)).split()[1:], cwd=tmp_path).returncode == 0
    assert (
        subprocess.run(
            ["cat", tree / "hello"], capture_output=True, text=True, timeout=PATIENCE, check=True
        ).stdout
        == "fetched when you looked\n"
    )
    assert fusehsm("umount", tree).returncode == 0


def test_the_handler_has_about_twenty_lines() -> None:
    (program,) = blocks("python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 20


def test_it_names_the_commands_that_are_there() -> None:
    named = set(re.findall(r"^\| `fusehsm (\w+)", README, re.MULTILINE))
    described = fusehsm("--help").stdout
    assert named == {"mount", "umount", "trace", "status", "conform", "doctor"}
    assert all(re.search(rf"\b{name}\b", described) for name in named)
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
