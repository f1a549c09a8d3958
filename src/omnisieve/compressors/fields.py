"""The fields of a method's settings: their types, what they do, and settings made from given values."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omnisieve.compressors.ratios import CompressorError, Settings

S = TypeVar("S", bound=Settings)
# Names and text of one entry under "Attributes:".
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        name, hint, default: as the class declares it.
        help: what its docstring says.
    """

    name: str
    hint: Any
    default: Any
    help: str

    @property
    def kind(self) -> str:
        """The type as a recipe's reader says it: "float or null", "one of exact, official"."""
        return _kind(self.hint)


def fields_of(settings: type[Settings]) -> tuple[Field, ...]:
    """The fields of a class of settings; those of every method come first."""
    hints, texts = get_type_hints(settings), _texts(settings)
    return tuple(Field(f.name, hints[f.name], f.default, texts.get(f.name, "")) for f in dataclasses.fields(settings))


def make_settings(settings: type[S], values: Mapping[str, Any], name: str) -> S:
    """Settings of the method `name`.

    Raises:
        CompressorError: an unknown field (names the nearest), a value of another type, or one that cannot be.
    """
    known = {field.name: field for field in fields_of(settings)}
    for key, value in values.items():
        if key not in known:
            raise CompressorError(f"{name} has no setting {key!r}{nearest(key, known)}")
        if not _fits(value, known[key].hint):
            raise CompressorError(
                f"{name}: {key} is {value!r}, of type {type(value).__name__}; expected {known[key].kind}"
            )
    return settings(**values)


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


def _texts(settings: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say about each field."""
    texts: dict[str, str] = {}
    for cls in reversed(settings.__mro__):
        for names, text in _ENTRY.findall(inspect.cleandoc(cls.__doc__ or "")):
            texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def _kind(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is NoneType:
        return "null"
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, arguments))
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"list of {len(arguments)} {_kind(arguments[0])}"
    return "mapping" if origin is dict else hint.__name__


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type that a field declares; which texts of a `Literal` there are, methods say."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if kind is Literal:
        return isinstance(value, tuple(map(type, arguments)))
    if kind is tuple:
        return isinstance(value, list | tuple) and all(map(_fits, value, arguments))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind or hint)
