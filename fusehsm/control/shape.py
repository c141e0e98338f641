"""Checks JSON values that another process has sent: their types, their fields, the size of their numbers.

A shape is a type (str, int, float, bool, NoneType), a tuple of shapes (any of them), a list with one shape (any number of such values), a dict with
str as its only key (any names), or a dict of fields.
"""

import dataclasses
import json
import math
from types import NoneType
from typing import Any, Final, TypeAlias

Shape: TypeAlias = "type | tuple[Shape, ...] | list[Shape] | dict[Any, Shape]"

_LEAST: Final = -(1 << 63)
_MOST: Final = (1 << 64) - 1


def parsed(data: bytes | str) -> object:
    """json.loads(), but a ValueError also for text that is nested too deep."""
    try:
        value: object = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def fitting(value: object, shape: Shape) -> Any:
    """The value, without fields that the shape lacks. Raises ValueError if it does not fit: a number of more than 64 bits does not."""
    match shape:
        case tuple():
            for other in shape:
                try:
                    return fitting(value, other)
                except ValueError:
                    continue
        case list():
            if isinstance(value, list):
                return [fitting(item, shape[0]) for item in value]
        case dict():
            if isinstance(value, dict):
                if str in shape:
                    return {name: fitting(item, shape[str]) for name, item in value.items()}
                if shape.keys() <= value.keys():
                    return {name: fitting(value[name], inner) for name, inner in shape.items()}
        case _:
            if _is(value, shape):
                return value
    raise ValueError("makes no sense")


def fields_of(kind: type[Any]) -> dict[str, Shape]:
    """The shape of a dataclass whose fields are str, int, float and bool."""
    return {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[misc]


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MOST  # type: ignore[arg-type]
    if kind is int:
        return type(value) is int and _LEAST <= value <= _MOST
    return type(value) is kind and kind in (str, bool, NoneType)
