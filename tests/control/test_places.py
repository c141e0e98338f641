"""Where a user without a session has the control sockets: nobody else can make that place first, and clients find it."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.control.socket import connect, directories, listening, peer_of
from fusehsm.linux.mountinfo import FILESYSTEM_TYPE, Mount
from tests.support.requirements import require_root
from tests.support.tier.others import ALICE, MALLORY

_DEVICE = (4095, 7)  # of no mount
_MOUNT = Mount(1, _DEVICE, "/", "/point", FILESYSTEM_TYPE, "source", ALICE)


@pytest.fixture
def squatted(tmp_path: Path) -> Iterator[list[Path]]:
    """Mallory's directories with the names that Alice's could have, each with a socket that is listened on."""
    require_root()
    if os.path.exists(f"/run/user/{ALICE}"):
        pytest.skip(f"user {ALICE} has a session")
    places = [
        Path(f"/tmp/fusehsm-{ALICE}"),
        Path(f"/tmp/fusehsm-{ALICE}-{os.getpid()}"),
        Path(f"/tmp/fusehsm-{ALICE}-link"),
    ]
    sockets = []
    (tmp_path / "theirs").mkdir()
    try:
        for place in places[:2]:
            place.mkdir(mode=0o700)
            fake = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fake.bind(str(place / "{}:{}".format(*_DEVICE)))
            fake.listen()
            sockets.append(fake)
            os.chown(place, MALLORY, MALLORY)
        places[2].symlink_to(tmp_path / "theirs")
        os.chown(places[2], ALICE, ALICE, follow_symlinks=False)
        yield places
    finally:
        for fake in sockets:
            fake.close()
        for place in places[:2]:
            shutil.rmtree(place, ignore_errors=True)
        places[2].unlink(missing_ok=True)
        for place in map(Path, directories(ALICE)):
            shutil.rmtree(place, ignore_errors=True)


def _as_alice(act: Callable[[], None]) -> int:
    """Call it in a process of Alice's, without a session; returns the process."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.pop("XDG_RUNTIME_DIR", None)
            os.setgroups([])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            act()
        finally:
            os._exit(0)
    return pid


def test_another_users_directory_is_no_obstacle_and_no_trap(squatted: list[Path]) -> None:
    for _ in range(2):  # the second time the place is there already
        reader, writer = os.pipe()
        ours, alices = socket.socketpair()

        def serve(writer: int = writer, alices: socket.socket = alices, ours: socket.socket = ours) -> None:
            ours.close()
            with listening(_DEVICE):
                os.write(writer, b"ready")
                alices.recv(1)

        pid = _as_alice(serve)
        os.close(writer)
        try:
            assert os.read(reader, 5) == b"ready"
            connection = connect(_MOUNT)
            assert peer_of(connection).uid == ALICE
            assert peer_of(connection).pid == pid
            connection.close()
            (place,) = directories(ALICE)[1:]
            assert place not in map(str, squatted)
            assert os.stat(place).st_mode & 0o777 == 0o700
        finally:
            os.close(reader)
            ours.close()
            alices.close()
            os.waitpid(pid, 0)


def test_without_a_server_it_is_said_to_be_gone(squatted: list[Path]) -> None:
    with pytest.raises(OSError, match="no control socket in"):
        connect(_MOUNT)
