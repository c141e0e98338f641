"""Extended attributes: one expectation, held against a plain ext4 directory and against mounts over others."""

import errno
import os
from pathlib import Path

import pytest

from tests.overlay.test_posix import make
from tests.support.posix_trees import Errno, Tree, outcome

pytestmark = pytest.mark.fuse


def test_extended_attributes(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        found: list[object] = [
            outcome(os.setxattr, name, "user.one", b"1", os.XATTR_CREATE),
            outcome(os.setxattr, name, "user.one", b"2", os.XATTR_CREATE),
            outcome(os.setxattr, name, "user.one", b"22", os.XATTR_REPLACE),
            outcome(os.setxattr, name, "user.two", b"2", os.XATTR_REPLACE),
            outcome(os.setxattr, name, "user.empty", b""),
            outcome(os.setxattr, name, b"user.\xff\xfe", bytes(range(256))),
            outcome(os.setxattr, path, "user.directory", b"too"),
            outcome(os.setxattr, name, "trusted.secret", b"root's"),
            sorted(os.listxattr(name)),
            os.getxattr(name, "user.one"),
            os.getxattr(name, "user.empty"),
            os.getxattr(name, b"user.\xff\xfe") == bytes(range(256)),
            outcome(os.getxattr, name, "user.none"),
            outcome(os.removexattr, name, "user.empty"),
            outcome(os.removexattr, name, "user.empty"),
            outcome(os.setxattr, name, "user." + "n" * 251, b""),
            outcome(os.setxattr, name, "unknown.namespace", b""),
            outcome(os.setxattr, name, "user.large", bytes(3500)),
            outcome(os.setxattr, name, "user.huge", bytes(65537)),
            outcome(os.removexattr, name, "user.large"),
        ]
        os.symlink("file", path / "link")
        found.append(outcome(os.setxattr, path / "link", "user.x", b"", 0, follow_symlinks=False))
        found.append(os.getxattr(path / "link", "user.one"))
        return found

    assert tree.run(act) == [
        None,
        Errno(errno.EEXIST),
        None,
        Errno(errno.ENODATA),
        None,
        None,
        None,
        None,
        sorted(["user.one", "user.empty", os.fsdecode(b"user.\xff\xfe"), "trusted.secret"]),
        b"22",
        b"",
        True,
        Errno(errno.ENODATA),
        None,
        Errno(errno.ENODATA),
        Errno(errno.ERANGE),
        Errno(errno.EOPNOTSUPP),
        None,
        Errno(errno.E2BIG),
        None,
        Errno(errno.EPERM),
        b"22",
    ]
