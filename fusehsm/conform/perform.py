"""Running one workload on both sides, and what the comparison of the two streams comes to."""

import difflib
import enum
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import trio

from fusehsm.conform.accessor import AccessorTimeout, Zygote
from fusehsm.conform.scene import scene
from fusehsm.conform.sides import Side
from fusehsm.conform.stream import UNFINISHED, Did, Stream, arranged, ended_early, lines, results
from fusehsm.conform.workload import Workload
from fusehsm.linux.signals import Interruption

# What the comparison of two streams comes to.


class Verdict(enum.Enum):
    """IDENTICAL; KNOWN: as an entry of the table of divergences says; DIFFERENT: nobody knows why, or no more as the entry says;
    LEFT_OUT: it needs root, and who runs it is not."""

    IDENTICAL = "identical"
    KNOWN = "known divergence"
    DIFFERENT = "different"
    LEFT_OUT = "left out: needs root"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload's two streams, and what they come to. `expected`: what the emulator was last seen to do where it is known to differ;
    `first`: what it did at first, where that differed and it was run once more."""

    workload: Workload
    kernel: Stream
    emulated: Stream
    divergences: tuple[str, ...]
    expected: Stream | None = None
    left_out: bool = False
    first: Stream | None = None

    @property
    def verdict(self) -> Verdict:
        """A divergence excuses the stream that was recorded with it, and where none was, any; of an unsteady workload the events alone. Nothing
        excuses an early end: of the kernel's the workload is broken, of the emulator's it has died or hangs."""
        if self.left_out:
            return Verdict.LEFT_OUT
        if ended_early(self.kernel) or ended_early(self.emulated):
            return Verdict.DIFFERENT
        if lines(self.kernel) == lines(self.emulated):
            return Verdict.IDENTICAL
        if not self.divergences:
            return Verdict.DIFFERENT
        if self.workload.unsteady:
            excused = results(self.kernel) == results(self.emulated)
        else:
            excused = self.expected is None or lines(self.expected) == lines(self.emulated)
        return Verdict.KNOWN if excused else Verdict.DIFFERENT

    def difference(self) -> list[str]:
        """Lines for people: what only the kernel has (-), what only the emulator has (+), and what is around it."""
        wanted, name = self.kernel, "the kernel"
        is_news = self.verdict is Verdict.DIFFERENT and not ended_early(self.kernel)
        if is_news and self.divergences and self.expected is not None and not self.workload.unsteady:
            wanted, name = self.expected, f"recorded with the divergence {', '.join(self.divergences)}"
        found = _difference(wanted, self.emulated, name)
        if not found and self.verdict is Verdict.DIFFERENT:
            return ["both sides ended early:", *(f" {line}" for line in lines(self.kernel))]
        return found

    def first_difference(self) -> list[str]:
        """What differed at the first attempt, where a second was made."""
        return [] if self.first is None else _difference(self.emulated, self.first, "the second attempt")


def _difference(wanted: Stream, emulated: Stream, name: str) -> list[str]:
    return list(difflib.unified_diff(lines(wanted), lines(emulated), name, "the emulator", lineterm="", n=3))


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
