"""A web server (nginx) on the loopback interface, as a store."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.scene import SceneError, end

PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
PATIENCE = 10  # seconds until nginx must answer
CONFIGURATION = """
{user}
worker_processes 1;
pid {place}/nginx.pid;
error_log {place}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    client_body_temp_path {place}/t1; proxy_temp_path {place}/t2; fastcgi_temp_path {place}/t3;
    uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5;
    types {{}}
    default_type application/octet-stream;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        autoindex on;
    }}
}}
"""


def has_nginx() -> bool:
    """Whether nginx is installed."""
    return shutil.which("nginx", path=PATH) is not None


@contextmanager
def web_server(root: Path, place: Path) -> Iterator[str]:
    """Serve `root` with directory pages; yields the URL. `place`: a new directory for nginx's own files. Raises SceneError without an answer."""
    place.mkdir()
    place.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""
    configuration = place / "nginx.conf"
    configuration.write_text(
        CONFIGURATION.format(place=place, port=port, user=user, root=root), encoding="utf-8"
    )
    nginx = shutil.which("nginx", path=PATH)
    if nginx is None:
        raise SceneError("nginx: not found")
    process = subprocess.Popen(
        [nginx, "-p", str(place), "-c", str(configuration), "-g", "daemon off;"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for_answer(process, port, place / "error.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process)


def _wait_for_answer(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
            return
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SceneError(f"nginx does not answer: {log.read_text(encoding='utf-8')}") from None
            time.sleep(0.02)
