"""(g) The build of a Linux kernel from a mounted tree: resident, and fetched file by file during the build."""

import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.report import Quantity, Target, interleave
from bench.scene import Scene, Stage, run, stopwatch
from bench.sizes import Note, Sizes

TARBALL = Path("/usr/src/linux-source-6.1.tar.xz")
TOOLS = ("make", "cc", "flex", "bison", "bc", "xz")
NATIVE = "native"
RESIDENT = "fusehsm, resident"
COLD = "fusehsm, cold"
KERNEL_COLD = "kernel, the same handler, cold"
HANDLER = "examples.mirror:handler"
OPTIONS = ("--engine", "devfuse", "--events", "first-access", "--cache", "private", "--handler", HANDLER)


def kernel_build(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(g) Measure make tinyconfig and make -j2, with the output outside the mount."""
    directory = scene.files / "g"
    directory.mkdir()
    note("unpacking the source")
    source = source_tree(directory, sizes)
    seen: dict[str, dict[str, list[float]]] = {"requests": {}, "events": {}, "occupied": {}}
    of_a_cold_build: list[Counter[str]] = []

    built = partial(build_seconds, scene)

    def mounted(case: str, tree: Path) -> float:
        with Stage(scene) as stage:
            point = stage.new_directory()
            stage.mount(tree, *OPTIONS, point=point, MIRROR_ORIGIN=str(source), MIRROR_ROOT=str(point))
            seconds = built(point)
            requests, status = stage.requests(point), stage.status(point)
        seen["requests"].setdefault(case, []).append(float(requests.total()))
        if case == COLD:
            of_a_cold_build.append(requests)
        seen["events"].setdefault(case, []).append(float(status["groups"][0]["statistics"]["queued"]))
        return seconds

    def cold(case: str, build: Callable[[str, Path], float]) -> float:
        tree = directory / "stubs"
        shutil.rmtree(tree, ignore_errors=True)
        _make_stubs(source, tree)
        os.sync()
        seconds = build(case, tree)
        seen["occupied"].setdefault(case, []).append(occupied(tree))
        return seconds

    def listened(case: str, tree: Path) -> float:
        counts = scene.work / "counts"
        with Stage(scene) as stage:
            stage.mirror(source, tree, counts)
            seconds = built(tree)
        # The listener writes the counts when it ends, and leaving the stage has waited for that.
        seen["events"].setdefault(case, []).append(float(counts.read_text(encoding="ascii")))
        return seconds

    cases: dict[str, Callable[[], float]] = {
        NATIVE: partial(built, source),
        RESIDENT: partial(mounted, RESIDENT, source),
        COLD: partial(cold, COLD, mounted),
    }
    if scene.has_kernel:
        cases[KERNEL_COLD] = partial(cold, KERNEL_COLD, listened)
    built(source)  # warms the caches for all cases, and is not counted
    values = interleave(sizes.repetitions, cases, note)
    what = what_is_built(sizes)
    targets = (Target(RESIDENT, NATIVE, at_most=1.03), Target(COLD, KERNEL_COLD, at_most=1.1))
    yield Quantity("g", f"build of {what}, -j2", "s", values, NATIVE, targets)
    yield Quantity("g", "requests of a build", "requests", seen["requests"], RESIDENT)
    kinds = dict.fromkeys(kind for requests in of_a_cold_build for kind, _ in requests.most_common())
    by_kind = {kind: [float(requests[kind]) for requests in of_a_cold_build] for kind in kinds}
    yield Quantity("g", "requests of a cold build, by kind", "requests", by_kind, "")
    yield Quantity("g", "events of a build", "events", seen["events"], KERNEL_COLD)
    full = {"the whole tree": [occupied(source)] * sizes.repetitions}
    yield Quantity("g", "disk space afterwards", "MiB", {**full, **seen["occupied"]}, "the whole tree")


def what_is_built(sizes: Sizes) -> str:
    """The name of the thing that is built."""
    return "Linux 6.1 tinyconfig" if sizes.kernel_source else "150 generated files"


def build_seconds(scene: Scene, tree: Path) -> float:
    """The seconds that `make -j2` takes after `make tinyconfig`, with the output outside the tree."""
    output = scene.work / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    run("make", "-s", "-C", str(tree), f"O={output}", "tinyconfig")
    with stopwatch() as taken:
        run("make", "-s", "-C", str(tree), f"O={output}", "-j2")
    return taken[0]


def what_is_missing() -> str:
    """One line with the missing tools for building a kernel, and the fix; empty if nothing is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if not TARBALL.exists():
        missing.append(str(TARBALL))
    packages = "linux-source-6.1 build-essential flex bison bc xz-utils"
    return f"{', '.join(missing)}: not found; apt-get install {packages}" if missing else ""


def source_tree(directory: Path, sizes: Sizes) -> Path:
    """Make the tree to build below `directory`, and return its path."""
    return _unpacked(directory) if sizes.kernel_source else _generated(directory)


def _unpacked(directory: Path) -> Path:
    run("tar", "-xf", str(TARBALL), "-C", str(directory))
    return directory / TARBALL.name.removesuffix(".tar.xz")


def _generated(directory: Path) -> Path:
    """Make a small tree that is built with the kernel's commands, in seconds."""
    source = directory / "generated"
    source.mkdir()
    names = [f"unit{number:03d}" for number in range(150)]
    for name in names:
        (source / f"{name}.h").write_text(f"int {name}(int);\n" + "/* filler */\n" * 500, encoding="ascii")
        (source / f"{name}.c").write_text(
            f'#include "{name}.h"\nint {name}(int x) {{ return x + 1; }}\n', encoding="ascii"
        )
    objects = " ".join(f"$(O)/{name}.o" for name in names)
    makefile = f"all: {objects}\ntinyconfig:\n$(O)/%.o: %.c %.h\n\tcc -O1 -c -o $@ $<\n"
    (source / "Makefile").write_text(makefile, encoding="ascii")
    return source


def _make_stubs(source: Path, target: Path) -> None:
    """Make files with the same sizes, modes and times, without content."""
    for place, directories, files in os.walk(source):
        here = target / os.path.relpath(place, source)
        here.mkdir(exist_ok=True, parents=True)
        for name in [*files, *directories]:
            original, stub = os.path.join(place, name), here / name
            status = os.lstat(original)
            if stat.S_ISLNK(status.st_mode):
                stub.symlink_to(os.readlink(original))
            elif stat.S_ISREG(status.st_mode):
                with open(stub, "wb") as file:
                    file.truncate(status.st_size)
                stub.chmod(stat.S_IMODE(status.st_mode))
                os.utime(stub, ns=(status.st_atime_ns, status.st_mtime_ns))


def occupied(tree: Path) -> float:
    """The MiB that a tree takes on the disk."""
    os.sync()
    return int(run("du", "-s", "--block-size=1", str(tree)).split()[0]) / (1 << 20)
