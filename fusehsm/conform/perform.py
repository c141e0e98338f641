"""Running one workload on one side."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import trio

from fusehsm.conform.accessor import AccessorTimeout, Zygote
from fusehsm.conform.arrangement import arranged
from fusehsm.conform.scene import scene
from fusehsm.conform.sides import Side
from fusehsm.conform.stream import UNFINISHED, Did, Stream, ended_early
from fusehsm.conform.verdict import Comparison, Verdict
from fusehsm.conform.workload import Workload
from fusehsm.linux.interruption import Interruption


@dataclass(slots=True)
class Performer:
    """Runs workloads, each in a directory of its own; until a signal comes, where `interruption` waits for one."""

    zygote: Zygote
    interruption: Interruption | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def perform(self, workload: Workload, side: Side) -> Stream:
        """The stream of one workload; what ended it early is its last entry. Raises Interrupted."""
        try:
            stream = trio.run(self._perform, workload, side)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        if self.interruption is not None:
            self.interruption.check()
        if side.emulator is not None and (ended_early(stream) or side.emulator.has_ended):
            trouble = side.emulator.trouble(self.zygote)
            if trouble:
                stream.append(Did(UNFINISHED, "ended", trouble))
        return stream

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
        comparison = Comparison(workload, kernel, self.perform(workload, emulated), divergences, expected)
        if comparison.verdict is not Verdict.DIFFERENT or ended_early(comparison.emulated):
            return comparison
        return replace(comparison, emulated=self.perform(workload, emulated), first=comparison.emulated)

    async def _perform(self, workload: Workload, side: Side) -> Stream:
        async with trio.open_nursery() as nursery:
            if self.interruption is not None:
                nursery.start_soon(self.interruption.watch)
            stream = await self._stream(workload, side)
            nursery.cancel_scope.cancel()
        return arranged(stream, workload.interchangeable, at_once=workload.at_once)

    async def _stream(self, workload: Workload, side: Side) -> Stream:
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
        return stream


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
