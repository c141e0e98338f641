"""The build of a kernel whose source is stubs, and the disk space of the tree afterwards."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.hsm_place import Stubs, backends, remove, settle
from bench.kernel_build import build_seconds, occupied, source_tree, what_is_built, what_is_missing
from bench.report import Quantity, interleave
from bench.scene import Scene, run, stopwatch
from bench.sizes import Note, Sizes

NATIVE = "native, cold"
WHOLE = "cp -a, then build"
PAGE = 4096  # bytes; a block of ext4


def build_of_stubs(scene: Scene, sizes: Sizes, note: Note, directory: Path) -> Iterator[Quantity]:
    """Measure make tinyconfig and make -j2, with the output outside the tree. Without a kernel source there is nothing to measure."""
    if sizes.kernel_source and what_is_missing():
        return
    note("unpacking the source")
    source = source_tree(directory, sizes)
    stubs = Stubs(scene, str(source), directory / "stubs")
    full = {"the whole tree": [occupied(source)] * sizes.repetitions}
    taken_up: dict[str, list[float]] = {}
    records: dict[str, list[float]] = {}

    def native() -> float:
        settle(scene)
        return build_seconds(scene, source)

    def whole() -> float:
        copy = directory / "copy"
        settle(scene)
        with stopwatch() as taken:
            run("cp", "-a", str(source), str(copy))
        seconds = build_seconds(scene, copy)
        remove(copy)
        return taken[0] + seconds

    def served(case: str, options: tuple[str, ...]) -> float:
        with stubs.served(*options) as path:
            seconds = build_seconds(scene, path)
        taken_up.setdefault(case, []).append(occupied(stubs.path))
        records.setdefault(case, []).append(_beyond_content(stubs.path))
        remove(stubs.path)
        return seconds

    cases: dict[str, Callable[[], float]] = {NATIVE: native, WHOLE: whole}
    for name, options in backends(scene).items():
        cases[f"fetch, {name}"] = partial(served, f"fetch, {name}", options)
    values = interleave(sizes.repetitions, cases, note)
    yield Quantity("k", f"build of {what_is_built(sizes)} from stubs, -j2", "s", values, NATIVE)
    yield Quantity("k", "disk space afterwards", "MiB", {**full, **taken_up}, "the whole tree")
    yield Quantity("k", "of which are blocks of attributes", "MiB", records, "")
    remove(source)


def _beyond_content(tree: Path) -> float:
    """MiB of the filled files' blocks that are not content: an attribute that does not fit into the inode has a block of its own."""
    beyond = 0
    for place, _, names in os.walk(tree):
        for name in names:
            status = os.lstat(os.path.join(place, name))
            beyond += max(status.st_blocks * 512 - -(-status.st_size // PAGE) * PAGE, 0)
    return beyond / (1 << 20)
