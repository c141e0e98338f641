"""Running one workload on one side."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from fusehsm.conform.accessor import AccessorTimeout, Zygote
from fusehsm.conform.scene import scene
from fusehsm.conform.sides import Side
from fusehsm.conform.stream import UNFINISHED, Did, Heard, Stream
from fusehsm.conform.verdict import Comparison, Verdict
from fusehsm.conform.workload import Workload


@dataclass(slots=True)
class Performer:
    """Runs workloads, each in a directory of its own."""

    zygote: Zygote
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def perform(self, workload: Workload, side: Side) -> Stream:
        """The stream of one workload; what ended it early is its last entry."""
        return trio.run(self._perform, workload, side)

    def compare(
        self,
        workload: Workload,
        kernel: Stream,
        emulated: Side,
        divergences: tuple[str, ...],
        expected: Stream | None,
    ) -> Comparison:
        """Run a workload on the emulator and compare; what differs, a second time. An accessor that a busy machine stops in the middle of a
        request is not to be seen waiting there, and the emulator then asks once more than the kernel: seldom twice."""
        for _ in range(2):
            comparison = Comparison(workload, kernel, self.perform(workload, emulated), divergences, expected)
            if comparison.verdict is not Verdict.DIFFERENT:
                break
        return comparison

    async def _perform(self, workload: Workload, side: Side) -> Stream:
        stream: Stream = []
        name = f"workload-{next(self._numbers)}"
        try:
            async with scene(side, name, self.zygote) as made:
                stream = made.stream
                await workload.script(made)
        except Exception as raised:
            error = _first(raised)
            late = isinstance(error, trio.TooSlowError | AccessorTimeout)
            stream.append(
                Did(UNFINISHED, "ended", "too late" if late else f"{type(error).__name__}: {error}")
            )
        finally:
            shutil.rmtree(side.backing / name, ignore_errors=True)
        return _sorted(stream) if workload.in_any_order else stream


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _sorted(stream: Stream) -> Stream:
    """Where the order of events is arbitrary, one of its own."""
    events = sorted((entry for entry in stream if isinstance(entry, Heard)), key=Heard.line)
    return [*events, *(entry for entry in stream if isinstance(entry, Did))]
