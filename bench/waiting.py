"""(h) Many simultaneous accessors with a slow handler."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.handlers import SLOWNESS
from bench.report import Quantity, Target, interleave
from bench.scene import Scene, Stage
from bench.sizes import Note, Sizes

THREADS = 64  # the number of handlers that fusehsm.serve() runs at once
HANDLER = "bench.handlers:slow"
IDEAL = f"{THREADS} / {SLOWNESS * 1000:.0f} ms"
FIRST_ACCESS = ("--events", "first-access", "--cache", "private")
# The patches as posted make an event for each page fault. Linux 6.14 makes one for a whole mapping, so no access would wait there.
EVERY_FAULT = ("--events", "exact", "--abi", "patch-v2")
CASES = {
    "reads, exact": ("pread", ("--events", "exact")),
    "reads, first-access": ("pread", FIRST_ACCESS),
    "page faults, exact (patch-v2)": ("touch", EVERY_FAULT),
    "page faults, first-access": ("touch", FIRST_ACCESS),
}


def many_waiting(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(h) Measure the throughput of 64 threads, each with pages of its own, and the time that one access in a hundred exceeds."""
    directory = scene.files / "h"
    directory.mkdir()
    pages = THREADS * sizes.waits
    with open(directory / "file", "wb") as file:
        file.truncate(pages * 4096 * sizes.repetitions)
    late: dict[str, list[float]] = {case: [] for case in CASES}

    def once(case: str, point: Path) -> float:
        first = len(late[case]) * pages
        how = CASES[case][0]
        timing = scene.measure(point, "many", how, "file", str(THREADS), str(sizes.waits), str(first))
        late[case].append(timing.late / 1e6)
        return timing.operations / (timing.total / 1e9)

    with Stage(scene) as stage:
        # A read in first-access mode also brings in pages around it. Without read-ahead every page makes an event.
        points = {
            case: stage.mount(directory, "--engine", "devfuse", *options, "--handler", HANDLER)[0]
            for case, (_, options) in CASES.items()
        }
        for point in points.values():
            _without_read_ahead(point)
        values = interleave(
            sizes.repetitions, {case: partial(once, case, point) for case, point in points.items()}, note
        )
    values[IDEAL] = [THREADS / SLOWNESS] * sizes.repetitions
    targets = tuple(Target(case, IDEAL, at_least=0.9) for case in CASES)
    yield Quantity("h", f"accesses by {THREADS} threads", "1/s", values, IDEAL, targets)
    yield Quantity("h", "time that one access in a hundred exceeds", "ms", late, "reads, exact")


def _without_read_ahead(point: Path) -> None:
    device = point.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if os.access(setting, os.W_OK):
        setting.write_text("0", encoding="ascii")
