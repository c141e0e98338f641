"""What the comparison of two streams comes to."""

import difflib
import enum
from dataclasses import dataclass

from fusehsm.conform.stream import Stream, ended_early, lines, results
from fusehsm.conform.workload import Workload


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
