"""What is different for a listener under `fusehsm run --listener`: each is shown by a workload of `fusehsm conform`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Zygote
from fusehsm.conform.scene import scene
from fusehsm.conform.sides import Side
from fusehsm.conform.stream import Did, Heard, Stream
from fusehsm.conform.workloads import chosen

pytestmark = [pytest.mark.fuse, pytest.mark.kernel, pytest.mark.any_engine]


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def sides(kernel_events: Path, places: Callable[[str], Path], fuse: None) -> tuple[Side, Side]:
    """The real kernel's, and one on which `fusehsm run` makes the mount."""
    kernel, run = places("kernel"), places("run")
    return Side(kernel, kernel), Side(run, run, "devfuse")


async def stream_of(key: str, side: Side, zygote: Zygote) -> Stream:
    (workload,) = chosen([f"listener/{key}"])
    async with scene(side, "workload", zygote) as made:
        await workload.script(made)
    return made.stream


async def test_accesses_of_the_listener(sides: tuple[Side, Side], zygote: Zygote) -> None:
    for side in sides:
        stream = await stream_of("its-own-read", side, zygote)
        own = [entry for entry in stream if isinstance(entry, Heard) and entry.by == "the listener"]
        assert bool(own) is side.is_kernel


async def test_programs_that_are_open_for_writing(sides: tuple[Side, Side], zygote: Zygote) -> None:
    """The accessor's exit code is 200 and the errno, here ETXTBSY."""
    for side in sides:
        stream = await stream_of("a-program-that-is-not-watched-and-that-it-has-open", side, zygote)
        assert stream[0] == Did("accessor", "execute", "226" if side.is_kernel else "0")
