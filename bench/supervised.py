"""(j) Unmodified listeners under `fusehsm run`: a C listener on the real kernel and under `fusehsm run`, without and with a view of its own
(`--listener`), the listener's own use of files, and the cost of starting a command.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.parts import SOCKET, pread_microseconds
from bench.report import Quantity, Target, interleave
from bench.scene import Scene, Stage, make_file, make_tree, placed_on, run, stopwatch
from bench.sizes import Note, Sizes

KERNEL = "kernel, C listener"
SUPERVISED = "fusehsm run, the same C listener"
SUPERVISED_ANY = "fusehsm run --any-descriptor, the same C listener"
WITH_VIEW = "fusehsm run --listener, the same C listener"
TARGETS = (Target(SUPERVISED, KERNEL, at_most=4.0),)
NATIVE = "native"
WITHOUT_MOUNT = "fusehsm run"
WITH_MOUNT = "fusehsm run --mount"
WITH_LISTENER = "fusehsm run --listener --mount"
ACCESSOR = "fusehsm run --accessor"
ANY_DESCRIPTOR = "fusehsm run --any-descriptor"
RUN = (sys.executable, "-m", "fusehsm", "run")
MAPPINGS = 2_000
READS = 2_000
OWN_FILES = 200
ROUNDS = 10  # times that each of the own files is used in one measurement
FUSEHSM_MOUNT = "fusehsm run, on a mount"


def supervised(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(j) Measure the event of a pread, the listener's own use of files, a read(2), an mmap(2) and the start of a command, under `fusehsm run`."""
    yield from _round_trip(scene, sizes, note)
    yield from _own_files(scene, sizes, note)
    yield from _reads(scene, sizes, note)
    yield from _mappings(scene, sizes, note)
    yield from _start_up(scene, sizes, note)


def _round_trip(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    directory = scene.files / "j"
    names = ("c", "run", "view", "any", "python")
    files = {name: make_file(directory / name / "file", 16 << 20) for name in names}
    for placement, cores in (("any core", None), ("one core", {min(os.sched_getaffinity(0))})):
        with placed_on(cores), Stage(scene) as stage:
            paths = {SUPERVISED: files["run"], WITH_VIEW: files["view"], SUPERVISED_ANY: files["any"]}
            if scene.has_kernel:
                stage.listen_in_c(files["c"])
                paths[KERNEL] = files["c"]
            stage.listen_in_c(files["run"], *RUN, "--mount", str(files["run"].parent), "--")
            any_descriptor = (*RUN, "--any-descriptor", "--mount", str(files["any"].parent), "--")
            stage.listen_in_c(files["any"], *any_descriptor)
            stage.listen_in_c(files["view"], *RUN, "--listener", "--mount", str(files["view"].parent), "--")
            point, _ = stage.mount(files["python"].parent, "--events", "exact")
            stage.listen(point, "fuse")
            paths[SOCKET] = point / "file"
            cases = {
                case: partial(pread_microseconds, scene, sizes.preads, path) for case, path in paths.items()
            }
            values = interleave(sizes.repetitions, cases, note)
        yield Quantity(
            "j", f"pread of 4 KiB, one event, C listener, {placement}", "µs", values, KERNEL, TARGETS
        )


def _reads(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """Measure read(2) of a file that is not watched, in a command that has no group: the cost of each call that the filter stops."""
    file = make_file(scene.files / "j-read" / "file", READS * 4096)

    def microseconds(*before: str) -> float:
        timing = scene.measure(scene.work, "read", str(file), "4096", before=before)
        return timing.total / 1000 / READS

    cases: dict[str, Callable[[], float]] = {
        NATIVE: microseconds,
        WITHOUT_MOUNT: partial(microseconds, *RUN, "--"),
        ANY_DESCRIPTOR: partial(microseconds, *RUN, "--any-descriptor", "--"),
    }
    values = interleave(sizes.repetitions, cases, note)
    yield Quantity("j", "read of 4 KiB of another file", "µs", values, NATIVE)


def _own_files(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """Measure stat, open+read+close and pread of files in DIR that the command itself uses. No listener watches them."""
    directory = scene.files / "j-own"
    paths = make_tree(directory, OWN_FILES, in_one_directory=100, size=4096)
    make_file(directory / "file", 16 << 20)
    listing = scene.work / "own"
    listing.write_text("".join(f"{path}\n" for path in paths * ROUNDS), encoding="ascii")
    place = ("--mount", str(directory), "--")
    started = {NATIVE: (), WITH_MOUNT: (*RUN, *place), WITH_LISTENER: (*RUN, "--listener", *place)}
    for name, arguments in (
        (f"stat of its own, {OWN_FILES} files", ("stat", str(listing))),
        (f"open+read+close of its own, {OWN_FILES} files", ("open", str(listing))),
        ("pread of 4 KiB of its own", ("pread", "file", str(sizes.preads), "4096")),
    ):
        cases = {
            case: partial(_own_microseconds, scene, directory, arguments, before)
            for case, before in started.items()
        }
        values = interleave(sizes.repetitions, cases, note)
        yield Quantity("j", name, "µs", values, NATIVE)


def _own_microseconds(
    scene: Scene, directory: Path, arguments: Sequence[str], before: Sequence[str]
) -> float:
    return scene.measure(directory, *arguments, before=before).microseconds


def _mappings(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """Measure mmap(2) and munmap(2) of one page of a file that is not watched."""
    directory = scene.files / "j-mapped"
    file = make_file(directory / "file", 1 << 20)
    elsewhere = make_file(scene.files / "j-elsewhere" / "file", 1 << 20)
    with Stage(scene) as stage:
        point, _ = stage.mount(directory, "--direct")
        reachable = (
            "env",
            f"XDG_RUNTIME_DIR={scene.work}",
        )  # the directory with the control sockets of the stage's mounts
        cases = {
            NATIVE: partial(_map_microseconds, scene, (), str(elsewhere)),
            WITHOUT_MOUNT: partial(_map_microseconds, scene, (*RUN, "--"), str(elsewhere)),
            ACCESSOR: partial(_map_microseconds, scene, (*RUN, "--accessor", "--"), str(elsewhere)),
            FUSEHSM_MOUNT: partial(
                _map_microseconds, scene, (*reachable, *RUN, "--"), str(point / file.name)
            ),
        }
        values = interleave(sizes.repetitions, cases, note)
    yield Quantity("j", "mmap and munmap of a file", "µs", values, NATIVE)


def _map_microseconds(scene: Scene, before: Sequence[str], path: str) -> float:
    return scene.measure(scene.work, "map", path, str(MAPPINGS), before=before).microseconds


def _start_up(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    directory = scene.files / "j-started"
    directory.mkdir()

    def seconds(*command: str) -> float:
        with stopwatch() as taken:
            run(*command)
        return taken[0]

    cases = {
        NATIVE: partial(seconds, "true"),
        WITHOUT_MOUNT: partial(seconds, *RUN, "--", "true"),
        WITH_MOUNT: partial(seconds, *RUN, "--mount", str(directory), "--", "true"),
        WITH_LISTENER: partial(seconds, *RUN, "--listener", "--mount", str(directory), "--", "true"),
    }
    values = interleave(sizes.repetitions, cases, note)
    yield Quantity("j", "start and end of true(1)", "s", values, NATIVE)
