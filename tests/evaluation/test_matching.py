"""Pairs of answers that are the same answer, and pairs that are not."""

# ruff: noqa: RUF001
from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisieve.evaluation.matching import is_same, normalise

SAME = [
    # Case, space and sentence punctuation.
    ("Red.", "red"), ("the  Ring", "ring"), ("(A)", "A"), ("A.", "A"), ("A)", "A"), (" a\n", "A"), ("[b]", "B"),
    ("The dog.", "a dog"), ("dog!", "an dog"), ("“a dog”", "dog"), ("Yes, it is.", "yes it is"), ("the A", "A"),
    ("T-shirt", "t shirt"), ("COVID-19", "covid 19"), ("- dog", "dog"), ("a dog - a cat", "dog, cat"),
    ("the “dog”", "dog"), ("dog’s", "dog's"), ("...", "…"), ("the", "The"), ("a C++ program", "C++ program"),
    # Markdown.
    ("**A**", "A"), ("`C++`", "c++"), ("*A* dog", "a dog"), ("* dog", "dog"),
    # Numbers and signs in other writing.
    ("5.", "5"), ("The 5", "5"), ("−5", "-5"), ("- 5", "-5"), ("5 %", "5%"), ("3–5", "3-5"), ("3 - 5", "3-5"),
    ("½", "1/2"), ("1½", "1 1/2"), ("20 ℃", "20 °C"), ("3.50.", "3.50"), ("at 3:30!", "at 3:30"), ("１２", "12"),
    # Other scripts.
    ("STRASSE", "Straße"), ("e\u0301te\u0301", "été"), ("ΟΔΟΣ", "οδός".replace("ό", "ο")), ("Ａ", "A"), ("ﬁsh", "fish"),
    ("狗。", "狗"), ("「狗」", "狗"), ("का।", "का"), ("¿Perro?", "perro"), ("كلب؟", "كلب"), ("⁧كلب⁩", "كلب"), ("ｶﾞ", "ガ"),
    ("❤️", "❤"), ("한국", "한국"), ("ПЁС", "пёс"),
]  # fmt: skip

DIFFERENT = [
    # What says nothing is not an answer, and articles are one where nothing follows.
    ("", "A"), ("The", "A"), ("...", "A"), ("an", "A"), ("", "?"), ("!", "?"), ("", "..."), ("", "the"), ("*", "A"),
    ("A B", "B"), ("B", "A, B"), ("dog", "A. dog"), ("dog", "A - dog"), ("vitamin", "vitamin A"),
    # Letters and words.
    ("reds", "red"), ("no", "know"), ("dog cat", "dogcat"), ("B", "A"), ("x2", "x²"), ("SO₂", "SO2"),
    # Signs.
    ("-5", "5"), ("−5", "5"), ("–5", "5"), ("- 5", "5"), ("+5", "-5"), ("-$5", "$5"), ("-.5", ".5"), ("-x", "x"),
    ("-∞", "∞"), ("(-5)", "5"), ("C++", "C"), ("C#", "C"), ("A+", "A"), ("A-", "A"), ("A-", "A+"), ("5%", "5"),
    ("$5", "€5"), ("R&B", "RB"), ("<5", ">5"), ("5°", "5"), ("AC/DC", "ACDC"), ("≥5", "5"), ("5‰", "5%"), ("5″", "5′"),
    # Points.
    ("35", "3.5"), ("3 5", "3.5"), ("5", ".5"), ("35", "3,5"), ("1.2", "12"), ("330", "3:30"), ("3:30", "3.30"),
    ("3-5", "35"), ("3/4", "34"), ("1.2.3", "12.3"), ("v1.2", "v12"), ("10²", "102"), ("1½", "11/2"),
    # Marks and scripts.
    ("की", "का"), ("क", "का"), ("ก", "กำ"), ("கி", "கீ"), ("été", "ete"), ("ё", "е"), ("حَرَب", "حَرْب"), ("שָׁלוֹם", "שלום"),
    ("か", "が"), ("ñ", "n"), ("å", "a"), ("犬", "狗"), ("၁", "၂"),
    ("👍", "👎"), ("👍🏽", "👍🏿"), ("", "👍"), ("♪", "♫"),
]  # fmt: skip


@pytest.mark.parametrize(("predicted", "expected"), SAME)
def test_the_same_answer_in_other_writing(predicted: str, expected: str) -> None:
    assert is_same(predicted, expected), (normalise(predicted), normalise(expected))


@pytest.mark.parametrize(("predicted", "expected"), DIFFERENT)
def test_another_answer(predicted: str, expected: str) -> None:
    assert not is_same(predicted, expected), normalise(predicted)
    assert not is_same(expected, predicted)


@given(st.text(max_size=12))
def test_nothing_but_nothing_becomes_nothing(text: str) -> None:
    visible = any(unicodedata.category(c)[0] in "LNPS" for c in text)
    assert not visible or normalise(text)
    assert is_same(text, text)


@given(st.integers(-1000, 1000), st.integers(-1000, 1000), st.sampled_from(["{}", "{}.", "({})", "the {}", "{} dogs"]))
def test_numbers_are_the_same_if_they_are_equal(one: int, other: int, frame: str) -> None:
    for scale in (1, 10):
        assert is_same(frame.format(one / scale), frame.format(other / scale)) == (one == other)
