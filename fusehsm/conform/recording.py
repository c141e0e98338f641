"""Recorded streams in a file: of a real kernel, for machines without one, and of the emulator for workloads with a divergence."""

import datetime
import json
import os
import platform
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusehsm.conform.stream import Stream, from_json, to_json

SHIPPED = Path(__file__).with_name("recorded") / "kernel.json"


@dataclass(slots=True)
class Recording:
    """All recorded streams."""

    #: The kernel's release, as `uname -r` prints it.
    release: str = ""
    #: The machine's architecture.
    machine: str = ""
    #: The day of the last recording, YYYY-MM-DD.
    date: str = ""
    #: The real kernel's streams, by the workload's key.
    kernel: dict[str, Stream] = field(default_factory=dict)
    #: The emulator's streams of workloads with a divergence, by "ENGINE: KEY".
    emulated: dict[str, Stream] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = SHIPPED) -> "Recording":
        """Read a recording. Raises OSError if the file cannot be read, and ValueError if it is not a recording."""
        try:
            found = json.loads(path.read_text())
            return cls(
                found["release"],
                found["machine"],
                found["date"],
                {key: from_json(entries) for key, entries in found["kernel"].items()},
                {key: from_json(entries) for key, entries in found["emulated"].items()},
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a recording ({error}); make it anew with --record") from None

    def of_this_kernel(self) -> None:
        """Set release, machine and date to those of the running kernel and of today."""
        self.release, self.machine = os.uname().release, platform.machine()
        self.date = datetime.date.today().isoformat()

    def keep_only(self, keys: Collection[str]) -> None:
        """Remove the streams of workloads that do not exist any more."""
        self.kernel = {key: stream for key, stream in self.kernel.items() if key in keys}
        self.emulated = {
            name: stream for name, stream in self.emulated.items() if name.partition(": ")[2] in keys
        }

    def save(self, path: Path = SHIPPED) -> None:
        """Write the file, one event a line, so that a diff is readable. The file is replaced as a whole or not at all."""
        path.parent.mkdir(exist_ok=True)
        head = {"release": self.release, "machine": self.machine, "date": self.date}
        parts = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        parts += [_streams("kernel", self.kernel), _streams("emulated", self.emulated)]
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write("{\n" + ",\n".join(parts) + "\n}\n")
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def _streams(name: str, streams: dict[str, Stream]) -> str:
    each = [f"    {json.dumps(key)}: {_entries(to_json(stream))}" for key, stream in sorted(streams.items())]
    return f'  "{name}": {{\n' + ",\n".join(each) + "\n  }"


def _entries(entries: list[dict[str, Any]]) -> str:
    return "[" + ",".join(f"\n      {json.dumps(entry)}" for entry in entries) + "\n    ]"
