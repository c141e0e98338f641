"""A hundred thousand files with few descriptors and little memory."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from fusehsm.overlay.overlay import Overlay

FILES = 100_000
A_DIRECTORY = 500
BYTES_A_NODE = 1536
DESCRIPTORS = 1024


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def walk(source: str) -> None:
    """In a process of its own: look everything up, read everything, forget everything."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    tree = Overlay(source)
    # What the first use of everything costs is not the nodes'.
    list(tree.opendir(tree.root).entries(0))
    before = _resident()
    files = 0
    directories = [tree.root]
    for directory in directories:
        stream = tree.opendir(directory)
        for entry in stream.entries(0):
            tree.remember(entry.node)
            if entry.node.is_dir:
                directories.append(entry.node)
            else:
                files += 1
        stream.close()
    assert files == FILES, files
    nodes = tree.node_count
    assert nodes == len(directories) + FILES
    each = (_resident() - before) / nodes
    assert each < BYTES_A_NODE, each
    # Now every file by its node, in an order in which no directory stays open for long.
    known = sorted((node for node in tree.known_nodes() if node.is_regular), key=lambda node: node.name)
    for node in known:
        fd = tree.open(node, os.O_RDONLY)
        assert os.read(fd, 100) == node.name
        os.close(fd)
    grown = (_resident() - before) / nodes
    assert grown < BYTES_A_NODE, grown
    for node in known:
        tree.forget(node, 1)
    for node in reversed(directories[1:]):
        tree.forget(node, 1)
    assert tree.node_count == 1
    tree.close()
    print(f"{each:.0f} bytes a node")


def test_a_hundred_thousand_files() -> None:
    # In memory, so that making them takes no time.
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fusehsm-tests-") as base:
        for number in range(FILES // A_DIRECTORY):
            directory = os.path.join(base, f"directory number {number % 10}", f"{number:06}")
            os.makedirs(directory)
            directory_fd = os.open(directory, os.O_PATH)
            for index in range(A_DIRECTORY):
                name = b"%04d of %06d.dat" % (index, number)
                fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory_fd)
                os.write(fd, name)
                os.close(fd)
            os.close(directory_fd)
        result = subprocess.run(
            [sys.executable, "-c", f"from tests.overlay.test_scale import walk; walk({base!r})"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
