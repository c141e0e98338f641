"""Numbers that follow each other."""

from collections.abc import Iterator, Sequence


def runs(numbers: Sequence[int], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [first, end), of at most `most` numbers each if that is given."""
    first = end = -1
    for number in numbers:
        if number == end and (most is None or end - first < most):
            end += 1
            continue
        if end > first:
            yield first, end
        first, end = number, number + 1
    if end > first:
        yield first, end
