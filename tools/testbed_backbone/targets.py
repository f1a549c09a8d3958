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
    CELLS,
    COLOURS,
    NUMBERS,
    REGISTERS,
    SECONDS,
    SHAPES,
    TONES,
    Call,
    Event,
)

TEXTURES = tuple(sorted({kind for domain in DOMAINS.values() for kind in domain.textures}))
VIDEO_CONCEPTS = ("empty", "object", "texture", *TEXTURES)
TINTS = tuple(f"tint{i}" for i in range(6))
AUDIO_CONCEPTS = ("hum", "beep", "call sound", *(f"chirp{i}" for i in range(8)))
TIMBRES = tuple(f"timbre of {shape}" for shape in SHAPES)

HEADS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "cell": ("empty", "object", *TEXTURES),
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
    return [*words, *VIDEO_CONCEPTS, *TINTS, *AUDIO_CONCEPTS, *TIMBRES]


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
        target[i] = _mix((concepts["texture"], 0.3), (concepts[kind], 0.6), (tint, 0.5))  # type: ignore[arg-type]
        labels["cell"][i] = HEADS["cell"].index(kind)
    for e in clip.events:
        i = (e.second * CELLS + e.row) * CELLS + e.column
        target[i] = _mix(
            (concepts[COLOURS[e.colour]], 1.0),
            (concepts[SHAPES[e.shape]], 1.0),
            (concepts["object"], 0.4),
            (concepts["empty"], 0.03),
        )
        labels["cell"][i], labels["colour"][i], labels["shape"][i] = 1, e.colour, e.shape
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
    """Return a clip whose picture has a shape in every third cell, for the warm-up of the vision tower."""
    clip, rng = _dense_base(domain, index)
    events = []
    for second, row, column in np.argwhere(rng.random((SECONDS, CELLS, CELLS)) < 0.33):
        colour, shape = int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))
        events.append(Event(int(second), int(row), int(column), colour, shape, tone=0, token=0, length=0))
    cells = {(e.second, e.row, e.column) for e in events}
    textures = tuple(t for t in clip.textures if (t.second, t.row, t.column) not in cells)
    return replace(clip, events=tuple(events), textures=textures)


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
