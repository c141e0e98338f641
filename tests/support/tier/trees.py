"""Trees for tests: made from a description, and described again."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusehsm.tier.stubs.tree import Namespace

Description = Mapping[bytes, tuple[Any, ...]]


def content_of(size: int, seed: int = 1) -> bytes:
    """Bytes that differ at every offset and from seed to seed."""
    return b"".join((index * 8 + seed).to_bytes(8, "little") for index in range(-(-size // 8)))[:size]


def make_small_tree(root: Path) -> None:
    """Some of everything."""
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "hollow").mkdir()
    (root / "a file").write_bytes(content_of(100_000))
    (root / "sub" / "b#?%&.bin").write_bytes(content_of(5000, 2))
    (root / "sub" / "deep" / "http-like:name@2x").write_bytes(content_of(10, 3))
    (root / "empty").touch()
    (root / "sub" / "sp\u00e4t").write_bytes(b"late")
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, ns=(1_700_000_000_000_000_000 + number * 1_000_000_000,) * 2)


def files_of(root: Path) -> dict[str, bytes]:
    """The content of every file, by relative path."""
    return {
        os.fsdecode(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


@dataclass(frozen=True)
class Telling:
    """What of a tree is compared; a store that knows less tells less."""

    modes: bool = True
    owners: bool = True
    times: int = 1  # nanoseconds of the store's clock; 0: it knows no times
    hard_links: bool = True
    symlinks: bool = True
    directory_times: bool = True


def describe(root: Path, telling: Telling = Telling()) -> Description:
    """Every path below `root` with what it is; hard links by the first of their names."""
    found: dict[bytes, tuple[Any, ...]] = {}
    names: dict[int, bytes] = {}
    base = os.fsencode(root)
    for directory, directories, files in os.walk(base):
        directories.sort()
        for name in sorted(directories + files):
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, base)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            is_link, is_file = kind == stat.S_IFLNK, kind == stat.S_IFREG
            if is_link and not telling.symlinks:
                continue
            timed = telling.times and (telling.directory_times or kind != stat.S_IFDIR)
            found[relative] = (
                kind,
                status.st_size if is_file else None,
                stat.S_IMODE(status.st_mode) if telling.modes and not is_link else None,
                (status.st_uid, status.st_gid) if telling.owners else None,
                status.st_mtime_ns // telling.times if timed else None,
                os.readlink(path) if is_link else None,
                names.setdefault(status.st_ino, relative) if is_file and telling.hard_links else None,
            )
    return found


def expect_stubs(root: Path) -> None:
    """Every file below `root` has its mark and no data."""
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert any(namespace.stub in os.listxattr(path) for namespace in Namespace), path
            assert path.stat().st_blocks == 0, path


def changes_since(root: Path) -> dict[bytes, tuple[int, int]]:
    """Inode and change time of every path: who touches anything changes this."""
    base = os.fsencode(root)
    paths = [os.path.join(place, name) for place, *names in os.walk(base) for name in [*names[0], *names[1]]]
    return {path: (os.lstat(path).st_ino, os.lstat(path).st_ctime_ns) for path in paths}
