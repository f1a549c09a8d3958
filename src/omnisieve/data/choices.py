"""Multiple choice in tables: options become lettered lines of the question, and the answer must be one of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from omnisieve.data.sources import FormatError

COLUMNS = ("options", "choices", "candidates", "choice")
_OWN_COLUMN = re.compile(r"(?:option[_ ]?)?([A-Z])")
_LETTER = re.compile(r"\(?([A-Z])[.):]\s*")


def options_of(row: Mapping[str, Any], column: str | None) -> tuple[list[str], set[str]]:
    """The options of a row, without letters of their own, and the columns that held them; none of an open question.

    They are a list, an object by letter, a text that holds one of these or has a line or a letter for each, or there is
    a column for each: option_A, option_B, ... or A, B, ...

    Args:
        row: without keys that stand for none.
        column: their name; None: the first that exists of options, choices, candidates, choice.

    Raises:
        FormatError: what is there is not at least two options.
    """
    name = column or next((name for name in COLUMNS if row.get(name)), None)
    if name is not None:
        found, used = _listed(row.get(name), name), {name} & row.keys()
    else:
        letters = {match[1]: key for key in row if (match := _OWN_COLUMN.fullmatch(key))}
        if not {"A", "B"} <= letters.keys():
            return [], set()
        # Tables have an empty cell where there are fewer options.
        found = _by_letter({letter: row[key] for letter, key in letters.items() if row[key] != ""})
        used = set(letters.values())
    if not found:
        return [], used
    options = [_text(option, index) for index, option in enumerate(found)]
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise FormatError(f"{len(options)} options are no choice: {options[:3]}")
    own = [_LETTER.match(option) for option in options]
    if all(match and match[1] == letter for match, letter in zip(own, ascii_uppercase, strict=False)):
        options = [_LETTER.sub("", option, count=1) for option in options]
    return options, used


def ask(question: str, options: Sequence[str], answer: str | None) -> str:
    """The question with its options behind it, unless it has them already.

    Args:
        question: asked.
        options: without letters.
        answer: a letter or one of the options; None if it is not known.

    Raises:
        FormatError: the answer is neither.
    """
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    by_letter = answer is None or _is_letter(answer, options, lines)
    lettered = (rf"^\W*{line[0]}\W+{re.escape(line[3:])}\s*$" for line in lines)
    if all(re.search(pattern, question, re.MULTILINE) for pattern in lettered):
        return question
    return "\n".join([question, *lines, *(["Answer with the option's letter."] if by_letter else [])])


def _is_letter(answer: str, options: Sequence[str], lines: Sequence[str]) -> bool:
    """Whether an answer is the letter of an option, rather than its text."""
    same = answer.strip().casefold()
    texts = [index for index, option in enumerate(options) if same in (option.casefold(), lines[index].casefold())]
    letter = re.fullmatch(r"\(?([a-z])[.):]?", same)
    place = ascii_uppercase.lower().index(letter[1]) if letter else len(options)
    if place < len(options) and texts not in ([], [place]):
        raise FormatError(f"the answer {answer!r} is the letter of one option and the text of another: {list(lines)}")
    if place >= len(options) and not texts:
        raise FormatError(f"the answer {answer!r} is neither the letter nor the text of an option: {list(lines)}")
    return place < len(options)


def _listed(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping):
        return list(value["text"]) if value.keys() == {"label", "text"} else _by_letter(value)
    if value is None or isinstance(value, list):
        return value or []
    raise FormatError(f"the options, column {column!r}, are {value!r}; a list is needed, or a line for each")


def _by_letter(options: Mapping[str, Any]) -> list[Any]:
    letters = sorted(options)
    if letters != list(ascii_uppercase[: len(letters)]):
        raise FormatError(f"the options are {', '.join(letters)}; letters from A on are needed, without a gap")
    return [options[letter] for letter in letters]


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
