from hypothesis import given
from hypothesis import strategies as st

from fusehsm.linux.ranges import RangeSet

BYTES = st.integers(0, 60)
RANGES = st.lists(st.tuples(BYTES, BYTES))


@given(RANGES, BYTES, BYTES)
def test_covers_what_a_set_of_bytes_would(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    subject = RangeSet()
    model: set[int] = set()
    for first, last in ranges:
        subject.add(first, last)
        model.update(range(first, last))
    assert subject.covers(start, end) == (set(range(start, end)) <= model)
    assert bool(subject) == bool(model)


@given(RANGES, BYTES, BYTES)
def test_gaps_are_what_a_set_of_bytes_lacks(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    subject = RangeSet()
    model: set[int] = set()
    for first, last in ranges:
        subject.add(first, last)
        model.update(range(first, last))
    gaps = subject.gaps(start, end)
    assert [byte for first, last in gaps for byte in range(first, last)] == sorted(
        set(range(start, end)) - model
    )
    assert all(first < last for first, last in gaps)


@given(RANGES)
def test_ranges_stay_sorted_merged_and_apart(ranges: list[tuple[int, int]]) -> None:
    subject = RangeSet()
    for first, last in ranges:
        subject.add(first, last)
    edges = [edge for pair in subject for edge in pair]
    assert edges == sorted(set(edges))


def test_clear_forgets_everything() -> None:
    subject = RangeSet()
    subject.add(0, 10)
    subject.clear()
    assert not subject
    assert not subject.covers(3, 4)
    assert subject.covers(3, 3)
