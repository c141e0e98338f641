"""The start of a large program that is a stub: its time, and the fetched part of the file."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.hsm_place import FIRST_ACCESS, KERNEL, MOUNT, Stubs, remove, settle
from bench.report import Quantity, interleave
from bench.scene import ROOT, Scene, make_file, run, stopwatch
from bench.sizes import Note, Sizes

WHOLE = "cp, then start"
# The program touches 1 page in 50: all pages of runs of this many pages, with large gaps between the runs.
RUNS = {"in runs of 64": 64, "one by one": 1}


def program_start(scene: Scene, sizes: Sizes, note: Note, directory: Path) -> Iterator[Quantity]:
    """Measure the start of a program that touches a fiftieth of its pages."""
    note("making a large program")
    program = _make_program(directory / "program" / "program", sizes.executable_bytes)
    stubs = Stubs(scene, str(program.parent), directory / "stubs")
    size = sizes.executable_bytes / (1 << 20)
    for how, run_length in RUNS.items():
        fetched: dict[str, list[float]] = {}

        def whole(
            case: str, run_length: int = run_length, fetched: dict[str, list[float]] = fetched
        ) -> float:
            output = directory / "copy"
            settle(scene)
            with stopwatch() as taken:
                run("cp", str(program), str(output))
                run(str(output), str(run_length))
            fetched.setdefault(case, []).append(_mebibytes(output))
            remove(output)
            return taken[0]

        def served(
            case: str,
            options: tuple[str, ...],
            run_length: int = run_length,
            fetched: dict[str, list[float]] = fetched,
        ) -> float:
            with stubs.served(*options) as path, stopwatch() as taken:
                run(str(path / program.name), str(run_length))
            fetched.setdefault(case, []).append(_mebibytes(stubs.path / program.name))
            remove(stubs.path)
            return taken[0]

        cases: dict[str, Callable[[], float]] = {WHOLE: partial(whole, WHOLE)}
        for case, options in _ways(scene).items():
            cases[case] = partial(served, case, options)
        values = interleave(sizes.repetitions, cases, note)
        name = f"start of a program of {size:,.0f} MiB, 2 % of the pages, {how}"
        yield Quantity("k", f"{name}: time", "s", values, WHOLE)
        yield Quantity("k", f"{name}: fetched", "MiB", fetched, WHOLE)
    remove(program.parent)


def _ways(scene: Scene) -> dict[str, tuple[str, ...]]:
    ways: dict[str, tuple[str, ...]] = {"fetch, kernel": KERNEL} if scene.has_kernel else {}
    for name, options in (("mount", MOUNT), ("mount, first-access", FIRST_ACCESS)):
        for block in ("1M", "64K"):
            ways[f"fetch, {name}, blocks of {block}"] = (*options, "--block-size", block)
    return ways


def _make_program(path: Path, size: int) -> Path:
    payload = make_file(path.parent / "payload", size)
    run(
        os.environ.get("CC", "cc"),
        "-O1",
        f'-DPAYLOAD="{payload}"',
        "-o",
        str(path),
        str(ROOT / "bench" / "program.c"),
    )
    payload.unlink()
    return path


def _mebibytes(path: Path) -> float:
    return path.stat().st_blocks * 512 / (1 << 20)
