"""Real servers for tests, on loopback, each in a directory of its own: nginx and sshd."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.support import harness
from tests.support.harness import PATIENCE
from tests.support.requirements import require

_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


@dataclass(frozen=True)
class Served:
    """A directory and the URL at which it is served."""

    directory: Path
    url: str

    def place(self, name: str) -> "Served":
        """An empty directory in it, and its URL."""
        (self.directory / name).mkdir()
        return Served(self.directory / name, f"{self.url}/{quote(name)}")


NGINX = """
{user}
worker_processes 1;
pid {place}/nginx.pid;
error_log {place}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log {place}/access.log;
    client_body_temp_path {place}/t1; proxy_temp_path {place}/t2; fastcgi_temp_path {place}/t3;
    uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5;
    types {{}}
    default_type application/octet-stream;
    gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;
    server {{
        listen 127.0.0.1:{port};
        root {place}/www;
        autoindex on;
        location /rangeless/ {{ max_ranges 0; }}
        location /etagless/ {{ etag off; }}
        location /lying/ {{ max_ranges 0; add_header Content-Range "bytes 0-3/8" always; add_header ETag '"lie"'; return 206 "zero"; }}
        location /failing/ {{ return 503; }}
    }}
}}
"""


@contextmanager
def nginx(place: Path) -> Iterator[Served]:
    """nginx with directory pages. Below /rangeless/ it ignores Range, below /etagless/ it tells no ETag, /lying/ is always 206 with "zero",
    and /failing/ is out of order."""
    program = shutil.which("nginx", path=_PATH)
    require(program is not None, "needs nginx (the package nginx-light)")
    port = free_port()
    (place / "www").mkdir()
    place.chmod(0o755)
    user = "user root;" if os.geteuid() == 0 else ""
    (place / "nginx.conf").write_text(NGINX.format(place=place, port=port, user=user))
    command = [str(program), "-p", str(place), "-c", str(place / "nginx.conf"), "-g", "daemon off;"]
    with _running(command, port, place / "log"):
        yield Served(place / "www", f"http://127.0.0.1:{port}")


SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey {place}/host_key
PidFile {place}/sshd.pid
AuthorizedKeysFile {place}/home/.ssh/id_ed25519.pub
AuthenticationMethods publickey
PermitRootLogin yes
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""


@contextmanager
def sshd(place: Path) -> Iterator[Served]:
    """sshd with sftp, for keys only. `place`/home is a home directory that knows its host key and has the user's key."""
    program = shutil.which("sshd", path=_PATH)
    require(program is not None, "needs sshd (the package openssh-server)")
    port = free_port()
    home = place / "home" / ".ssh"
    home.mkdir(parents=True, mode=0o700)
    (place / "files").mkdir()
    for key in (place / "host_key", home / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    kind, key_text, *_ = (place / "host_key.pub").read_text().split()
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key_text}\n")
    (place / "sshd_config").write_text(SSHD.format(place=place, port=port))
    if os.geteuid() == 0:
        os.makedirs(
            "/run/sshd", mode=0o755, exist_ok=True
        )  # its chroot before login, which else its service makes
    with _running([str(program), "-D", "-e", "-f", str(place / "sshd_config")], port, place / "log"):
        user = pwd.getpwuid(os.geteuid()).pw_name
        yield Served(place / "files", f"sftp://{user}@127.0.0.1:{port}{place}/files")


def free_port() -> int:
    """A TCP port of loopback that no program uses."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ones."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[None]:
    with started(command, log) as process:
        wait_for(process, port, log)
        yield


@contextmanager
def started(command: list[str], log: Path) -> "Iterator[subprocess.Popen[str]]":
    """A server, with its children in a process group of their own that goes with it. It need not answer yet: wait_for()."""
    with open(log, "w") as output:
        process = harness.start(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)
        with suppress(ProcessLookupError):  # who still serves a connection that a test has not closed
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: "subprocess.Popen[str]", port: int, log: Path) -> None:
    """Return when the server accepts connections at that port."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{process.args!r} does not answer"
            time.sleep(0.01)
