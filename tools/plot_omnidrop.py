"""Draw how many tokens OmniDrop lets each decoder layer process, and compare its presets with the paper's totals.

    python tools/plot_omnidrop.py                        # omnidrop.svg in the current folder
    python tools/plot_omnidrop.py --out curves.svg --entry 44.4

The schedules start from the share of tokens that enters the LLM: 45 % in the paper, 44.4 % of clips with 288 video and
50 audio tokens in 2 s. Printed is the mean over layers of each preset beside the total that the paper gives it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omnisieve import build_compressor
from omnisieve.compressors.base import find_preset
from omnisieve.compressors.omnidrop import OmniDrop

DEPTHS = {"7b": 28, "3b": 36}
PRESETS = ("omnidrop/7b/30", "omnidrop/7b/20", "omnidrop/3b/30", "omnidrop/3b/20")
COLOURS = ("#1b6ca8", "#c8553d", "#4f9d69", "#8e5ea2")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 380, 60, 20, 20, 50


@dataclass(frozen=True)
class Curve:
    """A preset's schedule.

    Attributes:
        name: of the preset.
        published: percent of all tokens that the paper says it keeps.
        retained: percent of all tokens that each layer processes, [L].
    """

    name: str
    published: float
    retained: np.ndarray

    @property
    def mean(self) -> float:
        """Percent of all tokens, averaged over layers."""
        return float(self.retained.mean())


def main(argv: Sequence[str]) -> int:
    """Print the means and write the drawing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("omnidrop.svg"), help="where the drawing goes")
    parser.add_argument("--entry", type=float, default=45.0, help="percent of tokens that enter the LLM")
    arguments = parser.parse_args(argv)
    curves = [curve(name, arguments.entry) for name in PRESETS]
    print(table(curves))
    arguments.out.write_text(drawing(curves, arguments.entry), encoding="utf-8")
    print(f"drawn: {arguments.out}")
    return 0


def curve(name: str, entry: float) -> Curve:
    """The schedule of a preset, from `entry` percent on."""
    compressor = build_compressor("omnidrop", preset=name)
    assert isinstance(compressor, OmniDrop)
    s = compressor.settings
    assert s.p_init is not None
    assert s.p_final is not None
    pruning = compressor.for_depth(DEPTHS[name.split("/")[1]]).pruning
    return Curve(name, 100 * find_preset(name).total, entry * pruning.retention(s.p_init, s.p_final))


def table(curves: Sequence[Curve]) -> str:
    """One line per preset, percent of all tokens."""
    lines = [f"{'preset':16}{'layers':>8}{'mean':>8}{'paper':>8}{'difference':>12}{'last layer':>12}"]
    for c in curves:
        numbers = f"{c.mean:8.1f}{c.published:8.0f}{c.mean - c.published:+12.1f}{c.retained[-1]:12.2f}"
        lines.append(f"{c.name:16}{len(c.retained):8d}{numbers}")
    return "\n".join(lines)


def drawing(curves: Sequence[Curve], entry: float) -> str:
    """The curves over the depth of the model, as SVG; a dashed line is a preset's mean."""
    top = 10 * np.ceil(entry / 10)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for percent in np.arange(0, top + 1, 10):
        y = height(percent, top)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent:.0f} %</text>')
    for share in np.linspace(0, 1, 5):
        x, middle = place(share), HEIGHT - BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{middle}" text-anchor="middle">{share:.2f}</text>')
    parts.append(
        f'<text x="{place(0.5):.1f}" y="{HEIGHT - 10}" text-anchor="middle">depth (layer / last layer): share of the '
        "media tokens that a layer processes</text>"
    )
    for number, (c, colour) in enumerate(zip(curves, COLOURS, strict=True)):
        depth = np.linspace(0, 1, len(c.retained))
        points = " ".join(f"{place(x):.1f},{height(y, top):.1f}" for x, y in zip(depth, c.retained, strict=True))
        mean, label = height(c.mean, top), TOP + 16 * (number + 1)
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<line x1="{LEFT}" y1="{mean:.1f}" x2="{WIDTH - RIGHT}" y2="{mean:.1f}" stroke="{colour}" '
            'stroke-dasharray="4 4" stroke-opacity="0.6"/>',
            f'<text x="{WIDTH - RIGHT - 4}" y="{label}" text-anchor="end" fill="{colour}">{c.name}: {c.mean:.1f} % '
            f"(paper {c.published:.0f} %)</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def place(share: float) -> float:
    """Horizontal place of a depth in [0, 1]."""
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def height(percent: float, top: float) -> float:
    """Vertical place of a percentage."""
    return TOP + (1 - percent / top) * (HEIGHT - TOP - BOTTOM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
