"""The synthetic world: what happens in a clip, as a pure function of (domain, split, index).

A clip is 12 s long. In four of its seconds a coloured shape is visible in one cell of the picture while a beep
sounds somewhere in the same second; the *timbre* of that beep belongs to the shape, so that only what is on
screen tells it from the off-screen beeps around it. Two calls (short sweeps) are for the ear alone. Everything
else is a distractor that no question asks about: textured cells, picture cards (coloured shapes like those of the
events, but on a tile or in a frame, and silent), off-screen beeps, chirps, background.

Units: a cell is one merged video token (28 x 28 pixels), a grid one second of two frames, an audio token 40 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WORLD_VERSION = 2

SECONDS = 12
CELLS = 6
AUDIO_TOKENS_PER_SECOND = 25
AUDIO_TOKENS = SECONDS * AUDIO_TOKENS_PER_SECOND - 1
"""One short of 12 s: 187 whole AAC frames of 1,024 samples, so that a decoder adds no padding to the sound."""

COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "moon")
TONES = ("do", "re", "mi", "fa", "sol", "la")
CALLS = ("whistle", "siren", "howl", "trill", "buzz", "croak")
REGISTERS = ("deep", "low", "high", "shrill")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")

CARD_TINTS = (120, 256)
"""Range of the RGB values of a card's tile or frame."""

SPLITS = ("train", "val", "test", "backbone")
"""`backbone` clips train the small LLM itself; the other three are for compressors."""


@dataclass(frozen=True)
class Domain:
    """What makes one domain look and sound different from another. Ranges are inclusive (low, high)."""

    name: str
    seed: int
    textures: tuple[str, ...]
    clutter: float
    """Share of the cells without a card that show a texture in each second."""
    cards: tuple[int, int]
    """Cells that show a picture card in each second."""
    card_style: str
    """`tile`: the shape on a light tinted tile; `frame`: on the background, in such a frame."""
    background: tuple[int, int]
    """Brightness of the empty background, 0..255."""
    off_screen_beeps: tuple[int, int]
    chirps: tuple[int, int]
    chirp_loudness: float
    two_token_beeps: float
    """Share of beeps that last two audio tokens instead of one."""
    timbre_slope: float
    """Amplitude of each higher partial relative to the one below."""
    hum: float
    """Loudness of the slowly varying background noise."""


DOMAINS = {
    "a": Domain(
        name="a",
        seed=11,
        textures=("stripes", "bars", "checks", "dots", "noise", "waves"),
        clutter=0.2,
        cards=(10, 14),
        card_style="tile",
        background=(50, 110),
        off_screen_beeps=(5, 8),
        chirps=(3, 5),
        chirp_loudness=1.25,
        two_token_beeps=0.2,
        timbre_slope=1.0,
        hum=0.012,
    ),
    "b": Domain(
        name="b",
        seed=12,
        textures=("diagonals", "bricks", "noise", "rings", "ramps", "waves"),
        clutter=0.3,
        cards=(9, 13),
        card_style="frame",
        background=(90, 150),
        off_screen_beeps=(6, 9),
        chirps=(2, 4),
        chirp_loudness=1.5,
        two_token_beeps=0.35,
        timbre_slope=0.7,
        hum=0.02,
    ),
}


@dataclass(frozen=True)
class Event:
    """A coloured shape in one cell for one second, and its beep in the same second."""

    second: int
    row: int
    column: int
    colour: int
    shape: int
    tone: int
    token: int
    length: int


@dataclass(frozen=True)
class Beep:
    """An off-screen beep: the timbre of a shape that is not visible in its second."""

    token: int
    length: int
    tone: int
    timbre: int


@dataclass(frozen=True)
class Call:
    """A sweep of two audio tokens."""

    token: int
    kind: int
    register: int


@dataclass(frozen=True)
class Chirp:
    """A loud burst of band-limited noise, one audio token long."""

    token: int
    band: int


@dataclass(frozen=True)
class Texture:
    """A patterned cell of one second, drawn in two tints [2 x RGB]."""

    second: int
    row: int
    column: int
    kind: int
    variant: int
    tints: tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Card:
    """A coloured shape that is only a picture: as isolated among its neighbours as an event, but never asked about."""

    second: int
    row: int
    column: int
    colour: int
    shape: int
    tint: tuple[int, int, int]
    """RGB of its tile or frame, always light."""


@dataclass(frozen=True)
class Clip:
    """Everything that is seen and heard in one clip."""

    id: str
    domain: Domain
    seed: tuple[int, ...]
    events: tuple[Event, ...]
    beeps: tuple[Beep, ...]
    calls: tuple[Call, ...]
    chirps: tuple[Chirp, ...]
    cards: tuple[Card, ...]
    textures: tuple[Texture, ...]

    def rng(self, stream: int) -> np.random.Generator:
        """Return an independent generator for one use (0 world, 1 picture, 2 sound, 3 questions)."""
        return np.random.default_rng(np.random.SeedSequence((*self.seed, stream)))

    def evidence(self) -> dict[str, list[list[int]] | list[int]]:
        """Return the media tokens that the questions are about: video as [grid, row, column], audio as token index."""
        video = sorted([e.second, e.row, e.column] for e in self.events)
        audio = {t for e in self.events for t in range(e.token, e.token + e.length)}
        audio |= {t for c in self.calls for t in (c.token, c.token + 1)}
        return {"video": video, "audio": sorted(audio)}


EVENTS_PER_CLIP = 4
CALLS_PER_CLIP = 2


def make_clip(domain: str, split: str, index: int) -> Clip:
    """Draw clip `index` of a split.

    Raises:
        ValueError: unknown domain or split, or a negative index.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; there are {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"clip index must not be negative, got {index}")
    spec = DOMAINS[domain]
    seed = (WORLD_VERSION, spec.seed, SPLITS.index(split), index)
    rng = np.random.default_rng(np.random.SeedSequence((*seed, 0)))
    events, beeps, calls, chirps = _draw_sounds(spec, rng)
    cards, textures = _draw_distractors(spec, rng, events)
    return Clip(f"{domain}_{split}_{index:05d}", spec, seed, events, beeps, calls, chirps, cards, textures)


def _draw_sounds(
    spec: Domain, rng: np.random.Generator
) -> tuple[tuple[Event, ...], tuple[Beep, ...], tuple[Call, ...], tuple[Chirp, ...]]:
    """Draw events with distinct attributes, then fill every second with sounds that do not overlap."""
    event_seconds = rng.choice(SECONDS, EVENTS_PER_CLIP, replace=False)
    colours = rng.permutation(len(COLOURS))
    shapes = rng.permutation(len(SHAPES))
    tones = rng.permutation(len(TONES))
    call_seconds = list(rng.choice(SECONDS, CALLS_PER_CLIP, replace=False))
    kinds = rng.permutation(len(CALLS))
    registers = rng.permutation(len(REGISTERS))
    events: list[Event] = []
    beeps: list[Beep] = []
    calls: list[Call] = []
    chirps: list[Chirp] = []
    for second in range(SECONDS):
        n_event = int(second in event_seconds)
        n_call = int(second in call_seconds)
        n_beep = int(rng.integers(spec.off_screen_beeps[0], spec.off_screen_beeps[1] + 1))
        n_chirp = int(rng.integers(spec.chirps[0], spec.chirps[1] + 1))
        beep_lengths = 1 + (rng.random(n_event + n_beep) < spec.two_token_beeps).astype(int)
        while beep_lengths.sum() + 2 * n_call + n_chirp > AUDIO_TOKENS_PER_SECOND - 1:
            beep_lengths[beep_lengths.argmax()] = 1
        lengths = np.concatenate([beep_lengths, np.full(n_call, 2), np.ones(n_chirp, dtype=int)])
        first = second * AUDIO_TOKENS_PER_SECOND
        starts = first + _place(lengths, min(AUDIO_TOKENS_PER_SECOND, AUDIO_TOKENS - first), rng)
        on_screen = -1
        if n_event:
            i = len(events)
            on_screen = int(shapes[i])
            row, column = (int(v) for v in rng.integers(0, CELLS, 2))
            events.append(
                Event(second, row, column, int(colours[i]), on_screen, int(tones[i]), int(starts[0]), int(lengths[0]))
            )
        others = [s for s in range(len(SHAPES)) if s != on_screen]
        for k in range(n_event, n_event + n_beep):
            beeps.append(
                Beep(
                    int(starts[k]),
                    int(lengths[k]),
                    int(rng.integers(len(TONES))),
                    int(others[rng.integers(len(others))]),
                )
            )
        if n_call:
            i = len(calls)
            calls.append(Call(int(starts[n_event + n_beep]), int(kinds[i]), int(registers[i])))
        chirps += [Chirp(int(t), int(rng.integers(8))) for t in starts[n_event + n_beep + n_call :]]
    return tuple(events), tuple(beeps), tuple(calls), tuple(chirps)


def _place(lengths: np.ndarray, room: int, rng: np.random.Generator) -> np.ndarray:
    """Return start tokens [n] within `room` tokens for sounds of the given lengths, in random order, no overlap."""
    free = room - int(lengths.sum())
    if free < 0:
        raise ValueError(f"sounds of {int(lengths.sum())} tokens do not fit into {room} tokens")
    order = rng.permutation(len(lengths))
    gaps = np.sort(rng.integers(0, free + 1, len(lengths)))
    before = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    starts = np.empty(len(lengths), dtype=int)
    starts[order] = before + gaps
    return starts


def _draw_distractors(
    spec: Domain, rng: np.random.Generator, events: tuple[Event, ...]
) -> tuple[tuple[Card, ...], tuple[Texture, ...]]:
    """Draw the cards and textures of every second, sparing the cells that show a shape."""
    taken = {(e.second, e.row, e.column) for e in events}
    cards: list[Card] = []
    textures: list[Texture] = []
    for second in range(SECONDS):
        cells = [(second, i // CELLS, i % CELLS) for i in rng.permutation(CELLS**2).tolist()]
        cells = [cell for cell in cells if cell not in taken]
        n = int(rng.integers(spec.cards[0], spec.cards[1] + 1))
        for cell in cells[:n]:
            red, green, blue = rng.integers(*CARD_TINTS, 3).tolist()
            colour, shape = int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))
            cards.append(Card(*cell, colour, shape, (red, green, blue)))
        for cell in cells[n:]:
            if rng.random() < spec.clutter:
                kind, variant = int(rng.integers(len(spec.textures))), int(rng.integers(8))
                a, b, c, d, e, f = rng.integers(0, 256, 6).tolist()
                textures.append(Texture(*cell, kind, variant, (a, b, c, d, e, f)))
    return tuple(cards), tuple(textures)
