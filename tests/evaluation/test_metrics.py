"""Accuracy, intervals and retained ratios against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from omnisieve.evaluation.metrics import Answer, accuracy, accuracy_by_family, paired_difference, retained


def answer(clip: str, correct: bool, number: int = 0, family: str = "f", **values) -> Answer:
    """An answer about `clip`; its question is named after clip and number."""
    return Answer(f"{clip}/{number}", clip, family, "yes", "yes" if correct else "no", correct, **values_of(values))


def values_of(values: dict) -> dict:
    """Token counts with defaults."""
    return {"kept": (1, 1), "present": (4, 4)} | values


def answers(clips: int, questions: int, right: np.ndarray) -> list[Answer]:
    """`right` is [clips, questions]."""
    return [answer(f"c{i}", bool(right[i, j]), j) for i in range(clips) for j in range(questions)]


def test_accuracy_is_a_percentage_of_questions() -> None:
    given = [answer("a", True, 0), answer("a", False, 1), answer("a", True, 2), answer("b", True)]
    assert accuracy(given).value == 75.0


def test_interval_of_two_clips_by_hand() -> None:
    """Two clips, one all right, one all wrong: a draw of two is 0, 50 or 100 % with probability 1/4, 1/2, 1/4."""
    found = accuracy(answers(2, 3, np.array([[1, 1, 1], [0, 0, 0]])))
    assert (found.low, found.high) == (0.0, 100.0)


def test_interval_has_the_width_theory_gives_to_clusters() -> None:
    """With all questions of a clip alike only clips count: the width is that of n clips, not of n * 16 questions."""
    n = 400
    right = np.repeat(np.arange(n) % 2, 16).reshape(n, 16)
    found = accuracy(answers(n, 16, right))
    expected = 2 * 1.96 * 100 * np.sqrt(0.25 / n)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def test_bootstrap_depends_on_the_seed_only() -> None:
    given = answers(23, 4, np.random.default_rng(0).random((23, 4)) < 0.5)
    given = [a for a in given if a.question != "c3/1"]
    assert accuracy(given, seed=1) == accuracy(given, seed=1)
    assert accuracy(given, seed=1) != accuracy(given, seed=2)


def test_paired_difference_by_hand_over_shared_questions() -> None:
    one = [answer("a", True, 0), answer("a", True, 1), answer("b", False), answer("c", True)]
    other = [answer("a", True, 0), answer("a", False, 1), answer("b", False)]
    found = paired_difference(one, other)
    assert found.value == pytest.approx(100 / 3)
    # Draws of clips a and b: aa, ab, ba, bb have the differences 2/4, 1/3, 1/3, 0.
    assert (found.low, found.high) == (0.0, 50.0)


def test_pairing_cancels_what_two_methods_share() -> None:
    """Hard and easy clips widen each interval, not that of the difference."""
    rng = np.random.default_rng(0)
    easy = rng.random((50, 1)) < 0.5
    one = answers(50, 8, np.broadcast_to(easy, (50, 8)))
    same = paired_difference(one, one)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert accuracy(one).high - accuracy(one).low > 20


def test_no_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


def test_families() -> None:
    given = [answer("a", True, 0, "x"), answer("a", False, 1, "x"), answer("b", False, 0, "y")]
    assert accuracy_by_family(given) == {"x": 50.0, "y": 0.0}


def test_retained_counts_a_clip_once() -> None:
    given = [
        answer("a", True, 0, kept=(2, 1), present=(4, 4)),
        answer("a", True, 1, kept=(4, 1), present=(4, 4)),
        answer("b", True, 0, kept=(1, 0), present=(8, 0)),
    ]
    # Clip a keeps 3 video tokens on average and 1 audio token, clip b 1 video token.
    assert retained(given) == {"video": 4 / 12, "audio": 1 / 4, "total": 5 / 16}


def test_retained_of_an_absent_modality_is_none() -> None:
    assert retained([answer("a", True, kept=(1, 0), present=(2, 0))]) == {
        "video": 0.5,
        "audio": None,
        "total": 0.5,
    }
