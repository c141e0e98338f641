"""Sizes and times as people write them."""

import re
from typing import Final

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGTP]?)(i?B?)")
_MOST: Final = float(1 << 62)
_UNITS: Final = "KMGTP"
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)?")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(option: str, text: str) -> int:
    """Bytes: a number, with K, M, G, T or P (powers of 1024; kB, MB, ... are powers of 1000). ValueError, which names `option`, for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{option} {text}: not a size; write something like 500M or 10G")
    number, unit, suffix = match.groups()
    base = 1000 if suffix == "B" and unit else 1024
    power = _UNITS.index(unit.upper()) + 1 if unit else 0
    return round(_within_reason(option, text, float(number) * float(base) ** power))


def parse_seconds(option: str, text: str) -> float:
    """Seconds: a number, with s, m, h, d or w. ValueError, which names `option`, for anything else."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{option} {text}: not a time; write something like 90s, 12h or 30d")
    number, unit = match.groups()
    return _within_reason(option, text, float(number) * _SECONDS[unit or "s"])


def _within_reason(option: str, text: str, value: float) -> float:
    if value > _MOST:
        raise ValueError(f"{option} {text if len(text) < 40 else text[:40] + '...'}: too much")
    return value
