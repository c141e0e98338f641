"""Several machines' worth of clients of one store: each with a network of its own, a line to the store that can be cut, and a meter on that line.

A node's network lives as long as a process that holds it, so nothing is left behind, whatever becomes of the tests.
"""

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.support import harness
from tests.support.requirements import require, require_root
from tests.support.tier.fetching import Fetching, fetching
from tests.support.tier.relay import Relay, relay
from tests.support.tier.s3_server import S3

_PATH: Final = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


@dataclass(frozen=True)
class Node:
    """`path`: where its stubs are. `line`: what it asks the store for. `interface`: this side's end of its cable."""

    path: Path
    line: Relay
    interface: str
    environment: Mapping[str, str]
    _holder: int

    @property
    def within(self) -> tuple[str, ...]:
        """What a command is to begin with to run on this node. Mounts and processes are everybody's, only the network is its own."""
        return ("nsenter", f"--net=/proc/{self._holder}/ns/net", "--")

    def fusehsm(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a command there."""
        command = [*self.within, *harness.COMMAND, *map(str, arguments)]
        with harness.start(command, env=self.environment) as process:
            try:
                output, complaint = process.communicate(timeout=harness.PATIENCE)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, output, complaint)

    def populate(self, store: str) -> None:
        """Make stubs of everything."""
        done = self.fusehsm("populate", store, self.path)
        assert (done.returncode, done.stderr) == (0, "")

    @contextmanager
    def fetching(self, store: str, *options: str) -> Iterator[Fetching]:
        """Serve them."""
        with fetching(store, self.path, *options, within=self.within, env=self.environment) as served:
            yield served

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.interface, "down")

    def fix(self) -> None:
        """Put it back."""
        _ip("link", "set", self.interface, "up")

    def asked(self) -> Counter[str]:
        """How many requests of each kind there have been since the last call: LIST, HEAD, GET."""
        lines = [self.line.asked.pop(0) for _ in range(len(self.line.asked))]
        return Counter("LIST" if "list-type=" in line else line.split(" ", 1)[0] for line in lines)


@contextmanager
def node(s3: S3, path: Path) -> Iterator[Node]:
    """A machine with a cable to the store. Needs root."""
    require_root()
    for program in ("ip", "nsenter", "unshare"):
        require(shutil.which(program, path=_PATH) is not None, f"needs {program} (iproute2, util-linux)")
    with harness.start(["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"]) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            # Of a range for tests of networks (RFC 2544), in which others may be at work at the same time.
            network = random.randrange(1 << 15) * 4
            ours, theirs = (
                f"198.{18 + (network >> 16)}.{network >> 8 & 255}.{network & 255 | host}" for host in (1, 2)
            )
            interface = f"hsm{holder.pid}"
            _ip("link", "add", interface, "type", "veth", "peer", "name", "cable", "netns", str(holder.pid))
            _ip("address", "add", f"{ours}/30", "dev", interface)
            _ip("link", "set", interface, "up")
            within = ("nsenter", f"--net=/proc/{holder.pid}/ns/net", "--")
            _ip("address", "add", f"{theirs}/30", "dev", "cable", within=within)
            _ip("link", "set", "cable", "up", within=within)
            _ip("link", "set", "lo", "up", within=within)
            with relay(s3.endpoint, ours) as line:
                environment = harness.environment(**replace(s3, endpoint=line.endpoint).environment)
                yield Node(path, line, interface, environment, holder.pid)
        finally:
            holder.kill()


def _ip(*arguments: str, within: tuple[str, ...] = ()) -> None:
    subprocess.run([*within, "ip", *arguments], check=True, env={**os.environ, "PATH": _PATH})
