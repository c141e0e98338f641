"""`fusehsm validate` of stubs that are filled while it reads: on the real kernel, and on mounts with each engine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import engines, harness
from tests.support.harness import ROOT, Mount, fusehsm
from tests.support.tier.trees import content_of, make_small_tree

MIRROR = "examples.mirror"
TROUBLED = "tests.support.tier.troubled_mirror"
PATIENCE = 20.0  # seconds for a process to be seen


@dataclass
class Tree:
    """`origin` is the store; stubs of it, made by populate, are served by a mirror at `root`. `engine` "": the real kernel."""

    engine: str
    origin: Path
    stubs: Path
    root: Path
    running: ExitStack = field(default_factory=ExitStack)

    def serve(self, module: str) -> None:
        assert fusehsm("populate", self.origin, self.stubs).returncode == 0
        if self.engine:
            variables = {"MIRROR_ORIGIN": str(self.origin), "MIRROR_ROOT": str(self.root)}
            handler = ("--engine", self.engine, "--handler", f"{module}:handler")
            self.running.enter_context(Mount(self.stubs, self.root, *handler, env=variables))
            return
        command = [sys.executable, "-m", module, str(self.origin), str(self.root)]
        listener = harness.start(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        self.running.callback(_end, listener)
        assert listener.stderr is not None
        log = harness.LogReader(listener.stderr)
        log.wait_for(lambda line: line == "ready")

    def validate(self, *options: str) -> tuple[int, Any]:
        """Its exit code and its report."""
        done = fusehsm("validate", self.origin, self.root, "--json", *options)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)


def _end(listener: "subprocess.Popen[str]") -> None:
    listener.send_signal(signal.SIGINT)
    listener.wait(harness.PATIENCE)
    assert listener.stderr is not None
    listener.stderr.close()


@pytest.fixture(params=engines.parameters("kernel"))
def tree(
    request: pytest.FixtureRequest, places: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tree]:
    _, engine = request.param
    request.getfixturevalue("fuse" if engine else "kernel_events")
    stubs = places("validated")
    tree = Tree(engine, places("origin"), stubs, tmp_path_factory.mktemp("root") if engine else stubs)
    try:
        yield tree
    finally:
        tree.running.close()


def by_path(findings: list[Any]) -> dict[str, list[tuple[str, str]]]:
    """Kinds of reads and their errors, sorted, by path."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in findings:
        found.setdefault(finding["path"], []).append((finding["kind"], finding["error"]))
    return {path: sorted(errors) for path, errors in found.items()}


def test_stubs_of_a_tree(tree: Tree) -> None:
    make_small_tree(tree.origin)
    (tree.origin / "large").write_bytes(content_of(1_000_001))
    (tree.origin / "link").symlink_to("large")
    tree.serve(MIRROR)
    code, report = tree.validate("--seed", "1")
    assert (code, report["valid"], report["files"]) == (0, True, 6), report
    assert min(report["reads"].values()) > 20
    # The same seed reads the same; now everything it wants is here.
    again = tree.validate("--seed", "1")[1]
    assert (again["reads"], again["bytes"]) == (report["reads"], report["bytes"])


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(tree: Tree) -> None:
    """A denied file, one that is never answered for, and a reader that is killed."""
    for name in ("denied", "good", "hanging", "last"):
        (tree.origin / name).write_bytes(content_of(10_000))
    tree.serve(TROUBLED)
    words = ["validate", str(tree.origin), str(tree.root), "--json", "--jobs", "1", "--timeout", "1.5"]
    with harness.start([*harness.COMMAND, *words]) as validate:
        os.kill(reader_of(validate.pid, "hanging"), signal.SIGKILL)
        output, complaint = validate.communicate(timeout=harness.PATIENCE)
    report = json.loads(output)
    assert (validate.returncode, complaint, report["valid"], report["files"]) == (1, "", False, 4)
    found = by_path(report["errors"])
    assert found.keys() == {"denied", "hanging"}
    # A kernel asks at mmap(2), and its errno says no; the emulator asks at the page fault, which can only kill.
    fault = "SIGBUS" if tree.engine else "EIO"
    assert set(found["denied"]) >= {("pread", "EIO"), ("mmap", fault)}
    assert {(kind.split()[0], error) for kind, error in found["denied"]} == {
        ("pread", "EIO"),
        ("mmap", fault),
    }
    # The read that it was at when it was killed; then the next one hangs, and the file is given up on.
    assert sorted(error for _, error in found["hanging"]) == ["SIGKILL", "TIMEOUT"]
    assert report["errors_by_name"]["TIMEOUT"] == 1
    assert report["differences"] == []
    # Ctrl-C is heard also while a read hangs, and leaves nobody behind.
    with harness.start([*harness.COMMAND, *words[:-1], "60"]) as validate:
        reader = reader_of(validate.pid, "hanging")
        validate.send_signal(signal.SIGINT)
        assert validate.communicate(timeout=PATIENCE) == ("", "")
        assert validate.returncode == 130
    expect_gone(reader)


def reader_of(pid: int, name: str) -> int:
    """The process below `pid` that has a file of that name open."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for keeper in children(pid):
            for reader in children(keeper):
                if name in open_names(reader):
                    return reader
        time.sleep(0.01)
    raise AssertionError("no reader was seen")


def expect_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, "a reader was left behind"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    # Of all threads: a keeper is the child of the thread that started it.
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        texts = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in tasks]
    except FileNotFoundError:
        return []
    return [int(word) for text in texts for word in text.split()]


def open_names(pid: int) -> set[str]:
    names = set()
    try:
        for link in os.scandir(f"/proc/{pid}/fd"):
            names.add(os.path.basename(os.readlink(link.path)))
    except FileNotFoundError:
        pass
    return names
