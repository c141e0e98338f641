"""What one user can hold of a daemon's descriptors: never so much that the others, or the control socket, have none."""

import os

import pytest

from tests.conftest import MakeAccessor, MakeMount
from tests.support.harness import Mount, fusehsm
from tests.support.requirements import require_root

pytestmark = [pytest.mark.fuse, pytest.mark.root]

DESCRIPTORS = 300  # of the daemon
MANY = 2 * DESCRIPTORS
USER, OTHER = 54321, 54322


@pytest.fixture(params=["exact", "first-access"])
def mount(make_mount: MakeMount, request: pytest.FixtureRequest) -> Mount:
    require_root()
    made = make_mount(
        "--allow-other", "--events", request.param, "--cache", "shared", descriptors=DESCRIPTORS
    )
    (made.source / "public").mkdir()
    os.chmod(made.source / "public", 0o1777)
    for number in range(50):
        (made.source / "public" / f"file-{number}").write_bytes(b"content")
    return made


def hold(path: str, number: int, how: str) -> tuple[int, int]:
    """Open so much, and keep it; how much that was, and the errno that ended it."""
    held: list[int] = []
    os.held = held  # type: ignore[attr-defined]
    for each in range(number):
        try:
            if how == "directories":
                held.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
            elif how == "directories that are read":
                held.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
                os.listdir(held[-1])
            else:
                name = f"{path}/mine-{os.getpid()}-{each}"
                held.append(os.open(name, os.O_RDWR | os.O_CREAT, 0o600))
                os.write(held[-1], b"mine")
                if how == "removed files":
                    os.unlink(name)
        except OSError as error:
            return len(held), error.errno or 0
    return len(held), 0


@pytest.mark.parametrize(
    "how",
    ["directories", "directories that are read", "files", "removed files"],
    ids=lambda how: how.replace(" ", "-"),
)
async def test_what_a_user_holds_is_not_missed_by_others(
    mount: Mount, make_accessor: MakeAccessor, how: str
) -> None:
    user, other = make_accessor(uid=USER, gid=USER), make_accessor(uid=OTHER, gid=OTHER)
    place = str(mount.path / "public")
    held, ended = await user.run(hold, place, MANY, how)
    assert (held, ended) == (MANY, 0)
    names = await other.run("listdir", place)
    assert {f"file-{number}" for number in range(50)} <= {*names}
    for number in range(50):
        assert await other.run("read_file", f"{place}/file-{number}") == b"content"
    assert (await other.run(hold, place, 10, "removed files")) == (10, 0)
    status = fusehsm("status", str(mount.path))
    assert status.returncode == 0, status.stderr
