"""Multiple choice: options become lettered lines of the question, and the answer must be one of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from omnisieve.data.sources import FormatError

COLUMNS = ("options", "choices", "candidates", "choice")
_OWN_COLUMN = re.compile(r"(option[_ ]?|choice[_ ]?|)([A-Za-z])|(option[_ ]?|choice[_ ]?|a)(\d\d?)")
_LETTER = re.compile(r"\(?([A-Za-z])[.):]\s*(?![A-Za-z]\.)")  # no abbreviation, as C.I.A.
_NAMES = (
    list(ascii_uppercase), list(ascii_lowercase), [str(n) for n in range(26)], [str(n) for n in range(1, 27)],
)  # fmt: skip
"""What options are called: A, B, ...; a, b, ...; 0, 1, ...; 1, 2, ..."""


@dataclass(frozen=True)
class Options:
    """What a question has to choose from, in the order of the letters that it is asked with.

    Attributes:
        texts: without letters.
        given: as the data set writes them.
        names: by which answers call them, if these are numbers.
        own_letters: whether the texts begin with letters that are not A, B, ... ("J. Smith", "B. Jones").
    """

    texts: tuple[str, ...]
    given: tuple[str, ...]
    names: tuple[str, ...] = ()
    own_letters: bool = False

    @property
    def lines(self) -> list[str]:
        """As they are asked."""
        return [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.texts, strict=False)]


def options_of(row: Mapping[str, Any], column: str | None) -> tuple[Options | None, set[str]]:
    """The options of a row and the columns that held them; None for an open question.

    They are a list, an object by letter or number, a text that holds one of these or has a line or a letter for each,
    or there is a column for each: option_A, option_B, ... or A, B, ... or option1, option2, ... or a0, a1, ...

    Args:
        row: without keys that stand for none.
        column: their name; None: the first that exists of options, choices, candidates, choice.

    Raises:
        FormatError: what is there is not at least two options, or it is not clear which letter each has.
    """
    name = column or next((name for name in COLUMNS if row.get(name)), None)
    if name is not None:
        (names, found), used = _listed(row.get(name), name), {name} & row.keys()
    else:
        columns = _own_columns(row)
        # Tables have an empty cell where there are fewer options.
        names, found = _by_name({name: row[key] for name, key in columns.items() if row[key] != ""})
        used = set(columns.values())
    if not found:
        return None, used
    given = [_text(option, index) for index, option in enumerate(found)]
    if not 2 <= len(given) <= len(ascii_uppercase):
        raise FormatError(
            f"the number of options is {len(given)}; from 2 to {len(ascii_uppercase)} are needed: {given[:3]}"
        )
    return _without_letters(given, names), used


def ask(question: str, options: Options, answer: str | None) -> tuple[str, str | None]:
    """The question with its options behind it, unless it has them already; and the answer.

    Args:
        question: asked.
        options: to choose from.
        answer: a letter, a number if options are called so, or one of the options; None if it is not known.

    Returns:
        question and answer; a number has become the letter.

    Raises:
        FormatError: the answer is none of these.
    """
    answer, by_letter = (None, True) if answer is None else _checked(answer, options)
    if is_asked(question, options):
        return question, answer
    return "\n".join([question, *options.lines, *(["Answer with the option's letter."] if by_letter else [])]), answer


def is_asked(question: str, options: Options) -> bool:
    """Whether a question names all options with their letters."""
    lettered = (rf"(?:^|\W){line[0]}\W+{re.escape(line[3:])}(?!\w)" for line in options.lines)
    return all(re.search(pattern, question) for pattern in lettered)


def _checked(answer: str, options: Options) -> tuple[str, bool]:
    """An answer, and whether it is the letter of an option rather than its text."""
    same, lines = answer.strip(), options.lines
    letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", same)
    place = ascii_uppercase.index(letter[1].upper()) if letter else len(lines)
    if same in options.names:
        letter, place = None, options.names.index(same)
    texts = [index for index in range(len(lines)) if _is_option(same, index, options)]
    if place < len(lines) and texts not in ([], [place]):
        called = "name" if letter is None else "letter"
        raise FormatError(f"the answer {answer!r} is the {called} of one option and the text of another: {lines}")
    if place < len(lines) and options.own_letters and not texts:
        raise FormatError(
            f"the answer {answer!r} is a letter, but the options have other letters: {list(options.given)}"
        )
    if place >= len(lines) and not texts:
        problem = f"the answer {answer!r} is neither the letter nor the text of an option: {lines}"
        if re.fullmatch(r"\d+", same) and int(same) <= len(lines):
            problem += "; whether it counts from 0 or from 1 is not known: write the letter or the text instead"
        raise FormatError(problem)
    return (ascii_uppercase[place] if same in options.names else answer), place < len(lines)


def _is_option(answer: str, index: int, options: Options) -> bool:
    """Whether an answer is the text of an option, perhaps behind its letter; a full stop at the end does not count."""
    text, given = options.texts[index], options.given[index]
    letter = ascii_uppercase[index]
    written = (
        text,
        given,
        *(f"{mark}{text}" for mark in (f"{letter}. ", f"{letter}: ", f"{letter}) ", f"({letter}) ")),
    )
    return _plain(answer) in {_plain(option) for option in written}


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()


def _without_letters(given: list[str], names: tuple[str, ...]) -> Options:
    """Options in the order of the letters that they have themselves, if all have one.

    Raises:
        FormatError: some have one.
    """
    marks = [_LETTER.match(option) for option in given]
    own = [mark[1].upper() if mark else "" for mark in marks]
    expected = ascii_uppercase[: len(given)]
    if sorted(own) == list(expected):
        ordered = [given[own.index(letter)] for letter in expected]
        if names and ordered != given:
            raise FormatError(f"the options have names, and letters of their own in another order: {given}")
        return Options(tuple(_LETTER.sub("", option, count=1).strip() for option in ordered), tuple(ordered), names)
    if "" in own and set(own) & set(expected):
        raise FormatError(f"some options have a letter, others have none: {given}; write it before all or none")
    return Options(tuple(given), tuple(given), names, own_letters="" not in own)


def _own_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Columns by the name of their option, of a row that has a column for each."""
    families: dict[str, dict[str, str]] = {}
    for key in row:
        if match := _OWN_COLUMN.fullmatch(key):
            prefix, name = (match[1], match[2]) if match[2] else (match[3], match[4])
            kind = "digit" if name.isdigit() else "upper" if name.isupper() else "lower"
            families.setdefault(f"{prefix}{kind}", {})[name] = key
    return next((found for found in families.values() if any({*names[:2]} <= found.keys() for names in _NAMES)), {})


def _listed(value: Any, column: str) -> tuple[tuple[str, ...], list[Any]]:
    """Names that are numbers, if options have such, and the options."""
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping) and value.keys() == {"label", "text"}:
        names, texts = value["label"], value["text"]
        if not (isinstance(names, list) and isinstance(texts, list) and len(names) == len(set(map(str, names)))):
            raise FormatError(
                f"the options, column {column!r}, are {value!r}; a list of labels and one of texts are needed"
            )
        if len(names) != len(texts):
            raise FormatError(f"the options, column {column!r}, have {len(names)} labels and {len(texts)} texts")
        value = dict(zip(map(str, names), texts, strict=True))
    if isinstance(value, Mapping):
        return _by_name(value)
    if value is None or isinstance(value, list):
        return (), value or []
    raise FormatError(f"the options, column {column!r}, are {value!r}; a list is needed, or a line for each")


def _by_name(options: Mapping[str, Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Names that are numbers, if options have such, and the options, in the order of their names."""
    for names in _NAMES:
        chosen = names[: len(options)]
        if options.keys() == set(chosen):
            return tuple(chosen) if chosen and chosen[0].isdigit() else (), [options[name] for name in chosen]
    names = sorted(map(str, options))
    raise FormatError(f"the options are {', '.join(names)}; letters from A on are needed, without a gap")


def _parsed(text: str) -> Any:
    """What a text says of options: JSON, Python, lines, or letters; the text itself if none of these."""
    if text.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 else _at_letters(text) or text or None


def _at_letters(text: str) -> list[str]:
    """ "A. dog B. cat", also as a list whose quotes contradict each other."""
    starts: list[tuple[int, int]] = []
    for letter in ascii_uppercase:
        mark = re.compile(rf"(?:^|[\s\[,;|(]['\"(]?){letter}[.):]\s*")
        found = mark.search(text, starts[-1][1] if starts else 0)
        if found is None:
            break
        starts.append(found.span())
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return [text[start:end].strip(" \t\r\n[],;|'\"") for (_, start), end in zip(starts, ends, strict=False)]


def _text(option: Any, index: int) -> str:
    if isinstance(option, bool) or not isinstance(option, str | int | float):
        raise FormatError(f"option {index + 1} is {option!r}; a text is needed")
    if not str(option).strip():
        raise FormatError(f"option {index + 1} is empty")
    return str(option).strip()
