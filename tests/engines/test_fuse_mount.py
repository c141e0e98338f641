"""Mounting without libfuse: the mount's line, what is refused and how, who may, and how it goes. No server ever answers for these mounts.

Looking into such a mount would wait for an answer that never comes: what stands is read from /proc/self/mountinfo alone.
"""

import ast
import errno
import fcntl
import os
import select
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusehsm.engines.fuse_mount import Connection, MountRefused, mount, unmount
from fusehsm.linux import mountinfo
from tests.conftest import MakeMount
from tests.support.harness import (
    NOBODY,
    PATIENCE,
    command_of,
    environment,
    fuse_device_for_everybody,
    is_dead,
    start,
    unmount_lazily,
)
from tests.support.requirements import require_root

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.usefixtures("fuse")]

USUAL = frozenset(("default_permissions", "subtype=fusehsm", "fsname=/the/source"))


def lines_at(path: str | Path) -> list[tuple[str, str]]:
    """(options of the mount, options of the filesystem) of every mount there, the last mounted last."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if mountinfo.Mount.parse(line).mount_point == str(path):
                found.append((line.split(" ")[5], line.rstrip("\n").rpartition(" ")[2]))
    return found


def mount_at(path: str | Path) -> mountinfo.Mount:
    (found,) = [mount_ for mount_ in mountinfo.read_mounts() if mount_.mount_point == str(path)]
    return found


def unmount_at(path: Path, *, lazily: bool) -> None:
    """What is on top there by now."""
    unmount(str(path), mountinfo.id_at(str(path)), lazily=lazily)


def wait_until_gone(path: Path) -> None:
    with open("/proc/self/mountinfo", "rb") as mounts:
        poll = select.poll()
        poll.register(mounts, select.POLLPRI)  # proc_pid_mounts(5): a change of the list
        while lines_at(path):
            assert poll.poll(PATIENCE * 1000), "the mount has not gone"


@contextmanager
def connected(path: str | Path, *options: str) -> Iterator[Connection]:
    """A mount of this process, gone at the end."""
    connection = mount(str(path), frozenset(options) or USUAL)
    try:
        yield connection
    finally:
        connection.close()
        unmount_lazily(path)


# Holds a mount as another process, says what came of it, and does what stdin says.
HOLDER = """
import logging, sys
from fusehsm.linux import mountinfo
from fusehsm.engines import fuse_mount
point, *options = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(message)s")
try:
    connection = fuse_mount.mount(point, frozenset(options))
except fuse_mount.MountRefused as refusal:
    sys.exit(ascii(str(refusal)))
ours = mountinfo.id_at(point)
print("mounted", flush=True)
for line in sys.stdin:
    try:
        fuse_mount.unmount(point, ours, lazily=line == "lazily\\n")
        print("unmounted", flush=True)
    except OSError as error:
        print(error.errno, error.strerror, flush=True)
"""


class Holder:
    def __init__(self, path: Path, *options: str, uid: int | None = None) -> None:
        program, more, who = command_of(uid)
        command = [program[0], "-c", HOLDER, str(path), *(options or USUAL)]
        self.process = start(command, env=environment(**more), stdin=subprocess.PIPE, **who)
        self.path = path
        assert self.process.stdout is not None
        self.said: list[str] = []
        while self.said[-1:] != ["mounted"]:
            line = self.process.stdout.readline()
            assert line, self.process.communicate(timeout=PATIENCE)[1]
            self.said.append(line.rstrip("\n"))

    def ask(self, how: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(how + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


MakeHolder = Callable[..., Holder]


@pytest.fixture
def hold() -> Iterator[MakeHolder]:
    """hold(path, *options, uid=...) -> Holder of a mount; both go with the test."""
    with ExitStack() as stack:

        def make(path: Path, *options: str, **who: Any) -> Holder:
            stack.callback(unmount_lazily, path)
            holder = Holder(path, *options, **who)
            stack.callback(holder.kill)
            return holder

        yield make


@pytest.fixture
def users_mount_point(mount_point: Path) -> Iterator[Path]:
    """A directory that an ordinary user may mount on, while he may use /dev/fuse."""
    require_root()
    os.chown(mount_point, NOBODY, NOBODY)
    with fuse_device_for_everybody():
        yield mount_point


def refusal(path: str | Path, *options: str) -> str:
    """The one line that says why it is not mounted."""
    with pytest.raises(MountRefused) as caught:
        mount(str(path), USUAL | set(options))
    assert not lines_at(path)
    return str(caught.value)


def refusal_where(
    script: str, path: Path, *options: str, uid: int | None = None, through: Sequence[str] = ()
) -> str:
    """The same in a mount namespace of its own, which a shell script (as root) has changed first; `through`: a command to run it with."""
    require_root()
    program, more, _ = command_of(uid)
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid is not None else []
    inner = [*user, *through, program[0], "-c", HOLDER, str(path), *(options or USUAL)]
    command = ["unshare", "--mount", "sh", "-c", f'set -e; {script}\nexec "$@"', "sh", *inner]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
        env=environment(**more),
    )
    assert done.returncode == 1, done
    return str(ast.literal_eval(done.stderr))


# The mount's line


@pytest.mark.parametrize(
    ("options", "of_mount", "of_filesystem"),
    [
        ("", "rw,nosuid,nodev,relatime", "rw"),
        ("rw,async,atime,exec,nosuid,nodev,diratime", "rw,nosuid,nodev,relatime", "rw"),
        ("ro", "ro,nosuid,nodev,relatime", "ro"),
        ("suid", "rw,nodev,relatime", "rw"),
        ("dev", "rw,nosuid,relatime", "rw"),
        ("noexec", "rw,nosuid,nodev,noexec,relatime", "rw"),
        ("sync", "rw,nosuid,nodev,relatime", "rw,sync"),
        ("dirsync", "rw,nosuid,nodev,relatime", "rw,dirsync"),
        ("noatime", "rw,nosuid,nodev,noatime", "rw"),
        ("nodiratime", "rw,nosuid,nodev,nodiratime,relatime", "rw"),
        ("strictatime", "rw,nosuid,nodev", "rw"),
        ("lazytime", "rw,nosuid,nodev,relatime", "rw,lazytime"),
        ("nosymfollow", "rw,nosuid,nodev,relatime,nosymfollow", "rw"),
        # For fstab's readers, and what has become the rule.
        ("defaults,_netdev,noauto,nofail,user,x-systemd.automount", "rw,nosuid,nodev,relatime", "rw"),
        ("user=joe,comment=a b,X-mount.mkdir,relatime,nonempty,big_writes", "rw,nosuid,nodev,relatime", "rw"),
    ],
)
def test_options(mount_point: Path, options: str, of_mount: str, of_filesystem: str) -> None:
    with connected(mount_point, *USUAL, *filter(None, options.split(","))):
        expected = (of_mount, f"{of_filesystem},user_id=0,group_id=0,default_permissions")
        assert lines_at(mount_point) == [expected]
        found = mount_at(mount_point)
        assert (found.filesystem_type, found.source) == ("fuse.fusehsm", "/the/source")
        unmount_at(mount_point, lazily=False)
        assert not lines_at(mount_point)


@pytest.mark.parametrize("more", [(), ("auto_unmount",)], ids=["mount(2)", "fusermount3"])
def test_what_the_kernel_keeps(mount_point: Path, more: tuple[str, ...]) -> None:
    with connected(mount_point, "allow_other", "max_read=8192", "noatime", "diratime", "ro", "suid", *more):
        expected = ("ro,nodev,noatime", "ro,user_id=0,group_id=0,allow_other,max_read=8192")
        assert lines_at(mount_point) == [expected]
        assert mount_at(mount_point).source == "fusehsm"


@pytest.mark.parametrize("options", ["auto_unmount", "suid,noexec,noatime,dirsync,allow_other,fsname=name"])
def test_the_line_is_the_other_engines(make_mount: MakeMount, mount_point: Path, options: str) -> None:
    theirs = make_mount("--engine", "pyfuse3", "-o", options + ",fsname=name")
    with connected(mount_point, "default_permissions", "fsname=name", *options.split(",")):
        assert lines_at(mount_point) == lines_at(theirs.path)
        assert mount_at(mount_point).filesystem_type == mount_at(theirs.path).filesystem_type


@pytest.mark.parametrize("more", [(), ("auto_unmount",)], ids=["mount(2)", "fusermount3"])
@pytest.mark.parametrize(
    "source", ["a,b", "back\\slash\\,", "new\nline", "a b\t#", "größe", "=", "a=b,ro", "x" * 300]
)
def test_sources(mount_point: Path, source: str, more: tuple[str, ...]) -> None:
    with connected(mount_point, f"fsname={source}", *more):
        assert mount_at(mount_point).source == source
        assert lines_at(mount_point) == [("rw,nosuid,nodev,relatime", "rw,user_id=0,group_id=0")]


@pytest.mark.parametrize("more", [(), ("auto_unmount",)], ids=["mount(2)", "fusermount3"])
@pytest.mark.parametrize(
    "name", ["with space, and comma", "-o", "tab\tnewline\nbackslash\\", "größe", os.fsdecode(b"\xff\xfe")]
)
def test_mount_points(mount_point: Path, name: str, more: tuple[str, ...]) -> None:
    place = mount_point / name
    place.mkdir()
    with connected(place, *USUAL, *more):
        assert len(lines_at(place)) == 1
        unmount_at(place, lazily=False)
        assert not lines_at(place)


def test_the_descriptor(mount_point: Path) -> None:
    """It is not inherited, does not block, and has the kernel's first request at once."""
    for more in ((), ("auto_unmount",)):
        with connected(mount_point, *USUAL, *more) as connection:
            assert not os.get_inheritable(connection.descriptor)
            assert not os.get_blocking(connection.descriptor)
            assert fcntl.fcntl(connection.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            request = os.read(connection.descriptor, 1 << 20)
            assert struct.unpack_from("=II", request) == (len(request), 26)  # FUSE_INIT
            with pytest.raises(BlockingIOError):
                os.read(connection.descriptor, 1 << 20)


# What is refused


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("bogus", "-o bogus: not an option of this mount; leave it out"),
        ("bogus=3", "-o bogus=3: not an option of this mount; leave it out"),
        ("RO", "-o RO: not an option of this mount; leave it out"),
        ("ro=1", "-o ro=1: not an option of this mount; leave it out"),
        ("umask=022", "-o umask=022: not an option of this mount; leave it out"),
        ("max_read=1k", "-o max_read=1k: not a number of bytes; give one"),
        ("max_read=-1", "-o max_read=-1: not a number of bytes; give one"),
        ("max_read", "-o max_read: not a number of bytes; give one"),
        ("fd=3", "-o fd=3: fusehsm sets that; leave it out"),
        ("rootmode=40000", "-o rootmode=40000: fusehsm sets that; leave it out"),
        ("user_id=1", "-o user_id=1: fusehsm sets that; leave it out"),
        ("subtype=other", "-o subtype=other: fusehsm sets that; leave it out"),
        ("fsname=", "-o fsname=: empty; give a name"),
        ("fsname=zzz", "-o fsname=zzz: another fsname is given too; give one"),
        ("allow_root", "-o allow_root: this engine cannot let in root alone; use --allow-other"),
        ("debug", "-o debug: it is libfuse's; use --engine pyfuse3"),
    ],
)
def test_options_that_are_refused(mount_point: Path, option: str, line: str) -> None:
    assert refusal(mount_point, option).startswith(line)


def test_contradictions(mount_point: Path) -> None:
    assert refusal(mount_point, "ro", "rw") == "-o ro,rw: they contradict each other; give one"
    assert refusal(mount_point, "dev", "nodev") == "-o nodev,dev: they contradict each other; give one"
    text = refusal(mount_point, "max_read=4096", "max_read=8192")
    assert text == "-o max_read=8192: another max_read is given too; give one"


def test_an_option_that_this_kernel_lacks(mount_point: Path) -> None:
    text = refusal(mount_point, "fscontext=no such context")
    assert text == (
        f"{mount_point}: Invalid argument; leave out the context: SELinux is off, or does not accept it here"
    )


def test_an_option_that_fusermount3_lacks(mount_point: Path) -> None:
    text = refusal(mount_point, "strictatime", "auto_unmount")
    assert text == (
        f"{mount_point}: unknown option 'strictatime'; leave it out, or mount as root and without auto_unmount"
    )


def test_bad_mount_points(mount_point: Path) -> None:
    missing, file = mount_point / "missing", mount_point / "file"
    file.touch()
    assert refusal(missing) == f"{missing}: No such file or directory; create it with mkdir -p"
    assert refusal(file) == f"{file}: Not a directory; use a directory that you may enter"


def test_the_device_is_missing(mount_point: Path) -> None:
    text = refusal_where("mount -t tmpfs none /dev", mount_point)
    assert text == "/dev/fuse: No such file or directory; run modprobe fuse as root"


def test_the_device_is_for_root(mount_point: Path) -> None:
    script = "mount -t tmpfs -o mode=755 none /dev; mknod -m 600 /dev/fuse c 10 229"
    text = refusal_where(script, mount_point, uid=NOBODY)
    assert text == "/dev/fuse: Permission denied; run chmod 666 /dev/fuse as root"


def test_root_without_the_right_to_mount(mount_point: Path) -> None:
    """As in a container."""
    without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    text = refusal_where("", mount_point, through=without)
    fix = "mounting needs CAP_SYS_ADMIN, which a container must be given"
    assert text == f"{mount_point}: Operation not permitted; {fix}"
    text = refusal_where("", mount_point, "auto_unmount", through=without)
    assert text.startswith(
        f"{mount_point}: mount failed: Operation not permitted; fusermount3 must be set-uid"
    )


# Ordinary users


def test_an_ordinary_user(users_mount_point: Path, hold: MakeHolder) -> None:
    holder = hold(users_mount_point, "default_permissions", "fsname=a,b\\c", "ro", uid=NOBODY)
    of_filesystem = f"ro,user_id={NOBODY},group_id={NOBODY},default_permissions"
    assert lines_at(users_mount_point) == [("ro,nosuid,nodev,relatime", of_filesystem)]
    found = mount_at(users_mount_point)
    assert (found.is_fusehsm, found.source, found.owner_uid) == (True, "a,b\\c", NOBODY)
    assert holder.ask("") == "unmounted"
    assert not lines_at(users_mount_point)
    assert holder.ask("") == f"{errno.EINVAL} another mount is there, or none"


def test_an_ordinary_user_gets_no_suid(users_mount_point: Path, hold: MakeHolder) -> None:
    """fusermount3 ignores that, and its words are passed on."""
    holder = hold(users_mount_point, "suid", uid=NOBODY)
    assert holder.said == [f"{users_mount_point}: unsafe option suid ignored", "mounted"]
    assert lines_at(users_mount_point)[0][0] == "rw,nosuid,nodev,relatime"


def test_an_ordinary_user_unmounts_what_is_in_use(users_mount_point: Path, hold: MakeHolder) -> None:
    holder = hold(users_mount_point, uid=NOBODY)
    in_use = open_root(users_mount_point)
    try:
        answer = holder.ask("")
        assert answer.startswith(
            f"{errno.EBUSY} failed to unmount {users_mount_point}: Device or resource busy"
        )
        assert lines_at(users_mount_point)
        assert holder.ask("lazily") == "unmounted"
        assert not lines_at(users_mount_point)
    finally:
        in_use.communicate(timeout=PATIENCE)


@pytest.mark.usefixtures("users_mount_point")
def test_an_ordinary_user_on_a_directory_of_another_user(
    session_directory: Path, numbers: Iterator[int]
) -> None:
    roots = session_directory / f"roots-{next(numbers)}"
    (roots / "closed" / "inside").mkdir(parents=True)
    (roots / "closed").chmod(0o700)
    text = refusal_where("", roots, uid=NOBODY)
    assert text == (
        f"{roots}: user has no write access to mountpoint {roots}; an ordinary user mounts only on directories that they own"
    )
    for path in (roots / "closed", roots / "closed" / "inside"):
        text = refusal_where("", path, uid=NOBODY)
        assert text.startswith(f"{path}: ")
        assert text.endswith("Permission denied; use a directory that you may enter")
    roots.chmod(0o1777)
    text = refusal_where("", roots, uid=NOBODY)
    assert text == (
        f"{roots}: mountpoint {roots} not owned by user; an ordinary user mounts only on directories that they own"
    )
    text = refusal_where("", Path("/proc/self/attr"), uid=NOBODY)
    assert "; an ordinary user mounts only" in text or "; use a DST on an ordinary filesystem" in text


def test_an_ordinary_user_and_fuse_conf(users_mount_point: Path, tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    script = f"touch /etc/fuse.conf; mount --bind {conf} /etc/fuse.conf"
    conf.write_text("")
    text = refusal_where(script, users_mount_point, "allow_other", uid=NOBODY)
    assert text == (
        f"{users_mount_point}: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf; "
        "put the line user_allow_other into /etc/fuse.conf"
    )
    conf.write_text("mount_max = 0\n")
    text = refusal_where(script, users_mount_point, uid=NOBODY)
    assert text.startswith(f"{users_mount_point}: too many FUSE filesystems mounted; ")
    assert text.endswith("; unmount some of them")


def test_an_ordinary_user_without_fusermount3(users_mount_point: Path) -> None:
    text = refusal_where("", users_mount_point, uid=NOBODY, through=["env", "PATH=/nowhere"])
    assert text == "fusermount3: not found; install the package fuse3"


def test_fusermount3_without_its_rights(users_mount_point: Path, tmp_path: Path) -> None:
    script = f'cp "$(command -v fusermount3)" {tmp_path}/copy; mount --bind {tmp_path}/copy "$(command -v fusermount3)"'
    text = refusal_where(script, users_mount_point, uid=NOBODY)
    assert text.startswith(
        f"{users_mount_point}: mount failed: Operation not permitted; fusermount3 must be set-uid"
    )


# How it goes


def open_root(path: Path) -> "subprocess.Popen[str]":
    """A process that keeps the mount in use: O_PATH asks no server."""
    code = "import os, sys; os.open(sys.argv[1], os.O_PATH); print(flush=True); sys.stdin.read()"
    program, _, _ = command_of(None)
    process = start([program[0], "-c", code, str(path)], stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    return process


def test_unmounting_what_is_in_use(mount_point: Path) -> None:
    with connected(mount_point):
        in_use = open_root(mount_point)
        try:
            with pytest.raises(OSError) as caught:
                unmount_at(mount_point, lazily=False)
            assert caught.value.errno == errno.EBUSY
            assert lines_at(mount_point)
            unmount_at(mount_point, lazily=True)
            assert not lines_at(mount_point)
        finally:
            in_use.communicate(timeout=PATIENCE)


def test_what_lies_below_is_not_unmounted(mount_point: Path) -> None:
    """With SRC = DST the mount point may be a mount already, and stays when ours has gone."""
    subprocess.run(["mount", "--bind", mount_point, mount_point], check=True)
    try:
        with connected(mount_point):
            assert len(lines_at(mount_point)) == 2
            ours = mountinfo.id_at(str(mount_point))
            unmount(str(mount_point), ours, lazily=False)
            for lazily in (False, True):
                with pytest.raises(OSError) as caught:
                    unmount(str(mount_point), ours, lazily=lazily)
                assert caught.value.errno == errno.EINVAL
            assert len(lines_at(mount_point)) == 1
    finally:
        subprocess.run(["umount", mount_point], check=True)


def test_the_holder_dies(mount_point: Path, hold: MakeHolder) -> None:
    hold(mount_point).kill()
    assert len(lines_at(mount_point)) == 1
    assert is_dead(mount_point)
    unmount_at(mount_point, lazily=True)
    assert not lines_at(mount_point)


def test_the_holder_dies_with_auto_unmount(mount_point: Path, hold: MakeHolder) -> None:
    holder = hold(mount_point, *USUAL, "auto_unmount")
    assert len(lines_at(mount_point)) == 1
    holder.kill()
    wait_until_gone(mount_point)


DIES = """
import sys
from pathlib import Path
from tests.engines.test_fuse_mount import NOBODY, Holder, lines_at, wait_until_gone
path = Path(sys.argv[1])
holder = Holder(path, "auto_unmount", "allow_other", uid=NOBODY)
assert len(lines_at(path)) == 1
holder.kill()
wait_until_gone(path)
print(holder.said)
"""


def test_an_ordinary_user_dies_with_auto_unmount(
    users_mount_point: Path, tmp_path: Path, hold: MakeHolder
) -> None:
    """Where /etc/fuse.conf lets fusermount3 look into his mount; where not, he is told."""
    conf = tmp_path / "fuse.conf"
    conf.write_text("user_allow_other\n")
    script = f'touch /etc/fuse.conf; mount --bind {conf} /etc/fuse.conf; exec "$@"'
    program, _, _ = command_of(None)
    command = [
        "unshare",
        "--mount",
        "sh",
        "-ec",
        script,
        "sh",
        program[0],
        "-c",
        DIES,
        str(users_mount_point),
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=PATIENCE, env=environment()
    )
    assert (done.returncode, done.stdout) == (0, "['mounted']\n"), done.stderr
    told = f"{users_mount_point}: -o auto_unmount may do nothing for ordinary users without allow_other"
    assert hold(users_mount_point, "auto_unmount", uid=NOBODY).said == [told, "mounted"]


def test_closing(mount_point: Path) -> None:
    """Without auto_unmount a dead mount stays, to be unmounted; with it, nothing."""
    connection = mount(str(mount_point), USUAL)
    connection.close()
    assert is_dead(mount_point)
    unmount_at(mount_point, lazily=False)
    connection = mount(str(mount_point), USUAL | {"auto_unmount"})
    connection.close()
    assert connection.helper is not None
    assert connection.helper.returncode == 0
    assert not lines_at(mount_point)
