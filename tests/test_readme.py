"""The README is true: its handler and its sessions do what it shows. docs/commands.md names the commands that are there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.cli import app
from fusehsm.linux.mountinfo import read_mounts
from tests.support import harness, leftovers
from tests.support.harness import PATIENCE, ROOT, LogReader, fusehsm, unmount_lazily
from tests.support.listener_steps import NOTE

README = (ROOT / "README.md").read_text()


def elsewhere(text: str, tree: Path) -> str:
    """What the README says of any of its directories, for `tree`."""
    return re.sub(r"/tmp/(tree|data|made)\b", str(tree), text)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def program_in(directory: Path, tree: Path) -> Path:
    """The handler that the README shows, for another tree."""
    (program,) = blocks("python")
    script = directory / "handler.py"
    script.write_text(elsewhere(program, tree))
    return script


@pytest.fixture
def tree(fuse: None, backing: Path) -> Iterator[Path]:
    """A directory to mount on itself, unmounted whatever happened."""
    yield backing
    for pid in harness.own_processes():
        if str(backing) in leftovers.command_line(pid).split():
            leftovers.kill(pid)
    unmount_lazily(backing)


class Session:
    """What the README shows of a terminal, for another tree: the commands (as words) and what they print."""

    def __init__(self, tree: Path, first: str) -> None:
        (text,) = [block for block in blocks("") if block.startswith(f"$ {first}")]
        lines = elsewhere(text, tree).splitlines()
        self.commands = [line[2:].split() for line in lines if line.startswith("$ ")]
        self.printed = [line for line in lines if not line.startswith("$ ")]


def listen_and_look(listener: "subprocess.Popen[str]", look: list[str]) -> list[str]:
    """What a listener and a command print that is run once it listens; the listener is ended as by `kill`."""
    assert listener.stdout is not None
    assert listener.stderr is not None
    try:
        output, complaints = LogReader(listener.stdout), LogReader(listener.stderr)
        output.wait_for(lambda line: line == "listening")
        shown = subprocess.run(look, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        listener.terminate()
        listener.wait(PATIENCE)
        assert [line for line in complaints.wait_for_end() if NOTE not in line] == []
        return [*output.wait_for_end(), *shown.splitlines()]
    finally:
        listener.kill()
        listener.wait()
        listener.stdout.close()
        listener.stderr.close()


@pytest.mark.fuse
def test_the_handler_and_its_output(tree: Path, tmp_path: Path) -> None:
    session = Session(tree, "mkdir /tmp/made")
    _mkdir, truncate, mount, python, head, _kill, umount = session.commands
    subprocess.run(truncate, check=True)
    assert fusehsm(*mount[1:]).returncode == 0
    handler = harness.start([sys.executable, str(program_in(tmp_path, tree))], cwd=tmp_path)
    assert python == ["python", "handler.py", "&"]
    assert listen_and_look(handler, head) == session.printed
    assert fusehsm(*umount[1:]).returncode == 0
    # What was fetched is in the backing.
    assert (tree / "hello").read_text() == session.printed[-1] + "\n"


@pytest.mark.fuse
def test_a_program_in_c_and_its_output(tree: Path, tmp_path: Path) -> None:
    session = Session(tree, "gcc")
    gcc, _mkdir, truncate, run, head, _kill = session.commands
    program = str(tmp_path / "hsmd")
    subprocess.run([program if word == "/tmp/hsmd" else word for word in gcc], check=True, cwd=ROOT)
    subprocess.run(truncate, check=True)
    command = [program if word == "/tmp/hsmd" else word for word in run[1:-1]]
    assert listen_and_look(harness.start([*harness.COMMAND, *command]), head) == session.printed
    assert not any(mount.mount_point == str(tree) for mount in read_mounts())
    assert (tree / "hello").read_text() == session.printed[-1] + "\n"


@pytest.mark.fuse
def test_a_store_that_is_fetched_from(tree: Path, tmp_path: Path) -> None:
    (text,) = [block for block in blocks("") if "$ fusehsm fetch" in block]
    text = elsewhere(text, tree).replace("/tmp/store", str(tmp_path / "store"))
    make, populate, fetch, look, evict, _kill = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    subprocess.run(["sh", "-c", make], check=True)
    printed = fusehsm(*populate.split()[1:]).stdout
    # The emulator, also where the kernel could.
    fetcher = harness.start([*harness.COMMAND, *fetch.split()[1:-1], "--backend", "fuse"])
    assert fetcher.stderr is not None
    assert fetcher.stdout is not None
    try:
        complaints = LogReader(fetcher.stderr)
        complaints.wait_for(lambda line: line == "ready")
        for command in (look, evict):
            done = subprocess.run(
                [*harness.COMMAND, *command.split()[1:]]
                if command.startswith("fusehsm")
                else command.split(),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=True,
            )
            printed += done.stdout
        fetcher.terminate()
        fetcher.wait(PATIENCE)
        said = complaints.wait_for_end()
    finally:
        fetcher.kill()
        fetcher.wait()
        fetcher.stdout.close()
        fetcher.stderr.close()
    shown = [line for line in text.splitlines() if not line.startswith("$ ")]

    def comparable(lines: list[str]) -> list[str]:
        """Times differ, and what a file takes on the disk, with its attributes, is the file system's affair."""
        return sorted(re.sub(r"[\d.]+ s \([\d,]+ a second\)|[\d.]+ kB freed", "", line) for line in lines)

    assert comparable([*printed.splitlines(), *said]) == comparable(shown)


@pytest.mark.fuse
def test_the_handler_inside_the_mounts_own_process(tree: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"`(fusehsm mount .* --handler .*?)`", README)
    program_in(tmp_path, tree)
    (tree / "hello").touch()
    os.truncate(tree / "hello", 24)
    assert fusehsm(*elsewhere(command, tree).split()[1:], cwd=tmp_path).returncode == 0
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


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_each_command_has_a_row() -> None:
    page = (ROOT / "docs/commands.md").read_text()
    named = re.findall(r"^\| `fusehsm (\w+)", page, re.MULTILINE)
    there = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    assert sorted(named) == sorted(there)


def test_it_names_make_targets_that_are_there() -> None:
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
