"""Streams kept in a file: of a real kernel, for machines without one, and of the emulator where it is known to differ."""

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
    """`kernel` and `emulated`: streams by the workload's key; `emulated` has only those that differ, under "engine: key"."""

    release: str = ""
    machine: str = ""
    date: str = ""
    kernel: dict[str, Stream] = field(default_factory=dict)
    emulated: dict[str, Stream] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = SHIPPED) -> "Recording":
        """Raises OSError where there is no such file, ValueError where it is not one of ours."""
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
        """Say that what is recorded now is of the running kernel."""
        self.release, self.machine = os.uname().release, platform.machine()
        self.date = datetime.date.today().isoformat()

    def keep_only(self, keys: Collection[str]) -> None:
        """Forget workloads that are none any more."""
        self.kernel = {key: stream for key, stream in self.kernel.items() if key in keys}
        self.emulated = {
            name: stream for name, stream in self.emulated.items() if name.partition(": ")[2] in keys
        }

    def save(self, path: Path = SHIPPED) -> None:
        """One event a line, so that changes can be read. Replaces the file as a whole, or not at all."""
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
