"""The first five parts of the benchmark. Each yields its results."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.report import Quantity, Target, interleave
from bench.scene import (
    HANDLER,
    Scene,
    Stage,
    make_file,
    make_tree,
    placed_on,
    resident_bytes,
    run,
    stopwatch,
)
from bench.sizes import Note, Sizes

NATIVE = "native"
OURS = "fusehsm"
OURS_SHARED = "fusehsm --cache shared"
BINDFS = "bindfs"
KERNEL = "kernel, Python handler"
IN_PROCESS = "fusehsm, in-process"
IN_PROCESS_PYFUSE3 = "fusehsm --engine pyfuse3, in-process"
SOCKET = "fusehsm, over the socket"
ROUND_TRIP_TARGETS = (Target(IN_PROCESS, KERNEL, at_most=1.3), Target(SOCKET, KERNEL, at_most=2.5))
PIECE = 128 << 10  # bytes of each read(2) of the sequential reader, as in cat and cp


def event_round_trip(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(a) Measure one pread of 4 KiB that makes one event.

    It is measured twice: on any core, as in real use, where waking an idle core is most of the cost; and with all processes on one core,
    where the work itself is the cost.
    """
    directory = scene.files / "a"
    files = {name: make_file(directory / name / "file", 16 << 20) for name in ("c", "python", "emulated")}
    for placement, cores in (("any core", None), ("one core", {min(os.sched_getaffinity(0))})):
        with placed_on(cores), Stage(scene) as stage:
            measure = partial(pread_microseconds, scene, sizes.preads)
            cases = {case: partial(measure, path) for case, path in event_makers(scene, stage, files)}
            values = interleave(sizes.repetitions, cases, note)
        yield Quantity(
            "a", f"pread of 4 KiB, one event, {placement}", "µs", values, KERNEL, ROUND_TRIP_TARGETS
        )


def pread_microseconds(scene: Scene, count: int, path: Path) -> float:
    """The microseconds for one pread of 4 KiB, the average of `count`."""
    return scene.measure(scene.work, "pread", str(path), str(count), "4096").microseconds


def event_makers(scene: Scene, stage: Stage, files: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """All sources of events, with the file to read at each."""
    if scene.has_kernel:
        stage.listen_in_c(files["c"])
        yield "kernel, C listener", files["c"]
        stage.listen(files["python"].parent, "kernel")
        yield KERNEL, files["python"]
    source = files["emulated"].parent
    exact = ("--events", "exact", "--handler", HANDLER)
    yield IN_PROCESS, stage.mount(source, "--engine", "devfuse", *exact)[0] / "file"
    yield IN_PROCESS_PYFUSE3, stage.mount(source, "--engine", "pyfuse3", *exact)[0] / "file"
    point, _ = stage.mount(source, "--engine", "devfuse", "--events", "exact")
    stage.listen(point, "fuse")
    yield SOCKET, point / "file"
    if scene.has_bindfs:
        yield "bindfs -o direct_io, no events", stage.bindfs(source, "-o", "direct_io")[0] / "file"
    yield "native, no events", files["emulated"]


def unwatched_files(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(b) Measure stat, and open+read+close, of files that are not watched, with warm caches."""
    directory = scene.files / "b"
    paths = make_tree(directory, sizes.unwatched_files, in_one_directory=100, size=4096)
    listing = scene.work / "unwatched"
    listing.write_text("".join(f"{path}\n" for path in paths), encoding="ascii")
    with Stage(scene) as stage:
        roots = {NATIVE: directory, **overlays(scene, stage, directory)}
        for action, name in (("stat", "stat, warm"), ("open", "open+read+close, warm")):

            def once(root: Path, action: str = action) -> float:
                scene.measure(root, action, str(listing))  # warms the caches, and is not counted
                return scene.measure(root, action, str(listing)).microseconds

            cases = {case: partial(once, root) for case, root in roots.items()}
            values = interleave(sizes.repetitions, cases, note)
            if action == "stat":
                targets: Sequence[Target] = (Target(OURS, NATIVE, at_most=1.5),)
            else:
                targets = (Target(OURS, BINDFS, at_most=1.0),)
            yield Quantity("b", f"{name}, {len(paths):,} files", "µs", values, NATIVE, targets)


def sequential_read(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(c) Measure reads of one large file from beginning to end."""
    directory = scene.files / "c"
    make_file(directory / "plain" / "file", sizes.sequential_bytes)
    watched = ("exact", "first-access")
    with Stage(scene) as stage:
        source = directory / "plain"
        roots = {NATIVE: source, f"{OURS}, unwatched": stage.mount(source, "--cache", "private")[0]}
        for mode in watched:
            options = ("--cache", "private", "--events", mode, "--handler", HANDLER)
            roots[f"{OURS}, watched, {mode}"] = stage.mount(source, *options)[0]
        if scene.has_bindfs:
            roots[BINDFS] = stage.bindfs(source)[0]
        if scene.has_kernel:
            kernel_root = directory / "kernel"
            make_file(kernel_root / "file", sizes.sequential_bytes)
            stage.listen(kernel_root, "kernel")
            roots["kernel, watched, Python handler"] = kernel_root

        def read(root: Path) -> float:
            return scene.measure(root, "read", "file", str(PIECE)).mebibytes_per_second

        cold, warm = cold_and_warm(scene, sizes.repetitions, roots, read, note, discarded=1)
        name = f"sequential read of {sizes.sequential_bytes >> 20:,} MiB"
        targets = (Target(f"{OURS}, unwatched", NATIVE, at_least=0.9),)
        yield Quantity("c", f"{name}, warm", "MiB/s", warm, NATIVE, targets)
        if cold:
            yield Quantity("c", f"{name}, cold", "MiB/s", cold, NATIVE)


def listing(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(d) Measure ls -lR of a large tree."""
    directory = scene.files / "d"
    make_tree(directory, sizes.listed_files, in_one_directory=100, size=1)
    with Stage(scene) as stage:
        roots = {NATIVE: directory, **overlays(scene, stage, directory)}

        def seconds(root: Path) -> float:
            with stopwatch() as taken:
                run("ls", "-lR", directory=root)
            return taken[0]

        cold, warm = cold_and_warm(scene, sizes.repetitions, roots, seconds, note)
        name = f"ls -lR of {sizes.listed_files:,} files"
        if cold:
            yield Quantity("d", f"{name}, cold", "s", cold, NATIVE)
        yield Quantity("d", f"{name}, warm", "s", warm, NATIVE)


def memory(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(e) Measure the server's memory for a node: its resident memory before and after a walk, on a new mount each time."""
    directory = scene.files / "e"
    make_tree(directory, sizes.walked_files, in_one_directory=100, size=1)
    nodes = sizes.walked_files + (sizes.walked_files + 99) // 100

    def a_node(name: str) -> float:
        with Stage(scene) as stage:
            point, pid = (
                stage.mount(directory, "--cache", "private") if name == OURS else stage.bindfs(directory)
            )
            run("ls", str(point))
            before = resident_bytes(pid)
            run("find", ".", "-type", "f", "-size", "+1k", directory=point)
            return (resident_bytes(pid) - before) / nodes

    names = [OURS, *([BINDFS] if scene.has_bindfs else [])]
    cases = {name: partial(a_node, name) for name in names}
    values = interleave(sizes.repetitions, cases, note)
    yield Quantity("e", f"memory a node, {nodes:,} nodes", "bytes", values, BINDFS, limits={OURS: 1536})


def cold_and_warm(
    scene: Scene,
    repetitions: int,
    roots: dict[str, Path],
    measure: Callable[[Path], float],
    note: Note,
    *,
    discarded: int = 0,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Measure all cases with cold caches (as root only; otherwise that result is empty), and again with the caches that this has filled.

    `discarded`: the number of measurements in between that do not count. The second use of a page costs more than later ones.
    """
    cold: dict[str, list[float]] = {}

    def twice(case: str, root: Path) -> float:
        if scene.is_root:
            scene.drop_caches()
        first = measure(root)
        if scene.is_root:
            cold.setdefault(case, []).append(first)
        for _ in range(discarded):
            measure(root)
        return measure(root)

    warm = interleave(repetitions, {case: partial(twice, case, root) for case, root in roots.items()}, note)
    return {case: cold[case] for case in warm if case in cold}, warm


def overlays(scene: Scene, stage: Stage, source: Path) -> dict[str, Path]:
    """Mounts of `source` without a listener: fusehsm in both cache modes, and bindfs."""
    roots = {OURS: stage.mount(source, "--cache", "private")[0]}
    roots[OURS_SHARED] = stage.mount(source, "--cache", "shared")[0]
    if scene.has_bindfs:
        roots[BINDFS] = stage.bindfs(source)[0]
    return roots


PARTS = {"a": event_round_trip, "b": unwatched_files, "c": sequential_read, "d": listing, "e": memory}
