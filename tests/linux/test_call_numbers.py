"""The tables of system call numbers, against the headers of the kernel. Those of arm64 are the generic ones, which lie on every machine."""

import platform
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from fusehsm.linux import call_mount, system_call
from fusehsm.supervisor.numbers import architecture
from tests.support.requirements import require

GENERIC = Path("/usr/include/asm-generic/unistd.h")  # as arm64 and other young architectures have it
MACHINES = ("x86_64", "aarch64")
# In the order of call_mount's tables. arm64 lacks open(2) and its like.
BY_DESCRIPTOR = {
    **dict.fromkeys(("read", "write", "pread64", "pwrite64", "readv", "writev"), (0,)),
    **dict.fromkeys(("preadv", "pwritev", "preadv2", "pwritev2"), (0,)),
    **dict.fromkeys(("ftruncate", "getdents", "readahead", "getdents64", "fadvise64", "fallocate"), (0,)),
    "sendfile": (0, 1),
    "splice": (0, 2),
    "copy_file_range": (0, 2),
    "mmap": (4,),
}
BY_PATH = {
    **dict.fromkeys(("open", "execve", "truncate", "creat"), (None, 0)),
    **dict.fromkeys(("openat", "execveat", "openat2"), (0, 1)),
}


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def numbers(machine: str) -> dict[str, int]:
    """The numbers of the machine's calls by name."""
    if machine == platform.machine():
        source = "#include <asm/unistd.h>"
    else:
        require(machine == "aarch64", f"needs the headers of {machine}")
        require(GENERIC.exists(), f"needs {GENERIC}")
        source = f'#include "{GENERIC}"'
    command = ["gcc", "-E", "-dM", "-D__BITS_PER_LONG=64", "-x", "c", "-"]
    macros = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    defined: dict[str, str] = dict(re.findall(r"^#define (__NR\w+) (\w+)$", macros, re.MULTILINE))
    found = {}
    for name, value in defined.items():
        value = defined.get(value, value)  # __NR_fcntl is __NR3264_fcntl
        if name.startswith("__NR_") and value.isdigit():
            found[name.removeprefix("__NR_")] = int(value)
    assert len(found) > 300
    return found


def test_calls_of_accessors(machine: str, numbers: dict[str, int]) -> None:
    table = system_call._NUMBERS[machine]
    names = [field.name for field in fields(table)]
    assert {name: getattr(table, name) for name in names} == {name: numbers[name] for name in names}


def test_calls_of_listeners(machine: str, numbers: dict[str, int]) -> None:
    table = architecture(machine)
    names = [field.name for field in fields(table) if field.name != "audit"]
    assert {name: getattr(table, name) for name in names} == {name: numbers.get(name) for name in names}


def test_calls_on_descriptors(machine: str, numbers: dict[str, int]) -> None:
    expected = {numbers[name]: places for name, places in BY_DESCRIPTOR.items() if name in numbers}
    assert call_mount._DESCRIPTORS[machine] == expected


def test_calls_with_paths(machine: str, numbers: dict[str, int]) -> None:
    expected = {numbers[name]: places for name, places in BY_PATH.items() if name in numbers}
    assert call_mount._PATHS[machine] == expected
