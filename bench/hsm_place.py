"""Stubs that `fusehsm populate` makes and `fusehsm fetch` serves, for the measurements of part (k)."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.scene import ROOT, Scene, Stage, run

KERNEL = ("--backend", "kernel")
MOUNT = ("--backend", "fuse")
FIRST_ACCESS = (*MOUNT, "--events", "first-access")


def backends(scene: Scene) -> dict[str, tuple[str, ...]]:
    """The backends that can be measured here: their names and the options of fetch for them."""
    found = {"kernel": KERNEL} if scene.has_kernel else {}
    return {**found, "mount": MOUNT, "mount, first-access": FIRST_ACCESS}


@dataclass(frozen=True, slots=True)
class Stubs:
    """Stubs and their store."""

    scene: Scene
    #: A directory or a URL.
    store: str
    #: The directory of the stubs.
    path: Path

    @contextmanager
    def served(self, *options: str) -> Iterator[Path]:
        """Make new stubs, empty the caches, and serve the stubs. remove() removes them."""
        remove(self.path)
        run(sys.executable, "-m", "fusehsm", "populate", self.store, str(self.path), directory=ROOT)
        settle(self.scene)
        with Stage(self.scene) as stage:
            stage.fetch(self.store, self.path, *options)
            yield self.path


def settle(scene: Scene) -> None:
    """Write everything to the disk and, as root, empty the caches."""
    if scene.is_root:
        scene.drop_caches()
    else:
        run("sync")


def remove(path: Path) -> None:
    """Remove a file or a tree if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
