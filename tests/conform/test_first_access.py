"""`fusehsm conform --events first-access`: every byte that the kernel asks for is asked for, and nothing beyond its read-ahead."""

import json
from dataclasses import replace

import pytest

from fusehsm.conform import coverage
from fusehsm.conform.perform import Comparison, Verdict
from fusehsm.conform.stream import Did, Heard, Stream
from fusehsm.conform.workload import one_call
from fusehsm.conform.workloads import BYTES, WORKLOADS, chosen, sample
from tests.support.harness import fusehsm

SIZE = 20000
DID = Did("accessor", "pread", "b''")
OTHER_DID = Did("accessor", "pread", "EIO")


def asked(offset: int, count: int, path: str = "file") -> Heard:
    return Heard("group 1", "PRE_ACCESS", "accessor", path, offset, count, "00", "ALLOW")


@pytest.mark.parametrize(
    ("kernel", "emulated", "complaint"),
    [
        ([asked(4096, 8192), DID], [asked(0, SIZE), DID], ""),
        ([asked(4096, 8192), DID], [asked(8192, 4096), asked(4096, 4096), DID], ""),
        ([asked(4096, 8192), DID], [asked(4096, 4096), DID], "bytes 8192 to 12288 of file were not asked for"),
        ([asked(4096, 8192), DID], [DID], "bytes 4096 to 12288 of file were not asked for"),
        ([asked(16384, 8192), DID], [asked(16384, 4096), DID], ""),  # behind the end of the file there is nothing
        ([asked(0, 4096), DID], [asked(0, 4096 + coverage.READ_AHEAD), DID], ""),
        ([asked(0, 1), DID], [asked(0, 8192 + coverage.READ_AHEAD), DID], "bytes 266240 to 270336 of file were asked for"),
        ([DID], [asked(0, 4096), DID], "bytes 0 to 4096 of file were asked for"),
        ([asked(0, 4096)], [asked(0, 4096), asked(0, 4096, "other")], "bytes 0 to 4096 of other were asked for"),
        ([asked(0, 4096), DID], [asked(0, 4096), OTHER_DID], "-accessor: pread = b''"),
    ],
)  # fmt: skip
def test_what_is_wrong(kernel: Stream, emulated: Stream, complaint: str) -> None:
    found = coverage.faults(kernel, emulated, {"file": SIZE})
    assert found[:1] == ([complaint] if complaint else [])


def test_verdicts() -> None:
    workload = one_call("family", "name", "stat")
    kernel: Stream = [asked(0, 8192), DID]
    comparison = Comparison(workload, kernel, [asked(0, 12288), DID], (), sizes={})
    assert comparison.verdict is Verdict.COVERED
    assert replace(comparison, emulated=[asked(0, 4096), DID]).verdict is Verdict.DIFFERENT
    assert replace(comparison, emulated=[asked(0, 4096), DID], divergences=("pid",)).verdict is Verdict.KNOWN
    assert "bytes 0 to 8192 of file were not asked for" in replace(comparison, emulated=[DID]).difference()
    assert replace(comparison, sizes=None).verdict is Verdict.DIFFERENT


def test_a_sample_is_fixed_and_in_order() -> None:
    workloads = chosen(BYTES)
    some = sample(workloads, 100)
    assert len(some) == 100
    assert some == [workload for workload in workloads if workload in some]
    assert len({workload.family for workload in some}) >= 8
    assert sample(workloads, None) == workloads
    without = [workload for workload in workloads if workload is not some[7]]
    assert len(set(sample(without, 100)) - set(some)) == 1
    with pytest.raises(ValueError, match="a sample of 0 workloads has none"):
        sample(WORKLOADS, 0)


@pytest.mark.fuse
@pytest.mark.any_engine
def test_a_sample_in_first_access_mode() -> None:
    done = fusehsm("conform", "--events", "first-access", "--sample", "100", "--json")
    assert done.returncode == 0, done.stdout
    found = [json.loads(line)["verdict"] for line in done.stdout.splitlines()]
    assert len(found) == 100
    assert found.count(Verdict.COVERED.value) > 70


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--events", "some"], "fusehsm: --events some: not known; choose exact, first-access\n"),
        (["--events", "first-access", "--record"], "fusehsm: --record: only exact events are recorded; leave --events out\n"),
        (["--sample", "0"], "fusehsm: a sample of 0 workloads has none; give a number from 1 on\n"),
    ],
)  # fmt: skip
def test_bad_usage(arguments: list[str], complaint: str) -> None:
    done = fusehsm("conform", *arguments)
    assert (done.returncode, done.stderr) == (2, complaint)
