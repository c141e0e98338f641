"""Checks and decodes requests in JSON, for servers that any process may write to. Each server has its own kinds of requests."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

RequestT = TypeVar("RequestT")


class RequestCodec(Generic[RequestT]):
    """The kinds of requests of one server: dataclasses, by the names that they have in a message.

    A field is a str, int, bool or float, or one of these or None. Numbers are from 0 to `largest`.
    """

    def __init__(self, server: str, kinds: Mapping[str, type[RequestT]], *, largest: int) -> None:
        """`server` is the server's name in the errors for a refused request."""
        self._server = server
        self._kinds = dict(kinds)
        self._names = {kind: name for name, kind in kinds.items()}
        self._types = {kind: _field_types(kind) for kind in kinds.values()}
        self._largest = largest

    def encode(self, request: RequestT) -> bytes:
        """The message for a request."""
        fields = {name: getattr(request, name) for name in self._types[type(request)]}
        return json.dumps({"request": self._names[type(request)], **fields}).encode()

    def decode(self, data: bytes) -> RequestT:
        """The request in a message. Raises ValueError, in words for the sender, for all that encode() does not make."""
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("the request is not JSON") from None
        if not isinstance(fields, dict):
            raise ValueError("the request is not a JSON object")
        name = fields.pop("request", None)
        kind = self._kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            known = ", ".join(self._kinds)
            raise ValueError(f"unknown request {str(name)[:40]!r}; {self._server} knows {known}")
        types = self._types[kind]
        if fields.keys() != types.keys():
            raise ValueError(f"{name}: its fields are {', '.join(types) or 'none'}")
        for field, value in fields.items():
            is_number = isinstance(value, int | float)
            if type(value) not in types[field] or (is_number and not 0 <= value <= self._largest):
                raise ValueError(f"{field}: bad value")
        return kind(**fields)


def _field_types(kind: type[Any]) -> dict[str, frozenset[type]]:
    """The types that json.loads() may return for each field."""
    types = {}
    for field in dataclasses.fields(kind):
        accepted = set(typing.get_args(field.type) or (field.type,))
        if float in accepted:
            accepted.add(int)  # JSON does not distinguish them
        types[field.name] = frozenset(accepted)
    return types
