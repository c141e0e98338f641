"""Lists of --record and --prefetch: what is written, what is read, and that neither takes more memory than it may."""

import logging
from pathlib import Path

import pytest

from fusehsm.tier.fetch import access_list as touch_list
from fusehsm.tier.fetch.access_list import Recorder, Touched, read_list

pytestmark = pytest.mark.any_engine

LARGEST = (1 << 63) - 1


def written(path: Path, *accesses: tuple[str, int, int]) -> list[str]:
    """The lines for accesses of (path, offset, end), in blocks of 10 bytes."""
    with Recorder(str(path), 10) as recorder:
        recorder.begin()
        for access in accesses:
            recorder(*access)
    return path.read_text().splitlines()


def test_each_block_once(tmp_path: Path) -> None:
    lines = written(tmp_path / "list", ("a", 15, 16), ("a", 0, 45), ("b", 7, 7), ("a", 20, 51))
    assert lines == ['10 10 "a"', '0 10 "a"', '20 30 "a"', '0 10 "b"', '50 10 "a"']


def test_what_was_in_the_list_goes(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("something else\n")
    assert written(tmp_path / "list", ("a", 0, 1)) == ['0 10 "a"']


def test_a_mapping_of_all_that_a_file_can_have(tmp_path: Path) -> None:
    """One line, and no list of its blocks."""
    path = tmp_path / "list"
    assert written(path, ("a", 0, LARGEST)) == [f'0 {LARGEST} "a"']
    assert read_list(str(path)) == [Touched("a", 0, LARGEST)]


def test_what_lies_too_deep_is_not_written(tmp_path: Path) -> None:
    lines = written(tmp_path / "list", ("d/" * 100_000 + "a", 0, 1), ("b", 0, 1))
    assert lines == ['0 10 "b"']


def test_no_more_lines_than_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(touch_list, "MOST_LINES", 3)
    lines = written(tmp_path / "list", *((f"{number}", 0, 1) for number in range(5)))
    assert lines == [f'0 10 "{number}"' for number in range(3)]
    assert [record.message for record in caplog.records] == [
        f"--record {tmp_path}/list: has 3 lines, the most that it can have; later uses are not recorded"
    ]


def test_of_a_long_list_the_first_lines_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(touch_list, "MOST_LINES", 2)
    path = tmp_path / "list"
    path.write_text("".join(f'0 1 "{number}"\n' for number in range(2)))
    with caplog.at_level(logging.WARNING):
        assert len(read_list(str(path))) == 2
        assert not caplog.records
        path.write_text(path.read_text() * 2)
        assert [item.path for item in read_list(str(path))] == ["0", "1"]
    assert "only its first 2 lines are fetched ahead" in caplog.text


def test_a_line_without_an_end_is_no_line() -> None:
    with pytest.raises(ValueError, match="line 1 is not one of"):
        read_list("/dev/zero")
