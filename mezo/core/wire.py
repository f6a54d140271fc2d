"""How messages travel: dataclasses as JSON objects, in an envelope with an id and a version.

A `Message` carries a request, an `Answer` with the same id its reply or its error. A channel may
still hold answers to others (SGLang's RPC channel has no ids of its own); the id tells them apart.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import uuid
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mezo.core.messages import REQUESTS, VERSION, Request

T = TypeVar("T")
# What turns a value into what JSON holds, or back; None: both are the same.
_Convert = Callable[[Any], Any] | None


class WireError(RuntimeError):
    """Two sides do not speak the same version, or one does not keep to it."""


@dataclasses.dataclass(frozen=True)
class Message:
    """A request on its way. SGLang's RPC channel carries flat scalars only.

    Args:
        id: its answer has the same.
        version: the sender's `VERSION`.
        operation: which request it is.
        payload: the request as JSON.
    """

    id: str
    version: int
    operation: str
    payload: str

    @classmethod
    def of(cls, request: Request[Any]) -> Message:
        """Return a new message with a request."""
        return cls(uuid.uuid4().hex, VERSION, request.operation, json.dumps(to_json(request)))

    def request(self) -> Request[Any]:
        """Return the request.

        Raises:
            WireError: another version, an unknown operation, or a request with other fields.
        """
        _check_version("message", self.version)
        if self.operation not in REQUESTS:
            raise WireError(
                f"message: operation must be one of {sorted(REQUESTS)}, got {self.operation!r}; "
                f"{_remedy(self.version)}"
            )
        return _read(REQUESTS[self.operation], json.loads(self.payload), self.version)

    @staticmethod
    def read(fields: dict[str, Any]) -> Message:
        """Return the message whose fields a channel has brought.

        Raises:
            WireError: they are not those of a message.
        """
        return _read(Message, fields, fields.get("version"))


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no reply.

    Args:
        kind: name of the exception's type.
        sentence: what it says.
    """

    kind: str
    sentence: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return what is told of an exception."""
        return cls(type(error).__name__, str(error))

    def exception(self) -> Exception:
        """Return an exception of the same kind, or a RuntimeError that names the kind."""
        if self.kind in _ERRORS:
            return _ERRORS[self.kind](self.sentence)
        return RuntimeError(f"{self.kind}: {self.sentence}")


_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, NotImplementedError, RuntimeError, WireError)
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What comes back for a message.

    Args:
        id: the message's.
        version: the `VERSION` of the side that answers.
        reply: the reply as a JSON object, or None.
        error: why there is none, or None.
    """

    id: str
    version: int
    reply: dict[str, Any] | None
    error: Failure | None

    @classmethod
    def of(cls, message_id: str, outcome: Any) -> Answer:
        """Return the answer to a message: ``outcome`` is its reply or a `Failure`."""
        if isinstance(outcome, Failure):
            return cls(message_id, VERSION, None, outcome)
        return cls(message_id, VERSION, to_json(outcome), None)

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(to_json(self))

    def result(self, request: Request[T]) -> T:
        """Return the reply to ``request``.

        Raises:
            WireError: the reply has other fields.
            Exception: the error, see `Failure.exception`.
        """
        if self.error is not None:
            raise self.error.exception()
        reply: T = _read(request.reply, self.reply, self.version)
        return reply

    @staticmethod
    def read(text: str) -> Answer | None:
        """Return the answer that a channel has brought; None for what is not one of ours.

        Raises:
            WireError: it is ours, of another version or with other fields.
        """
        try:
            fields = json.loads(text)
        except ValueError:
            return None
        # Versions 1 and 2 did not write theirs into every answer.
        if not isinstance(fields, dict) or not fields.keys() & {"id", "version", "protocol"}:
            return None
        _check_version("answer", fields.get("version"))
        return _read(Answer, fields, VERSION)


def _check_version(what: str, version: int | None) -> None:
    """Raise unless the other side speaks our version."""
    if version != VERSION:
        raise WireError(
            f"{what}: version must be {VERSION}, got {_named(version)}; {_remedy(version)}"
        )


def _read(cls: type[T], fields: Any, version: int | None) -> T:
    """`from_json` with a sentence that names both versions."""
    try:
        return from_json(cls, fields)
    except FieldsError as error:
        raise WireError(f"{error}; {_remedy(version)}") from error


def _named(version: int | None) -> str:
    return "an older one" if version is None else str(version)


def _remedy(version: int | None) -> str:
    """What to do about two sides that differ."""
    return (
        f"this side speaks version {VERSION} and the other one {_named(version)}: install one "
        "mezo-sglang for both and start the engine again."
    )


class FieldsError(ValueError):
    """A JSON object does not have the fields of the dataclass that it is read as."""


def to_json(value: Any) -> dict[str, Any]:
    """Return a dataclass as a JSON object: its fields by name, and dataclasses in them likewise.

    Args:
        value: an instance of a dataclass. Its fields hold numbers, texts, booleans, None, and
            tuples, lists, dicts and dataclasses of these; a union has one such type at most.

    Returns:
        What `json.dumps` writes. Lists and tuples without dataclasses in them are not copied.
    """
    return {
        name: getattr(value, name) if encode is None else encode(getattr(value, name))
        for name, encode, _ in _fields_of(type(value))
    }


def from_json(cls: type[T], value: Any) -> T:
    """Undo `to_json`: return the dataclass that was written.

    Args:
        cls: the dataclass.
        value: what `json.loads` has read.

    Raises:
        FieldsError: no object, or one with a field too many or too few. Fields with a default
            count, too: `to_json` writes them all.
    """
    fields = _fields_of(cls)
    names = {name for name, _, _ in fields}
    found = set(value) if isinstance(value, dict) else {f"({type(value).__name__})"}
    if names != found:
        raise FieldsError(
            f"{cls.__name__}: fields must be {sorted(names)}, got {sorted(found)} (unknown: "
            f"{sorted(found - names)}, missing: {sorted(names - found)})"
        )
    return cls(**{n: value[n] if decode is None else decode(value[n]) for n, _, decode in fields})


_known: dict[type[Any], list[tuple[str, _Convert, _Convert]]] = {}


def _fields_of(cls: type[Any]) -> list[tuple[str, _Convert, _Convert]]:
    """For each field of a dataclass its name, what encodes its values and what decodes them."""
    if cls not in _known:
        hints = get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        _known[cls] = [(name, _encoder(hints[name]), _decoder(hints[name])) for name in names]
    return _known[cls]


def _encoder(hint: Any) -> _Convert:
    """What encodes values of a type: only dataclasses need it."""
    if dataclasses.is_dataclass(hint):
        return to_json
    inner = next(filter(None, map(_encoder, get_args(hint))), None)
    return None if inner is None else _inside(get_origin(hint), inner)


def _decoder(hint: Any) -> _Convert:
    """What decodes values of a type: dataclasses, and tuples, which JSON writes as lists."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return functools.partial(from_json, hint)
    inner = next(filter(None, map(_decoder, get_args(hint))), None)
    if inner is None:
        return tuple if get_origin(hint) is tuple else None
    return _inside(get_origin(hint), inner)


def _inside(origin: Any, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What converts all values inside a tuple, a list, a dict or a union."""
    if origin is dict:
        return lambda value: {key: inner(item) for key, item in value.items()}
    if origin in (tuple, list):
        return lambda value: origin(map(inner, value))
    scalar = (str, int, float, type(None))  # bool is an int
    return lambda value: value if isinstance(value, scalar) else inner(value)
