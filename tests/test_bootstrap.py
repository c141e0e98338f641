"""scripts/bootstrap.sh: the packages for each make target."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.harness import PATIENCE, ROOT, environment

SCRIPT = ROOT / "scripts" / "bootstrap.sh"
SERVERS = {"nginx-light", "openssh-server", "memcached"}
TO_BUILD = {"gcc", "libc6-dev", "pkg-config", "libfuse3-dev"}
TO_MOUNT = {"fuse3", "mount", "kmod"}


def packages(target: str) -> set[str]:
    """The packages that a target uses, but those of the Python interpreter, which has a version in their names."""
    done = subprocess.run(
        [SCRIPT, "--list", target], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    listed = done.stdout.split()
    assert len(listed) == len(set(listed))
    return {package for package in listed if not re.fullmatch(r"python3(\.\d+)?(-venv|-dev)?", package)}


def test_the_demonstration_installs_nothing_but_what_it_uses() -> None:
    assert packages("demo") == TO_BUILD | TO_MOUNT


def test_the_benchmark_installs_what_it_compares_with() -> None:
    assert packages("bench") - packages("demo") == {"e2fsprogs", "bindfs", "rsync", "curl", "nginx-light"}


def test_the_tests_install_their_servers_and_programs() -> None:
    wanted = packages("tests")
    assert wanted > packages("demo") | SERVERS | {"golang-go", "strace", "git", "sqlite3", "acl", "attr"}


def test_all_packages_are_named_before_the_first_is_installed(tmp_path: Path) -> None:
    """On a machine without any tool, whose package sources fail."""
    for tool in ("bash", "readlink", "tr", "awk", "sed", "dirname", "cat"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    (tmp_path / "python3").symlink_to(os.path.realpath(sys.executable))
    for tool, script in {"id": "echo 0", "apt-get": 'echo "called: apt-get $*" >&2; exit 1'}.items():
        (tmp_path / tool).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    for target, some in {
        "demo": {"gcc", "fuse3"},
        "tests": {"gcc", "golang-go", "sqlite3", "memcached"},
    }.items():
        done = subprocess.run(
            [SCRIPT, target],
            env=environment(PATH=str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 1
        first, *more = done.stderr.splitlines()
        assert first.startswith("setup: installing ")
        assert set(first.split()) > some
        assert [line.partition(";")[0] for line in more] == [
            "called: apt-get -qq update",
            "setup: apt-get update failed",
        ]
