"""(i) A very large tree, served with few descriptors."""

import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.report import Quantity, interleave
from bench.scene import HANDLER, Scene, Stage, resident_bytes, run, stopwatch
from bench.sizes import Note, Sizes

NATIVE = "native"
OURS = "fusehsm, 1,024 descriptors"
IN_ONE_DIRECTORY = 200
FEW = ("bash", "-c", 'ulimit -n 1024 && exec "$@"', "bash")
OPTIONS = ("--engine", "devfuse", "--events", "first-access", "--cache", "private", "--handler", HANDLER)
FIND = ("find", ".", "-type", "f", "-size", "+1k")


def large_tree(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(i) Measure find(1) in the tree, cold (on a new mount each time) and warm, and the server's memory for a node."""
    directory = scene.files / "i"
    directory.mkdir()
    directories = sizes.large_tree // IN_ONE_DIRECTORY
    note(f"making {sizes.large_tree:,} files")
    with multiprocessing.Pool() as pool:
        pool.map(partial(_make, directory), range(directories), chunksize=16)
    nodes = sizes.large_tree + directories
    warm: dict[str, list[float]] = {NATIVE: [], OURS: []}
    a_node: list[float] = []

    def seconds(root: Path) -> float:
        with stopwatch() as taken:
            run(*FIND, directory=root)
        return taken[0]

    def natively() -> float:
        if scene.is_root:
            scene.drop_caches()
        cold = seconds(directory)
        warm[NATIVE].append(seconds(directory))
        return cold

    def mounted() -> float:
        if scene.is_root:
            scene.drop_caches()
        with Stage(scene) as stage:
            point, pid = stage.mount(directory, *OPTIONS, prefix=FEW)
            before = resident_bytes(pid)
            cold = seconds(point)
            a_node.append((resident_bytes(pid) - before) / nodes)
            warm[OURS].append(seconds(point))
        return cold

    cold = interleave(sizes.repetitions, {NATIVE: natively, OURS: mounted}, note)
    name = f"find in {sizes.large_tree:,} files"
    yield Quantity("i", f"{name}, cold", "s", cold, NATIVE)
    yield Quantity("i", f"{name}, warm", "s", warm, NATIVE)
    yield Quantity("i", f"memory a node, {nodes:,} nodes", "bytes", {OURS: a_node}, "", limits={OURS: 1024})


def _make(directory: Path, number: int) -> None:
    place = directory / f"d{number // 1000}" / f"d{number}"
    place.mkdir(parents=True, exist_ok=True)
    for name in range(IN_ONE_DIRECTORY):
        os.mknod(place / f"f{name}")
