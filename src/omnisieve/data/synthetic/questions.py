"""The questions about a clip, in words.

Each event has four attributes (colour, shape, tone, second) and each call three (kind, register, second). The
questions about one event or call are the edges of a random tree over its attributes, each asked in a random
direction: together they need every attribute, and no question's answer follows from the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnisieve.data.synthetic.world import CALLS, COLOURS, NUMBERS, REGISTERS, SHAPES, TONES, Clip

WORDINGS = {
    "shape_of_colour": "What shape is the {} object?",
    "second_of_colour": "In which second is the {} object visible?",
    "tone_of_colour": "Which tone does the {} object sing?",
    "colour_of_shape": "What colour is the {}?",
    "second_of_shape": "In which second is the {} visible?",
    "tone_of_shape": "Which tone does the {} sing?",
    "colour_of_second": "What colour is the object in second {}?",
    "shape_of_second": "What shape is the object in second {}?",
    "tone_of_second": "Which tone does the object in second {} sing?",
    "colour_of_tone": "What colour is the object that sings {}?",
    "shape_of_tone": "What shape is the object that sings {}?",
    "second_of_tone": "In which second is the object that sings {}?",
    "register_of_call": "How high is the {} call?",
    "second_of_call": "In which second does the {} call sound?",
    "call_of_register": "What kind of call is {}?",
    "second_of_register": "In which second does the {} call sound?",
    "call_of_second": "What kind of call sounds in second {}?",
    "register_of_second": "How high is the call in second {}?",
}
"""Family -> wording; `{}` stands for the word of the attribute asked from."""

VISUAL = tuple(f for f in WORDINGS if "tone" not in f and "call" not in f and "register" not in f)
CROSS = tuple(f for f in WORDINGS if "tone" in f)
AUDITORY = tuple(f for f in WORDINGS if "call" in f or "register" in f)

VOCABULARY: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "tone": TONES,
    "second": NUMBERS,
    "call": CALLS,
    "register": REGISTERS,
}


@dataclass(frozen=True)
class Question:
    """One question, its one-word answer, its family, and which event or call (as evidence group) it is about."""

    family: str
    text: str
    answer: str
    group: int
    """Index of the event, or number of events + index of the call."""


def all_questions(clip: Clip) -> list[Question]:
    """Return every question that can be asked about a clip: 12 for each event, 6 for each call."""
    questions = []
    for group, words in enumerate(attributes(clip)):
        for target in words:
            for source in words:
                if source != target:
                    questions.append(_ask(words, target, source, group))
    return questions


def draw_questions(clip: Clip) -> list[Question]:
    """Return the 16 questions of a clip's manifest line, in random order (see the module's docstring)."""
    rng = clip.rng(3)
    questions = []
    for group, words in enumerate(attributes(clip)):
        for one, other in _random_tree(list(words), rng):
            target, source = (one, other) if rng.random() < 0.5 else (other, one)
            questions.append(_ask(words, target, source, group))
    return [questions[i] for i in rng.permutation(len(questions))]


def attributes(clip: Clip) -> list[dict[str, str]]:
    """Return the words of every event (colour, shape, second, tone), then of every call (call, register, second)."""
    events = [
        {"colour": COLOURS[e.colour], "shape": SHAPES[e.shape], "second": NUMBERS[e.second], "tone": TONES[e.tone]}
        for e in clip.events
    ]
    calls = [
        {"call": CALLS[c.kind], "register": REGISTERS[c.register], "second": NUMBERS[c.token // 25]} for c in clip.calls
    ]
    return events + calls


def _random_tree(attributes: list[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return the edges of a random tree; `tone`, when there is one, is a leaf."""
    inner = [a for a in attributes if a != "tone"]
    order = [inner[i] for i in rng.permutation(len(inner))]
    edges = [(order[i], order[int(rng.integers(i))]) for i in range(1, len(order))]
    if "tone" in attributes:
        edges.append(("tone", inner[int(rng.integers(len(inner)))]))
    return edges


def _ask(words: dict[str, str], target: str, source: str, group: int) -> Question:
    family = f"{target}_of_{source}"
    return Question(family, WORDINGS[family].format(words[source]), words[target], group)


def answer_words() -> tuple[str, ...]:
    """Return every word that can be an answer."""
    return tuple(word for words in VOCABULARY.values() for word in words)
