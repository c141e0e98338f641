"""Programs at work: what cp, tar, sqlite and git do on a plain ext4 directory, they do on mounts over others."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.overlay.test_posix import make
from tests.overlay.test_posix_names import names_of
from tests.support.posix_trees import Tree

pytestmark = pytest.mark.fuse


def test_copies_keep_everything(tree: Tree) -> None:
    def act(path: Path) -> object:
        origin = path / "origin"
        (origin / "sub").mkdir(parents=True)
        make(origin / "file", b"content" * 1000, 0o750)
        os.setxattr(origin / "file", "user.colour", b"blue")
        os.link(origin / "file", origin / "sub" / "hard")
        os.symlink("../file", origin / "sub" / "soft")
        os.mkfifo(origin / "fifo")
        os.chown(origin / "sub", 1234, 5678)
        os.utime(origin / "file", ns=(1_111_111_111, 1_222_222_222))
        (path / "by tar").mkdir()
        subprocess.run(["cp", "-a", origin, path / "by cp"], check=True)
        packed = subprocess.run(
            ["tar", "-C", origin, "--xattrs", "-cf", "-", "."], check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "-C", path / "by tar", "--xattrs", "-xpf", "-"], input=packed, check=True)
        for copy in ("by cp", "by tar"):
            status, hard = os.stat(path / copy / "file"), os.stat(path / copy / "sub" / "hard")
            assert status.st_ino == hard.st_ino
            assert os.getxattr(path / copy / "file", "user.colour") == b"blue"
            assert status.st_mtime_ns == 1_222_222_222
        return names_of(path / "by cp"), names_of(path / "by tar")

    expected = [".", "..", "fifo", "file", "sub"]
    assert tree.run(act) == (expected, expected)


def test_sqlite_works(tree: Tree) -> None:
    def act(path: Path) -> object:
        import sqlite3

        answers = []
        for mode in ("delete", "truncate", "persist"):
            with sqlite3.connect(path / f"{mode}.db", isolation_level=None) as database:
                database.execute(f"pragma journal_mode={mode}")
                database.execute("create table t(number integer primary key, text)")
                for _ in range(3):
                    database.execute("begin")
                    database.executemany("insert into t(text) values(?)", [("x" * 100,)] * 300)
                    database.execute("commit")
                database.execute("begin")
                database.execute("delete from t")
                database.execute("rollback")
                database.execute("vacuum")
                answers.append(
                    (
                        database.execute("select count(*) from t").fetchone(),
                        database.execute("pragma integrity_check").fetchone(),
                    )
                )
            database.close()
        for file in path.iterdir():
            file.unlink()
        return answers

    assert tree.run(act) == [((900,), ("ok",))] * 3


def test_git_works(tree: Tree) -> None:
    def act(path: Path) -> object:
        environment = {**os.environ, "HOME": str(path), "GIT_CONFIG_NOSYSTEM": "1"}
        place = path / "repository"
        place.mkdir()

        def git(*words: str) -> str:
            command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(place), *words]
            return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

        git("init", "-q")
        for number in range(30):
            make(place / f"file {number}", b"%d\n" % number * 100)
        git("add", ".")
        git("commit", "-qm", "first")
        (place / "file 3").write_bytes(b"changed\n")
        git("mv", "file 4", "renamed")
        changed = git("status", "--porcelain")
        git("commit", "-qam", "second")
        git("checkout", "-q", "HEAD~1")
        back = (place / "file 3").read_bytes()[:4]
        git("gc", "-q")
        git("fsck", "--strict")
        log = git("log", "--all", "--format=%s")
        subprocess.run(["rm", "-rf", place], check=True)
        return changed, back, log

    assert tree.run(act) == (' M "file 3"\nR  "file 4" -> renamed\n', b"3\n3\n", "second\nfirst\n")
