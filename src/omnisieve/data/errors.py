"""Mistakes in data that a user can cure, and the boundary at which what libraries raise becomes one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OF_THE_SAMPLE = frozenset({"text", "too_long", "unreachable"})
"""Kinds of faults that a sample has as a whole; every other one is the fault of a file."""
_LONGEST = 300


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong, where, and how to cure it."""


class SampleError(DataError):
    """One sample that cannot be used; the others may be.

    Attributes:
        file: at fault; the sample's first one for a fault `OF_THE_SAMPLE`, empty if it has none.
        kind: of the fault, in a word.
        reason: what is wrong.
        cure: what to do about it.
    """

    def __init__(self, file: str, kind: str, reason: str, cure: str) -> None:
        super().__init__(file, kind, reason, cure)
        self.file, self.kind, self.reason, self.cure = file, kind, reason, cure

    def __str__(self) -> str:
        return f"{shortened(self.file) or 'a sample without media'}: {self.reason} ({self.kind}). Cure: {self.cure}."


@contextmanager
def foreign_errors(make: Callable[[str], SampleError], *, passing: type[DataError] = DataError) -> Iterator[None]:
    """Whatever a decoder, an image library, a stock processor or a tokenizer raises inside is the error of one sample.

    What such code raises on a damaged or an unusual file is no closed list: every exception is taken.

    Args:
        make: the error, from the exception's type and text.
        passing: errors of ours that are what they should be already.

    Raises:
        SampleError: instead of any other exception.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        raise make(described(error)) from error


def described(error: Exception) -> str:
    """Type and text of an exception in one short line; an error of ours by its text alone."""
    # An OSError's text would repeat the path.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = shortened(" ".join(text.split()), _LONGEST)
    return line if isinstance(error, DataError) else f"{type(error).__name__}: {line}".removesuffix(": ")


def shortened(text: str, longest: int = 200) -> str:
    """A text that a line of a log can hold; what was left out is counted."""
    return text if len(text) <= longest else f"{text[: longest // 2]}... ({len(text)} characters)"
