"""The benchmark: fusehsm beside the real kernel and bindfs, interleaved, with the project's targets.

    python bench/run.py [--only a,b] [--quick] [--repetitions N] [--json PATH]

Root is needed for the kernel's rows and for cold caches; what is left out is said at the end. Exit code 0 whether or not
targets are met, 1 where something that was asked for could not be measured; what came out before is written all the same.
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
WIDTH = 150  # columns of the tables where no terminal says how many there are
BUSY = 0.5  # load average beyond which others' work shows in the figures


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help=f"parts to run, for instance a,c (default: all of {','.join(PARTS)})")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: does it work, rather than how fast is it"
    )
    parser.add_argument("--repetitions", type=int, help="how often everything is measured (default: 5)")
    parser.add_argument(
        "--json", help="where the JSON goes; - is standard output (default: bench/results/DATE.json)"
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
    """Say what is being measured."""
    note(f"({part}) {text}")


def what_is_left_out(scene: Scene, build: str, *, hsm_is_wanted: bool) -> list[str]:
    """One line for everything that this machine or user cannot measure; `build`: why no kernel is built, or empty."""
    lines = [f"the build of a kernel: {build}"] if build else []
    if not scene.is_root:
        lines.append("the real kernel and cold caches: run as root")
    elif not scene.has_kernel:
        lines.append("the real kernel: no pre-content events here; needs Linux 6.14 or later")
    if not scene.has_bindfs:
        lines.append("bindfs: not found; apt-get install bindfs")
    if hsm_is_wanted:
        lines += [f"what is compared with {tool}: not found" for tool in hsm.missing_tools()]
    return lines


def main() -> int:
    """Run the benchmark and print what came out."""
    chosen = arguments()
    sizes = QUICK if chosen.quick else FULL
    if chosen.repetitions is not None:
        sizes = replace(sizes, repetitions=chosen.repetitions)
    # Asked for by name, a part that cannot run is an error, and at once; as one of all it is left out.
    lacking = kernel_build.what_is_missing() if sizes.kernel_source and {"g", "k"} & set(chosen.parts) else ""
    if lacking and chosen.only is not None and "g" in chosen.parts:
        print(f"bench: part g: {lacking}", file=sys.stderr)
        return 1
    if lacking and "g" in chosen.parts:
        chosen.parts.remove("g")
    console = Console(stderr=chosen.json == "-", width=None if sys.stdout.isatty() else WIDTH)
    load = os.getloadavg()[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind then either
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
        left_out.append(f"what should have come next: {failure}")
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
