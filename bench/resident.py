"""(f) A resident tree that is still watched, in first-access mode: its cost when nothing has to be fetched."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.report import Quantity, Target, interleave
from bench.scene import HANDLER, Scene, Stage, make_tree, run, stopwatch
from bench.sizes import Note, Sizes

NATIVE = "native"
OURS = "fusehsm"
PYFUSE3 = "fusehsm --engine pyfuse3"
OPTIONS = ("--events", "first-access", "--cache", "private", "--handler", HANDLER)
# Rounds before the measurement. The kernel may cache a file's attributes without limit only some time after the last event of the file, so a file
# with a recent event is not warm yet.
ROUNDS = 3
SETTLING = 2.0  # seconds before each round


def resident_tree(scene: Scene, sizes: Sizes, note: Note) -> Iterator[Quantity]:
    """(f) Measure stat, open+read+close, lookups of missing names, ls -lR and find of a warm tree, and count their requests."""
    directory = scene.files / "f"
    paths = make_tree(directory, sizes.resident_files, in_one_directory=100, size=4096)
    lists = {"present": paths, "missing": [f"{path}.missing" for path in paths]}
    for name, listed in lists.items():
        (scene.work / name).write_text("".join(f"{path}\n" for path in listed), encoding="ascii")

    def on_list(action: str, names: str, root: Path) -> float:
        return scene.measure(root, action, str(scene.work / names)).microseconds

    def program(*command: str, root: Path) -> float:
        with stopwatch() as taken:
            run(*command, directory=root)
        return taken[0]

    actions: dict[str, tuple[str, Callable[[Path], float]]] = {
        "stat": ("µs", partial(on_list, "stat", "present")),
        "open+read+close": ("µs", partial(on_list, "open", "present")),
        "stat of missing names": ("µs", partial(on_list, "missing", "missing")),
        "ls -lR": ("s", lambda root: program("ls", "-lR", root=root)),
        "find -size": ("s", lambda root: program("find", ".", "-type", "f", "-size", "+1k", root=root)),
    }
    with Stage(scene) as stage:
        mounts = {
            OURS: stage.mount(directory, "--engine", "devfuse", *OPTIONS)[0],
            PYFUSE3: stage.mount(directory, "--engine", "pyfuse3", *OPTIONS)[0],
        }
        roots = {NATIVE: directory, **mounts}
        for _ in range(ROUNDS):
            note("warming")
            time.sleep(SETTLING)
            for root in roots.values():
                for _, action in actions.values():
                    action(root)
        before = stage.requests(mounts[OURS])
        for name, (unit, action) in actions.items():

            def once(root: Path, action: Callable[[Path], float] = action) -> float:
                # Not counted: a machine that reclaims idle memory (DAMON) removes pages while the other cases are measured.
                action(root)
                return action(root)

            values = interleave(
                sizes.repetitions, {case: partial(once, root) for case, root in roots.items()}, note
            )
            targets = (Target(OURS, NATIVE, at_most=1.2),)
            yield Quantity("f", f"{name}, warm, {len(paths):,} files", unit, values, NATIVE, targets)
        made = stage.requests(mounts[OURS])
        made.subtract(before)
        operations = 2.0 * len(paths) * sizes.repetitions * len(actions)
        by_kind = {kind: [float(count)] for kind, count in made.most_common() if count}
        of_all = {"operations on files": [operations], "requests": [float(made.total())]}
        yield Quantity("f", "requests of all these", "", {**of_all, **by_kind}, "operations on files")
