"""acting_as(): a thread is itself again afterwards, also where it could not become another."""

import ctypes
import os
from collections.abc import Callable

import pytest

from fusehsm.linux.identity import acting_as
from tests.support.harness import NOBODY
from tests.support.requirements import require_root

CLONE_NEWUSER = 0x10000000


def identity() -> list[str]:
    with open("/proc/thread-self/status") as lines:
        return [line for line in lines if line.startswith(("Uid", "Gid", "Groups", "CapEff", "CapPrm"))]


def in_user_namespace(function: Callable[[], str]) -> str:
    """What `function` says in a process in whose user namespace all users exist, and setgroups(2) is forbidden."""

    asking, asked = os.pipe()
    mapping, mapped = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = f"unshare: {ctypes.get_errno()}"
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER) == 0:
                os.write(asked, b"x")
                os.read(mapping, 1)
                said = function()
        except BaseException as error:
            said = repr(error)
        os.write(asked, said.encode())
        os._exit(0)
    os.close(asked)
    with os.fdopen(asking, "rb") as answer:
        assert answer.read(1) == b"x"
        for name, text in (("setgroups", "deny"), ("uid_map", "0 0 65536"), ("gid_map", "0 0 65536")):
            with open(f"/proc/{child}/{name}", "w") as file:
                file.write(text)
        os.write(mapped, b"x")
        said = answer.read().decode()
    for end in (mapping, mapped):
        os.close(end)
    os.waitpid(child, 0)
    return said


def try_it() -> str:
    before = identity()
    try:
        with acting_as(NOBODY, NOBODY, [7], 0):
            return "nothing forbade it"
    except PermissionError:
        return "itself again" if identity() == before else f"{before} is {identity()}"


def test_groups_that_cannot_be_set() -> None:
    require_root()
    assert in_user_namespace(try_it) == "itself again"


@pytest.mark.parametrize("effective", [0, 1, (1 << 41) - 1])
def test_afterwards_all_is_as_before(effective: int) -> None:
    require_root()
    before = identity()
    with acting_as(NOBODY, NOBODY + 1, [7, 8], effective):
        inside = identity()
    assert identity() == before
    words = [line.split() for line in inside]
    assert (words[0][4], words[1][4], words[2][1:]) == (str(NOBODY), str(NOBODY + 1), ["7", "8"])
    own = int(next(line for line in before if line.startswith("CapEff")).split()[1], 16)
    assert int(next(line for line in inside if line.startswith("CapEff")).split()[1], 16) == own & effective
