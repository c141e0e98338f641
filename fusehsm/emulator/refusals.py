"""Page-cache fills that are denied without a question, because they belong to an access that was denied.

Two kinds of READ come after a denied one although their events would be those of accesses that were made before it:

* Repeats. The kernel asks up to three times for a page that was refused: read-ahead, then the page alone, then once more with the mmap lock held,
  all within 0.3 ms (docs/facts.md, section 13).
* Followers. Accesses of one page wait for it in the kernel, one behind the other. Only the first has made an event. When it is denied, the next one
  asks. If the listener that denied the first one has gone since, no listener is left to deny the others, and they would read the stub's zeros.
"""

import os
import time
from dataclasses import dataclass, field

from fusehsm.emulator.explain import Accessor, Explainer, Explanation
from fusehsm.emulator.handles import DeniedFill, OpenFile
from fusehsm.linux import proc, system_call
from fusehsm.linux.ranges import RangeSet
from fusehsm.overlay.overlay import Node

_REPEATS = 2
# A call that continues differs visibly from a new equal call. A fault does not, so time decides. On a slow or busy machine the kernel's repeat may
# come later. It is known by the thread, which has waited for nothing else since it was refused.
_SAME_CALL_SECONDS = 1.0
_SAME_FAULT_SECONDS = 0.05
_SAME_FAULT_AWAKE_SECONDS = 1.0
# The kernel lets the next follower go as soon as one is refused, but the follower's process may have to wait for a CPU.
_NEXT_FOLLOWER_SECONDS = 1.0


@dataclass(slots=True)
class _DeniedNode:
    """The denied fills of one file of the last second."""

    #: The last answer.
    errno: int
    #: When the last one was denied, in monotonic seconds.
    last: float
    #: The bytes that were denied.
    ranges: RangeSet = field(default_factory=RangeSet)
    #: The threads that were denied. A thread follows once: when it asks again, it has made a new call.
    threads: set[int] = field(default_factory=set)


class Refusals:
    """The denied page-cache fills of one mount."""

    def __init__(self, explainer: Explainer) -> None:
        self._explainer = explainer
        # By node id, in the order of the last denials.
        self._nodes: dict[int, _DeniedNode] = {}

    def may_refuse(self, file: OpenFile[Node]) -> bool:
        """Whether check() might refuse a fill of that file."""
        if file.denied:
            _forget_expired(file.denied)
        if self._nodes:
            self._forget_old()
        return bool(file.denied or self._nodes)

    def add(
        self,
        file: OpenFile[Node],
        explanation: Explanation,
        offset: int,
        size: int,
        number: int,
        who: Accessor,
    ) -> None:
        """A fill of `size` bytes at `offset` was denied with the errno `number`."""
        waits = self._explainer.blocked_in(who, explanation.call)
        in_call = waits is not None and waits[0].number != system_call.PAGE_FAULT
        now = time.monotonic()
        denied = DeniedFill(waits, offset, offset + size, number, _REPEATS, now + _SAME_CALL_SECONDS)
        if not in_call:
            denied.expires = now + _SAME_FAULT_SECONDS
            denied.switches = proc.voluntary_switches(who.known_tid) if who.certain else None
            denied.expires_awake = now + _SAME_FAULT_AWAKE_SECONDS
        file.denied.pop(who.tid, None)
        file.denied[who.tid] = denied
        self._forget_old()
        node = self._nodes.pop(file.node.id, None)
        if node is None:
            node = _DeniedNode(number, 0.0)
        self._nodes[file.node.id] = node
        node.errno, node.last = number, time.monotonic()
        node.ranges.add(offset, offset + size)
        node.threads.add(who.tid)

    def check(
        self,
        file: OpenFile[Node],
        explanation: Explanation,
        offset: int,
        size: int,
        who: Accessor,
        *,
        heard: bool,
    ) -> None:
        """Raise the OSError of the access to which a fill belongs, if that was denied. `heard`: a listener is asked about the file's content."""
        self._check_repeat(file, explanation, offset, size, who)
        if not heard:
            self._check_follower(file, explanation, offset, size, who)

    def forgotten(self, node_id: int) -> None:
        """Forget a node, as the kernel has forgotten it and its pages."""
        self._nodes.pop(node_id, None)

    def _forget_old(self) -> None:
        oldest = time.monotonic() - _NEXT_FOLLOWER_SECONDS
        while self._nodes:
            node_id = next(iter(self._nodes))
            if self._nodes[node_id].last >= oldest:
                return
            del self._nodes[node_id]

    def _check_repeat(
        self, file: OpenFile[Node], explanation: Explanation, offset: int, size: int, who: Accessor
    ) -> None:
        denied = file.denied.get(who.tid)
        if denied is None:
            return
        if denied.repeats_left <= 0 or not _is_same_fault(denied, who.tid):
            del file.denied[who.tid]
            return
        overlaps = offset < denied.end and denied.start < offset + size
        if overlaps and self._explainer.blocked_in(who, explanation.call) == denied.waits:
            denied.repeats_left -= 1
            if denied.switches is not None:
                denied.switches += 1  # it waits for this answer
            raise OSError(denied.errno, os.strerror(denied.errno))

    def _check_follower(
        self, file: OpenFile[Node], explanation: Explanation, offset: int, size: int, who: Accessor
    ) -> None:
        node = self._nodes.get(file.node.id)
        if node is None or node.ranges.gaps(offset, offset + size) == [(offset, offset + size)]:
            return
        number = node.errno
        if who.certain:
            if who.tid in node.threads:
                return
            self.add(file, explanation, offset, size, number, who)
        # Otherwise a new call cannot be told from a follower, so the followers end a second after the last answer of a listener.
        raise OSError(number, os.strerror(number))


def _is_same_fault(denied: DeniedFill, tid: int) -> bool:
    """Whether a thread that asks again may still be in the fault or the call that was denied."""
    now = time.monotonic()
    if now <= denied.expires:
        return True
    # It waited for the first answer, and waits now; any wait between the two is one more.
    return (
        denied.switches is not None
        and now <= denied.expires_awake
        and proc.voluntary_switches(tid) == denied.switches + 1
    )


def _forget_expired(denied: dict[int, DeniedFill]) -> None:
    """Remove the expired entries, which are the oldest."""
    now = time.monotonic()
    while denied:
        tid = next(iter(denied))
        if max(denied[tid].expires, denied[tid].expires_awake) >= now:
            return
        del denied[tid]
