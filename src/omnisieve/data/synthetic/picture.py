"""Draws a clip: uint8 frames [24, 168, 168, 3], two frames a second."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from omnisieve.data.synthetic.world import CELLS, SECONDS, SHAPES, Card, Clip, Event

CELL = 28
SIZE = CELLS * CELL
FRAMES_PER_SECOND = 2
COLOUR_VALUES = np.array(
    [[225, 40, 35], [40, 190, 60], [45, 75, 235], [235, 215, 40], [240, 90, 205], [40, 215, 225]], dtype=np.float32
)
NOISE = 3.0
"""Standard deviation of the noise of each frame, in grey levels."""


def draw_frames(clip: Clip) -> np.ndarray:
    """Return the frames of a clip, uint8 [24, 168, 168, 3]."""
    rng = clip.rng(1)
    low, high = clip.domain.background
    corners = rng.uniform(low, high, (2, 2, 3)).astype(np.float32)
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None]
    rows = corners[0][None] * (1 - ramp[..., None]) + corners[1][None] * ramp[..., None]
    background = rows[:, :1] * (1 - ramp.T[..., None]) + rows[:, 1:] * ramp.T[..., None]
    seconds = np.repeat(background[None], SECONDS, axis=0)
    noise = np.rint(rng.normal(0, NOISE, (SIZE, SIZE, 3))).astype(np.float32)
    shifts = rng.integers(0, SIZE, (SECONDS * FRAMES_PER_SECOND, 2))
    _draw_textures(seconds, clip)
    for card in clip.cards:
        _draw_card(seconds, card, clip.domain.card_style, rng)
    for event in clip.events:
        _draw_shape(seconds, event, rng)
    frames = np.repeat(seconds, FRAMES_PER_SECOND, axis=0)
    for i, shift in enumerate(shifts):
        frames[i] += np.roll(noise, tuple(shift), axis=(0, 1))
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _draw_textures(seconds: np.ndarray, clip: Clip) -> None:
    """Paint all textured cells into `seconds` [12, 168, 168, 3]."""
    if not clip.textures:
        return
    bank = _pattern_bank(clip.domain.textures)
    where = np.array([(t.second, t.row, t.column) for t in clip.textures])
    pattern = bank[[t.kind for t in clip.textures], [t.variant for t in clip.textures]][..., None]
    tints = np.array([t.tints for t in clip.textures], dtype=np.float32).reshape(-1, 2, 1, 1, 3)
    cells = seconds.reshape(SECONDS, CELLS, CELL, CELLS, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    cells[tuple(where.T)] = tints[:, 0] * (1 - pattern) + tints[:, 1] * pattern


def _draw_card(seconds: np.ndarray, card: Card, style: str, rng: np.random.Generator) -> None:
    """Paint a light tile, or a light frame, and a coloured shape on it."""
    y, x = card.row * CELL, card.column * CELL
    cell = seconds[card.second, y : y + CELL, x : x + CELL]
    if style == "tile":
        cell[1:-1, 1:-1] = card.tint
    else:
        inner = cell[3:-3, 3:-3].copy()
        cell[1:-1, 1:-1] = card.tint
        cell[3:-3, 3:-3] = inner
    _draw_shape(seconds, card, rng)


def _draw_shape(seconds: np.ndarray, thing: Event | Card, rng: np.random.Generator) -> None:
    """Paint one coloured shape, slightly moved, scaled and tinted, over its cell."""
    shift, scale = rng.uniform(-1.5, 1.5, 2), rng.uniform(0.85, 1.0)
    mask = shape_mask(thing.shape, (float(shift[0]), float(shift[1])), float(scale))[..., None]
    colour = COLOUR_VALUES[thing.colour] + rng.uniform(-20, 20, 3).astype(np.float32)
    y, x = thing.row * CELL, thing.column * CELL
    cell = seconds[thing.second, y : y + CELL, x : x + CELL]
    cell[:] = cell * (1 - mask) + colour * mask


def shape_mask(shape: int, shift: tuple[float, float] = (0.0, 0.0), scale: float = 1.0) -> np.ndarray:
    """Return the soft mask of a shape in its cell, float32 [28, 28] in 0..1."""
    axis = (np.arange(CELL) + 0.5 - CELL / 2) / (CELL / 2 * 0.9 * scale)
    y = axis[:, None] - shift[0] / (CELL / 2)
    x = axis[None, :] - shift[1] / (CELL / 2)
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    inside = {
        "circle": 0.85 - radius,
        "square": 0.75 - np.maximum(abs(x), abs(y)),
        "triangle": np.minimum(0.7 - y, (y + 0.9) * 0.5 - abs(x)),
        "diamond": 0.95 - (abs(x) + abs(y)),
        "cross": np.minimum(0.28 - np.minimum(abs(x), abs(y)), 0.9 - np.maximum(abs(x), abs(y))),
        "star": 0.62 + 0.33 * np.cos(5 * angle) - radius,
        "ring": 0.2 - abs(radius - 0.7),
        "moon": np.minimum(0.9 - radius, np.hypot(x - 0.45, y) - 0.6),
    }[SHAPES[shape]]
    return _quantise(np.clip(inside * 8 + 0.5, 0, 1))


def _quantise(values: np.ndarray) -> np.ndarray:
    """Round to 1/64, so that the last bits of a platform's sine cannot change a pixel."""
    return (np.rint(values * 64) / 64).astype(np.float32)


@lru_cache(maxsize=4)
def _pattern_bank(kinds: tuple[str, ...]) -> np.ndarray:
    """Return the texture patterns of a domain, float32 [kinds, 8 variants, 28, 28] in 0..1."""
    y, x = np.meshgrid(np.arange(CELL), np.arange(CELL), indexing="ij")
    bank = np.empty((len(kinds), 8, CELL, CELL))
    for k, kind in enumerate(kinds):
        for v in range(8):
            phase, period = v % 4 * 3, 14 if v < 4 else 28
            u, w = (x + phase) % period, (y + phase) % period
            bank[k, v] = {
                "stripes": w < period / 2,
                "bars": u < period / 2,
                "checks": (u < period / 2) ^ (w < period / 2),
                "dots": np.hypot(x % 14 - 7, y % 14 - 7) < 2 + phase / 3,
                "noise": np.random.default_rng((k, v)).random((4, 4)).repeat(7, 0).repeat(7, 1),
                "waves": 0.5 + 0.5 * np.sin(2 * np.pi * (x + 3 * np.sin(y / 5) + phase) / period),
                "diagonals": (x + y + phase) % period < period / 2,
                "bricks": (w > 1) & ((x + (y // period) * period // 2 + phase) % period > 1),
                "rings": np.hypot(x - 14, y - 14) % period < period / 2,
                "ramps": u / period,
            }[kind]
    return _quantise(bank)
