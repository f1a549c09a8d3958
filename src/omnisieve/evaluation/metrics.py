"""What is measured on answers: accuracy, its interval, paired differences, retained tokens.

Questions about one clip share its media, so they are no independent draws: every interval here resamples clips,
with all their questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        question, clip, family: ids of the question and of its clip, and the kind of question.
        expected, predicted: the right and the generated answer, as they were written.
        correct: whether the benchmark takes the prediction for right.
        kept, present: video and audio tokens that the LLM saw, on average over its layers, and that there were.
    """

    question: str
    clip: str
    family: str
    expected: str
    predicted: str
    correct: bool
    kept: tuple[float, float]
    present: tuple[int, int]


@dataclass(frozen=True)
class Interval:
    """An estimate in percent and its bootstrap interval."""

    value: float
    low: float
    high: float


def accuracy(answers: Sequence[Answer], *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> Interval:
    """Share of right answers in percent, with its 95 % interval clustered by clip."""
    return _clustered([float(a.correct) for a in answers], [a.clip for a in answers], samples, seed)


def paired_difference(
    one: Sequence[Answer], other: Sequence[Answer], *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> Interval:
    """Accuracy of `one` minus that of `other` over the questions both answered, in percentage points.

    The pairs are resampled clip by clip, so what the two share (easy clips, easy questions) cancels.
    """
    right = {a.question: a.correct for a in other}
    shared = [a for a in one if a.question in right]
    return _clustered(
        [float(a.correct) - float(right[a.question]) for a in shared], [a.clip for a in shared], samples, seed
    )


def accuracy_by_family(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of right answers in percent for each family of questions."""
    families = sorted({a.family for a in answers})
    return {f: 100 * float(np.mean([a.correct for a in answers if a.family == f])) for f in families}


def retained(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Kept media tokens / media tokens, over clips, per modality and in total; None where there are no tokens.

    A clip counts once: where the selection depends on the question, with the mean over its questions.
    """
    clips, counts = (
        np.unique([a.clip for a in answers], return_inverse=True)[1],
        len({a.clip for a in answers}),
    )
    questions = np.bincount(clips, minlength=counts)[:, None]
    kept, present = (
        sum_by_clip(np.array(values, dtype=float), clips, counts) / questions
        for values in ([a.kept for a in answers], [a.present for a in answers])
    )
    ratios = {
        "video": (kept[:, 0], present[:, 0]),
        "audio": (kept[:, 1], present[:, 1]),
        "total": (kept, present),
    }
    return {name: float(k.sum() / p.sum()) if p.sum() else None for name, (k, p) in ratios.items()}


def sum_by_clip(values: np.ndarray, clips: np.ndarray, n_clips: int) -> np.ndarray:
    """Sums of `values` [N, ...] over the entries of each clip, [n_clips, ...]."""
    out = np.zeros((n_clips, *values.shape[1:]))
    np.add.at(out, clips, values)
    return out


def _clustered(values: Sequence[float], clips: Sequence[str], samples: int, seed: int) -> Interval:
    """Mean of `values` in percent; percentile interval over `samples` draws of whole clips with replacement."""
    if not values:
        raise ValueError("there are no answers to take the mean of")
    names, cluster = np.unique(clips, return_inverse=True)
    n = len(names)
    sums = sum_by_clip(np.asarray(values, dtype=float), cluster, n)
    sizes = np.bincount(cluster, minlength=n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    means = 100 * (drawn @ sums) / (drawn @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(100 * float(np.mean(values)), float(low), float(high))
