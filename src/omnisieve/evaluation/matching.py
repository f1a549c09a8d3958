"""When a generated answer is the expected one.

Case, spacing, sentence punctuation, quotes, brackets, Markdown emphasis and articles are no difference. Everything that
can be the answer itself is: signs (`-5`, `C++`, `5 %`), the points of numbers (`3.5`, `.5`, `3:30`), combining marks of
any script, superscripts, emoji. Nothing is ever reduced to nothing.
"""

# ruff: noqa: RUF001 (characters that look alike are the matter here)
from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import zip_longest

_INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe0e\ufe0f\ufeff]")
# Emphasis and code within a sentence, and the bullet of a list.
_MARKDOWN = re.compile(
    r"(?<![\w*`]) (\*{1,3}|`{1,3}) (?=[^\s*`]) (.+?) (?<=[^\s*`]) \1 (?![\w*`]) | ^\s*\*\s+(?=\S)",
    re.DOTALL | re.VERBOSE,
)
_ALSO_SIGNS = "#%&*@/\\§¶†‡‰‱′″‴‵٪؉؊"
"""What Unicode counts as punctuation, but is part of what is said."""
_QUOTES = "`´"
"""The other way round."""
_POINTS = ".,:٫٬"
_MINUS = "-‐‑‒−"
_EN_DASH = "–"
# What there is at each place: a letter, mark or other number (w), digit (d), sign (s), point (.), minus or hyphen (-),
# en dash (n), underscore (u), space ( ) or other punctuation (p).
_TOKEN = re.compile(
    r"""
      (?: (?<![wd])\.(?=d) )?  [wd] (?: [wdu]*[wd] | (?<=d)\.(?=d) )*   # a word or number with its points
    | s
    | (?<![wd])  [-n]  (?=s?\.?d)                                       # -5, -$5
    | (?<![wdsu])  -   (?=[ws])                                         # -x, but neither T-shirt nor a bullet
    | (?<=[wds]) -   (?![wdsun-])                                       # A-
    | (?: (?<=d) | (?<=d[ ]) | ^ )  [-n]  (?=[ ]?s?\.?d)                # 3 - 5
    """,
    re.VERBOSE,
)
_LONG = re.compile(r"[^ p.]{2}")


def is_same(predicted: str, expected: str) -> bool:
    """Whether a generated answer is the expected one; see the module's text."""
    return normalise(predicted) == normalise(expected)


def normalise(text: str) -> str:
    """What two ways to write the same answer have in common; empty for an empty text only."""
    folded = _fold(text)
    shape = "".join(map(_class, folded))
    kept = []
    tokens = list(_TOKEN.finditer(shape))
    for token, following in zip_longest(tokens, tokens[1:]):
        word = folded[slice(*token.span())]
        if following is None or not _is_article(word, shape, token.end(), following.start()):
            kept.append("-" if word in (_EN_DASH, *_MINUS) else word)
    return " ".join(kept) or folded


def _is_article(word: str, shape: str, end: int, following: int) -> bool:
    """Whether a word is an article of what follows: "a dog", but not the answer "A", nor "A. dog" or "A B"."""
    if word not in ("a", "an", "the") or not re.fullmatch(" p*", shape[end:following]):
        return False
    return word != "a" or _LONG.match(shape, following) is not None


def _fold(text: str) -> str:
    """Without case, width, ligatures, Markdown and surplus space."""
    text = "".join(map(_compatible, _INVISIBLE.sub("", text)))
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(_MARKDOWN.sub(r"\2", text).split())


@lru_cache(4096)
def _compatible(character: str) -> str:
    """What Unicode holds for a mere variant of other characters, as those; superscripts (5² is not 52) are not."""
    variant, *codes = unicodedata.decomposition(character).split() or [""]
    if not variant.startswith("<") or variant in ("<super>", "<sub>"):
        return character
    plain = "".join(_compatible(chr(int(code, 16))) for code in codes)
    if variant == "<fraction>":
        return f" {plain.replace('⁄', '/')}"  # 1½ is not 11/2
    # Spacing accents, of which only the accent would be left.
    return character if len(plain) > 1 and plain[0] == " " else plain


@lru_cache(4096)
def _class(character: str) -> str:
    for kind, characters in (("-", _MINUS), ("n", _EN_DASH), (".", _POINTS), ("s", _ALSO_SIGNS), ("p", _QUOTES)):
        if character in characters:
            return kind
    if character == "_":
        return "u"
    if character == " ":
        return " "
    category = unicodedata.category(character)
    return "d" if category == "Nd" else {"S": "s", "P": "p", "Z": " "}.get(category[0], "w")
