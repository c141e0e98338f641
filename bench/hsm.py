"""(k) The ready-made HSM: `fusehsm populate` and `fusehsm fetch`, compared with ordinary tools that fetch everything first."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import hsm_build, hsm_start
from bench.hsm_place import FIRST_ACCESS, Stubs, backends, remove, settle
from bench.report import Quantity, Target, interleave
from bench.scene import Scene, make_file, make_tree, run, stopwatch
from bench.sizes import Note, Sizes
from bench.web_server import has_nginx, web_server

CP = "cp"
CURL = "curl -o"
RSYNC = "rsync -a"
SMALL = 8192  # bytes of a small file


def ready_made_hsm(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(k) A large file, many small files, the start of a large program and the build of a kernel, each from stubs."""
    directory = scene.files / "k"
    directory.mkdir()
    with ExitStack() as stack:
        stack.enter_context(scene.direct_image())
        url = stack.enter_context(web_server(directory, scene.work / "nginx")) if has_nginx() else ""
        yield from _large_file(scene, sizes, note, directory, url)
        yield from _small_files(scene, sizes, note, directory, url)
        yield from hsm_start.program_start(scene, sizes, note, directory)
        yield from hsm_build.build_of_stubs(scene, sizes, note, directory)


def missing_tools() -> list[str]:
    """The tools to compare fetch with that are not installed."""
    missing = [tool for tool in ("rsync", "curl") if shutil.which(tool) is None]
    return missing if has_nginx() else [*missing, "nginx"]


def seconds_of(scene: Scene, output: Path, *command: str) -> float:
    """The seconds that a command takes to write to `output`, with cold caches. `output` is removed afterwards."""
    settle(scene)
    with stopwatch() as taken:
        run(*command)
    remove(output)
    return taken[0]


def seconds_through(
    stubs: Stubs, options: tuple[str, ...], command: Callable[[Path], tuple[str, ...]]
) -> float:
    """The seconds that a command takes on new stubs while fetch serves them."""
    with stubs.served(*options) as path, stopwatch() as taken:
        run(*command(path))
    remove(stubs.path)
    return taken[0]


def _large_file(scene: Scene, sizes: Sizes, note: Note, directory: Path, url: str) -> Iterator[Quantity]:
    """Read a large file from beginning to end, with cold caches."""
    note("making a large file")
    file = make_file(directory / "large" / "file", sizes.fetched_bytes)
    output = directory / "copy"
    size = sizes.fetched_bytes / (1 << 20)

    def cat(path: Path) -> tuple[str, ...]:
        return ("sh", "-c", 'cat "$0" > /dev/null', str(path / file.name))

    def copied(path: Path) -> tuple[str, ...]:
        return ("cp", str(path / file.name), str(output))

    local = Stubs(scene, str(file.parent), directory / "stubs")
    cases: dict[str, Callable[[], float]] = {
        CP: partial(seconds_of, scene, output, "cp", str(file), str(output))
    }
    for name, options in backends(scene).items():
        cases[f"fetch, {name}: cat"] = partial(seconds_through, local, options, cat)
    # Not on the real kernel: there cp finds that stubs are holes and reads nothing.
    cases["fetch, mount, first-access: cp"] = partial(seconds_through, local, FIRST_ACCESS, copied)
    yield _throughput(f"{size:,.0f} MiB of a directory, cold", size, cases, CP, sizes, note)
    output.unlink(missing_ok=True)
    if url and shutil.which("curl") is not None:
        web = Stubs(scene, f"{url}/large", directory / "stubs")
        cases = {
            CURL: partial(
                seconds_of, scene, output, "curl", "-s", "-o", str(output), f"{url}/large/{file.name}"
            )
        }
        for name, options in backends(scene).items():
            cases[f"fetch, {name}: cat"] = partial(seconds_through, web, options, cat)
        yield _throughput(f"{size:,.0f} MiB of nginx, cold", size, cases, CURL, sizes, note)
    shutil.rmtree(file.parent)


def _throughput(
    name: str,
    size: float,
    cases: Mapping[str, Callable[[], float]],
    baseline: str,
    sizes: Sizes,
    note: Note,
) -> Quantity:
    seconds = interleave(sizes.repetitions, cases, note)
    values = {case: [size / taken for taken in all_taken] for case, all_taken in seconds.items()}
    targets = [Target(case, baseline, at_least=0.7) for case in cases if case.endswith(": cat")]
    return Quantity("k", name, "MiB/s", values, baseline, targets)


def _small_files(scene: Scene, sizes: Sizes, note: Note, directory: Path, url: str) -> Iterator[Quantity]:
    """Read small files one after the other, as tar does, with cold caches."""
    note("making small files")
    store = directory / "small"
    paths = make_tree(store, sizes.fetched_files, in_one_directory=100, size=SMALL)
    output = directory / "copy"
    kinds: dict[str, tuple[str, dict[str, Callable[[], float]], Stubs]] = {}
    if shutil.which("rsync") is not None:
        copying = partial(seconds_of, scene, output, "rsync", "-a", f"{store}/", f"{output}/")
        kinds["a directory"] = (RSYNC, {RSYNC: copying}, Stubs(scene, str(store), directory / "stubs"))
    if url and shutil.which("curl") is not None:
        wanted = scene.work / "urls"
        wanted.write_text(
            "".join(f'url="{url}/small/{path}"\noutput="{output}/{path}"\n' for path in paths),
            encoding="ascii",
        )
        fetching = partial(seconds_of, scene, output, "curl", "-s", "--create-dirs", "-K", str(wanted))
        kinds["nginx"] = (
            "curl, one process",
            {"curl, one process": fetching},
            Stubs(scene, f"{url}/small", directory / "stubs"),
        )

    def archived(path: Path) -> tuple[str, ...]:
        # tar reads no content if its archive is /dev/null itself. It prints a warning for each file that is filled while it reads it.
        return ("sh", "-c", f"tar -c -C '{path}' . 2> /dev/null | cat > /dev/null")

    for origin, (baseline, cases, stubs) in kinds.items():
        for name, options in backends(scene).items():
            cases[f"fetch, {name}: tar"] = partial(seconds_through, stubs, options, archived)
        values = interleave(sizes.repetitions, cases, note)
        yield Quantity(
            "k", f"{len(paths):,} files of {SMALL >> 10} KiB of {origin}, cold", "s", values, baseline
        )
    shutil.rmtree(store)
