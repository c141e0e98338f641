"""The benchmark: fusehsm, the real kernel and bindfs measured in turns, with the project's targets.

    python bench/run.py [--only a,b] [--quick] [--repetitions N] [--json PATH]

The kernel's rows and cold caches need root. The end of the output lists what was left out. Exit code 0 also if targets are missed; 1 if a requested
part could not be measured. The results up to then are written in any case.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

if __name__ == "__main__":  # run as a script: make the packages beside this directory importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import hsm, kernel_build, large_tree, parts, resident, supervised, waiting
from bench.report import Quantity, as_json, table_of, targets_of, verdicts
from bench.scene import Scene, SceneError
from bench.sizes import FULL, QUICK, Note, Sizes

PARTS = {
    **parts.PARTS,
    "f": resident.resident_tree,
    "g": kernel_build.kernel_build,
    "h": waiting.many_waiting,
    "i": large_tree.large_tree,
    "j": supervised.supervised,
    "k": hsm.ready_made_hsm,
}
RESULTS = Path(__file__).resolve().parent / "results"
IMAGE = 24 << 30  # bytes; sparse
WIDTH = 150  # columns of the tables without a terminal
BUSY = 0.5  # load average above which other programs disturb the figures


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help=f"parts to run, for instance a,c (default: all of {','.join(PARTS)})")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: check that it works, without useful figures"
    )
    parser.add_argument(
        "--repetitions", type=int, help="the number of measurements of each case (default: 5)"
    )
    parser.add_argument(
        "--json", help="the file for the JSON; - is standard output (default: bench/results/DATE.json)"
    )
    chosen = parser.parse_args()
    chosen.parts = list(PARTS) if chosen.only is None else [part.strip() for part in chosen.only.split(",")]
    for part in chosen.parts:
        if part not in PARTS:
            parser.error(f"--only {part}: no such part; there are {', '.join(PARTS)}")
    if chosen.repetitions is not None and chosen.repetitions < 1:
        parser.error("--repetitions: at least 1")
    return chosen


def measure(scene: Scene, chosen: list[str], sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """Run the parts."""
    for part in chosen:
        yield from PARTS[part](scene, sizes, partial(note_of, note, part))


def note_of(note: Note, part: str, text: str) -> None:
    """Show the current measurement, with its part."""
    note(f"({part}) {text}")


def what_is_left_out(scene: Scene, build: str, *, hsm_is_wanted: bool) -> list[str]:
    """A line for each thing that this machine or user cannot measure. `build`: the reason why no kernel is built, or empty."""
    lines = [f"the build of a kernel: {build}"] if build else []
    if not scene.is_root:
        lines.append("the real kernel and cold caches: run as root")
    elif not scene.has_kernel:
        lines.append("the real kernel: no pre-content events here; needs Linux 6.14 or later")
    if not scene.has_bindfs:
        lines.append("bindfs: not found; apt-get install bindfs")
    if hsm_is_wanted:
        lines += [f"the comparison with {tool}: not found" for tool in hsm.missing_tools()]
    return lines


def main() -> int:
    """Run the benchmark and print the results. Returns the exit code."""
    chosen = arguments()
    sizes = QUICK if chosen.quick else FULL
    if chosen.repetitions is not None:
        sizes = replace(sizes, repetitions=chosen.repetitions)
    # A part that cannot run is an error at once if --only names it. Otherwise it is left out.
    lacking = kernel_build.what_is_missing() if sizes.kernel_source and {"g", "k"} & set(chosen.parts) else ""
    if lacking and chosen.only is not None and "g" in chosen.parts:
        print(f"bench: part g: {lacking}", file=sys.stderr)
        return 1
    if lacking and "g" in chosen.parts:
        chosen.parts.remove("g")
    console = Console(stderr=chosen.json == "-", width=None if sys.stdout.isatty() else WIDTH)
    load = os.getloadavg()[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is removed after SIGTERM too
    quantities: list[Quantity] = []
    left_out: list[str] = []
    failure = ""
    try:
        with Scene(IMAGE) as scene, console.status("preparing") as status:
            left_out = what_is_left_out(scene, lacking, hsm_is_wanted="k" in chosen.parts)
            for quantity in measure(scene, chosen.parts, sizes, status.update):
                quantities.append(quantity)
                console.print(table_of([quantity], sizes.repetitions))
    except SceneError as error:
        failure = str(error)
    except KeyboardInterrupt:
        failure = "interrupted"
    if failure:
        print(f"bench: {failure}", file=sys.stderr)
        if not quantities:
            return 1
        left_out.append(f"the rest: {failure}")
    console.print(table_of(quantities, sizes.repetitions))
    found = [verdict for quantity in quantities for verdict in verdicts(quantity)]
    if found:
        console.print(targets_of(found))
    for line in left_out:
        console.print(f"Left out: {line}.")
    if load > BUSY:
        console.print(
            f"The machine was busy with something else (load {load:.1f}): do not trust the figures."
        )
    text = json.dumps(as_json(quantities, left_out, sizes.repetitions, load), indent=1)
    if chosen.json == "-":
        print(text)
    else:
        path = Path(chosen.json or RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
        console.print(f"Every value: {path}")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
