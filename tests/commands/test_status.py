"""`fusehsm status`: mounts, groups, who waits; and --release."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from fusehsm.fanotify.abi import O_LARGEFILE
from tests.conftest import MakeMount
from tests.support.async_listener import HOLD, listening
from tests.support.harness import Mount, fusehsm

pytestmark = [pytest.mark.fuse, pytest.mark.any_engine]


async def status(*arguments: str | Path) -> list[dict[str, Any]]:
    """`fusehsm status --json`, which must succeed."""
    done = await trio.to_thread.run_sync(lambda: fusehsm("status", "--json", *arguments))
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


async def text(*arguments: str | Path) -> str:
    """`fusehsm status`, which must succeed."""
    done = await trio.to_thread.run_sync(lambda: fusehsm("status", *arguments))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


async def test_who_waits_on_which_listener_for_how_long(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--events", "exact")
    (mount.source / "file").write_bytes(bytes(8192))
    path = str(mount.path / "file")
    (before,) = await status(mount.path)
    assert before["destination"] == str(mount.path)
    assert before["source"] == str(mount.source)
    assert before["device"] == "{}:{}".format(*mount.device)
    assert (before["events"], before["abi"]) == ("exact", "linux-6.14")
    assert (before["groups"], before["waiting"]) == ([], [])
    assert "no groups: no listener" in await text(mount.path)

    async with listening(mount.path, answer=lambda event: HOLD) as listener:
        call = accessor.start("pread_path", path, 100, 4096)
        await listener.wait_for(1)
        (now,) = await status(path)
        (group,) = now["groups"]
        assert group["class"] == "PRE_CONTENT"
        assert group["abi"] == "linux-6.14"
        (mark,) = group["marks"]
        assert (mark["type"], mark["inode"], mark["mflags"], mark["ignored_mask"]) == ("mount", None, 0, 0)
        assert (mark["events"], mark["mask"]) == (["PRE_ACCESS"], 0x100000)
        assert group["flags"] & 0xC == 8
        assert group["event_flags"] & O_LARGEFILE
        (waiter,) = now["waiting"]
        seconds = waiter.pop("seconds")
        expected = {
            "pid": accessor.pid,
            "path": path,
            "event": ["PRE_ACCESS"],
            "offset": 4096,
            "count": 4096,
            "group": 0,
        }
        assert {key: waiter[key] for key in expected} == expected
        (later,) = await status(path)
        assert later["waiting"][0]["seconds"] > seconds > 0
        shown = await text(path)
        line = rf"waiting [0-9.]+ s on group 0: process {accessor.pid}, PRE_ACCESS 4096\+4096 {re.escape(path)}\n"
        assert re.search(line, shown)
        assert "group 0: PRE_CONTENT, abi linux-6.14, 1 marks" in shown
        assert re.search(r"\n    fanotify flags:[0-9a-f]+ event-flags:[0-9a-f]+\n", shown)
        assert re.search(r"\n    fanotify mnt_id:[0-9a-f]+ mflags:0 mask:100000 ignored_mask:0\n", shown)
        assert listener.release() == 1
        assert await call.wait() == bytes(100)
        (after,) = await status(path)
        assert after["waiting"] == []


async def test_all_mounts(make_mount: MakeMount) -> None:
    mounts = [make_mount(), make_mount("--abi", "patch-v2")]
    found = {
        mount["destination"]: mount for mount in json.loads((await run_anyhow("status", "--json")).stdout)
    }
    assert [found[str(mount.path)]["abi"] for mount in mounts] == ["linux-6.14", "patch-v2"]
    shown = (await run_anyhow("status")).stdout
    assert all(f"{mount.path} (from {mount.source})\n" in shown for mount in mounts)


async def run_anyhow(*arguments: str | Path) -> Any:
    """The command, whose exit code also depends on mounts that are not ours."""
    return await trio.to_thread.run_sync(lambda: fusehsm(*arguments))


async def test_release_lets_go_what_is_parked(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--unattended", "hold", "--events", "exact")
    (mount.source / "file").write_bytes(b"content")
    path = str(mount.path / "file")
    call = accessor.start("pread_path", path, 7, 0)
    await parked(mount)
    assert not call.done
    shown = await text(mount.path)
    assert f"for a group to come: process {accessor.pid}, PRE_ACCESS 0+4096 {path}" in shown
    (released,) = await status(mount.path, "--release")
    assert released["released"] == 1
    assert await call.wait() == b"content"
    (after,) = await status(mount.path)
    assert after["waiting"] == []


async def parked(mount: Mount) -> None:
    """Wait until an access is parked."""
    with trio.fail_after(60):
        while True:
            (now,) = await status(mount.path)
            if now["waiting"]:
                assert now["waiting"][0]["group"] is None
                return


def test_a_dead_daemon_is_told(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.kill_daemon()
    done = fusehsm("status", "--json", mount.path)
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)
    assert "fusehsm umount" in found["error"]
    shown = fusehsm("status", mount.path)
    assert shown.returncode == 1
    assert f"fusehsm umount {mount.path}" in shown.stdout


def test_a_stopped_daemon_is_told(make_mount: MakeMount) -> None:
    mount = make_mount()
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        done = fusehsm("status", "--json", mount.path)
        (found,) = json.loads(done.stdout)
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    assert done.returncode == 1
    assert "does not answer" in found["error"]


def test_what_is_on_no_mount(backing: Path) -> None:
    for path in (backing, backing / "missing"):
        done = fusehsm("status", path)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"fusehsm: {path}: ")
