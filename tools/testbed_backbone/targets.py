"""What each media token shows or sounds: the dense labels that the towers are warmed up with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from omnisieve.data.synthetic import DOMAINS, Clip, make_clip
from omnisieve.data.synthetic.world import (
    AUDIO_TOKENS,
    CALLS,
    CARD_TINTS,
    CELLS,
    COLOURS,
    NUMBERS,
    REGISTERS,
    SECONDS,
    SHAPES,
    TONES,
    Call,
    Card,
    Event,
)

TEXTURES = tuple(sorted({kind for domain in DOMAINS.values() for kind in domain.textures}))
VIDEO_CONCEPTS = ("empty", "object", "texture", *TEXTURES)
TINTS = tuple(f"tint{i}" for i in range(6))
TILE_TINTS = tuple(f"tile tint{i}" for i in range(3))
AUDIO_CONCEPTS = ("hum", "beep", "call sound", *(f"chirp{i}" for i in range(8)))
TIMBRES = tuple(f"timbre of {shape}" for shape in SHAPES)

OBJECT, CARD, CARD_TINT, TEXTURE_TINT = 0.3, 0.2, 1.0, 1.0
"""Weights of concepts in what the vision tower is taught; they decide how isolated events are among distractors."""

HEADS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "cell": ("empty", "object", "card", *TEXTURES),
    "tone": TONES,
    "timbre": TIMBRES,
    "call": CALLS,
    "register": REGISTERS,
    "sound": AUDIO_CONCEPTS,
}
"""Groups of concepts of which a token shows exactly one, or none."""


def concept_names() -> list[str]:
    """Return the names of all concept vectors: words of the language first, then what only the towers know."""
    words = [*COLOURS, *SHAPES, *TONES, *CALLS, *REGISTERS, *NUMBERS]
    return [*words, *VIDEO_CONCEPTS, *TINTS, *AUDIO_CONCEPTS, *TIMBRES, "card", *TILE_TINTS]


def video_targets(clip: Clip, concepts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return target vectors [432, D] and class labels [432] per head (-1: none) of a clip's cells."""
    n = SECONDS * CELLS * CELLS
    target = concepts["empty"].expand(n, -1).clone()
    labels = {name: torch.full((n,), -1) for name in ("colour", "shape", "cell")}
    labels["cell"][:] = 0
    for t in clip.textures:
        i = (t.second * CELLS + t.row) * CELLS + t.column
        kind = clip.domain.textures[t.kind]
        tint = sum((v / 127.5 - 1) * concepts[name] for v, name in zip(t.tints, TINTS, strict=True))
        target[i] = _mix((concepts["texture"], 0.3), (concepts[kind], 0.6), (tint, TEXTURE_TINT))  # type: ignore[arg-type]
        labels["cell"][i] = HEADS["cell"].index(kind)
    for thing in (*clip.events, *clip.cards):
        i = (thing.second * CELLS + thing.row) * CELLS + thing.column
        named = (concepts[COLOURS[thing.colour]], 1.0), (concepts[SHAPES[thing.shape]], 1.0)
        if isinstance(thing, Event):
            kind = "object"
            target[i] = _mix(*named, (concepts[kind], OBJECT))
        else:
            kind = "card"
            low, high = CARD_TINTS
            values = [2 * (v - low) / (high - low) - 1 for v in thing.tint]
            tint = sum(v * concepts[name] for v, name in zip(values, TILE_TINTS, strict=True))
            target[i] = _mix(*named, (concepts[kind], CARD), (tint, CARD_TINT))  # type: ignore[arg-type]
        labels["cell"][i], labels["colour"][i], labels["shape"][i] = (
            HEADS["cell"].index(kind),
            thing.colour,
            thing.shape,
        )
    return target, labels


def audio_targets(clip: Clip, concepts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return target vectors [299, D] and class labels [299] per head (-1: none) of a clip's audio tokens."""
    target = concepts["hum"].expand(AUDIO_TOKENS, -1).clone()
    labels = {name: torch.full((AUDIO_TOKENS,), -1) for name in ("tone", "timbre", "call", "register", "sound")}
    labels["sound"][:] = 0
    sounds = [(e.token, e.length, e.tone, e.shape) for e in clip.events]
    sounds += [(b.token, b.length, b.tone, b.timbre) for b in clip.beeps]
    for token, length, tone, timbre in sounds:
        span = slice(token, token + length)
        shape = (concepts[SHAPES[timbre]], 0.7)
        target[span] = _mix(
            (concepts[TONES[tone]], 1.0), shape, (concepts[TIMBRES[timbre]], 0.7), (concepts["beep"], 0.5)
        )
        labels["sound"][span], labels["tone"][span], labels["timbre"][span] = 1, tone, timbre
    for c in clip.calls:
        span = slice(c.token, c.token + 2)
        target[span] = _mix(
            (concepts[CALLS[c.kind]], 1.0),
            (concepts[REGISTERS[c.register]], 1.0),
            (concepts["call sound"], 0.3),
            (concepts["beep"], 0.8),
        )
        labels["sound"][span], labels["call"][span], labels["register"][span] = 2, c.kind, c.register
    for chirp in clip.chirps:
        target[chirp.token] = concepts[f"chirp{chirp.band}"]
        labels["sound"][chirp.token] = 3 + chirp.band
    return target, labels


def _mix(*parts: tuple[Tensor, float]) -> Tensor:
    """Return the weighted sum of concept vectors, scaled to unit variance."""
    total = sum((vector * weight for vector, weight in parts), torch.zeros(()))
    return total / total.pow(2).mean().sqrt()


def dense_picture(domain: str, index: int) -> Clip:
    """Return a clip whose picture has an event or a card in every second cell, for the warm-up of the vision tower."""
    clip, rng = _dense_base(domain, index)
    events, cards = [], []
    for second, row, column in np.argwhere(rng.random((SECONDS, CELLS, CELLS)) < 0.5):
        cell, colour, shape = (int(second), int(row), int(column)), *rng.integers((len(COLOURS), len(SHAPES))).tolist()
        if rng.random() < 0.5:
            events.append(Event(*cell, colour, shape, tone=0, token=0, length=0))
        else:
            red, green, blue = rng.integers(*CARD_TINTS, 3).tolist()
            cards.append(Card(*cell, colour, shape, (red, green, blue)))
    cells = {(thing.second, thing.row, thing.column) for thing in (*events, *cards)}
    textures = tuple(t for t in clip.textures if (t.second, t.row, t.column) not in cells)
    return replace(clip, events=tuple(events), cards=tuple(cards), textures=textures)


def dense_sound(domain: str, index: int) -> Clip:
    """Return a clip in which calls replace most of the long beeps, for the warm-up of the audio tower."""
    clip, rng = _dense_base(domain, index)
    calls, beeps = list(clip.calls), []
    for beep in clip.beeps:
        if beep.length == 2 and rng.random() < 0.7:
            calls.append(Call(beep.token, int(rng.integers(len(CALLS))), int(rng.integers(len(REGISTERS)))))
        else:
            beeps.append(beep)
    return replace(clip, calls=tuple(calls), beeps=tuple(beeps))


def _dense_base(domain: str, index: int) -> tuple[Clip, np.random.Generator]:
    return make_clip(domain, "backbone", 1_000_000 + index), np.random.default_rng((7, index))
