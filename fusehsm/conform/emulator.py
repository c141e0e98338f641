"""The daemon of an emulated side: whether it still serves, and what it had to say."""

from collections import deque
from pathlib import Path
from typing import Final

from fusehsm.conform.accessor import Accessor, AccessorTimeout, Zygote
from fusehsm.daemon.child import ForegroundMount

_ANSWERS_WITHIN: Final = 5.0  # seconds; an idle daemon takes a millisecond
LINES: Final = 20  # of the last it said


class Emulator:
    """A mount that is ready; `said` are the last lines of what its daemon says."""

    def __init__(self, mount: ForegroundMount, path: Path, said: deque[str]) -> None:
        self._mount = mount
        self._daemon = mount.daemon
        self._path = path
        self._said = said

    @property
    def pid(self) -> int:
        """The daemon's."""
        return self._daemon.pid

    @property
    def has_ended(self) -> bool:
        """Whether there is no daemon any more."""
        return self._daemon.poll() is not None

    def trouble(self, zygote: Zygote) -> str:
        """Why nothing more is to be had of it, in one line; "" where it serves. One that does not answer is killed, so that nobody waits for it."""
        if not self.has_ended and self._answers(zygote):
            return ""
        what = "the emulator does not answer"
        if self.has_ended:
            what = f"the emulator has ended with exit code {self._daemon.returncode}"
        self._daemon.kill()
        self._daemon.wait()
        self._mount.reader.join(_ANSWERS_WITHIN)
        return "; it said: ".join(filter(None, (what, " / ".join(self._said))))

    def _answers(self, zygote: Zygote) -> bool:
        # A process of its own asks: whoever asks a mount whose daemon is stopped waits for ever.
        with Accessor(zygote) as accessor:
            try:
                accessor.call("statvfs", str(self._path), timeout=_ANSWERS_WITHIN)
            except (AccessorTimeout, OSError):
                return False
        return True
