"""A method is one short file, and no loop of it goes over samples, windows or frames."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import omnisieve
from omnisieve.compressors.base import Compressor, Needs
from omnisieve.compressors.inner import InnerCompressor
from omnisieve.layout import MEDIA, Modality, TokenLayout
from tests.compressors.cases import HEAD, HIDDEN, INNER, METHODS, PUBLISHED, build, label, ratios_of
from tests.layouts import LayoutSpec, make_layout

PACKAGE = Path(omnisieve.__file__).parent
FILES = sorted((PACKAGE / "compressors").glob("*.py"))
LONGEST = 200
NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no blanks, comments or docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in NOT_CODE for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        # A string that stands alone documents a module, a class, a function or a constant.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_method_is_short(file: Path) -> None:
    assert len(code_lines(file.read_text(encoding="utf-8"))) <= LONGEST


SOURCE = '''"""Documents.

More.
"""

# Why.
X = (
    1,  # one
)
"""Documents X."""


def f():
    """Documents f."""
    return """not
documents"""
'''


def test_only_code_is_counted() -> None:
    assert sorted(code_lines(SOURCE)) == [7, 8, 9, 13, 15, 16]


# Loops.

Case = tuple[str, dict[str, Any]]
ROUNDED = [((*METHODS, *INNER), "exact"), ((*PUBLISHED, *INNER), "official")]
every_method = pytest.mark.parametrize(
    ("case", "rounding"),
    [pytest.param(case, name, id=f"{label(case)}-{name}") for cases, name in ROUNDED for case in cases],
)
SPEC = LayoutSpec(windows=8)
PICKING = ("maxmin_order", "greedy_cuts")
"""Functions whose loops go over picks: one more token, or one more cut, in all segments at once."""


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of the package some work runs; a line in a loop counts every time."""
    lines, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(str(PACKAGE)) or frame.f_code.co_name in PICKING:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def lines_to_choose(case: Case, rounding: str, *specs: LayoutSpec) -> int:
    """Lines that choosing tokens runs, before and inside the LLM, on a layout that nobody has cut yet."""
    compressor = build(case, rounding=rounding, **ratios_of(case, "published"))
    layout = make_layout(*specs)
    generator = torch.Generator().manual_seed(0)
    embeds, keys, attention, scores = (
        torch.rand(len(specs), layout.length, *width, generator=generator) for width in ((HIDDEN,), (HEAD,), (), ())
    )
    needs = {need: keys if need.kind == "keys" else attention for need in compressor.needs}
    return lines_run(lambda: choose(compressor, embeds, layout, needs, scores))


@torch.no_grad()
def choose(compressor: Compressor, embeds: Tensor, layout: TokenLayout, needs: Needs, scores: Tensor) -> None:
    alive = compressor.plan(embeds, layout, needs).keep & layout.mask(*MEDIA)
    if isinstance(compressor, InnerCompressor):
        for number, cut in enumerate(compressor.cuts()):
            if cut.score is not None:
                alive = alive & compressor.keep_after(number, scores, alive, layout)


@every_method
def test_no_loop_goes_over_samples_windows_or_frames(case: Case, rounding: str) -> None:
    lines_to_choose(case, rounding, SPEC)  # the first time fills caches
    expected = lines_to_choose(case, rounding, SPEC)
    assert lines_to_choose(case, rounding, SPEC, SPEC, SPEC) == expected
    assert lines_to_choose(case, rounding, replace(SPEC, windows=16)) == expected
    assert lines_to_choose(case, rounding, replace(SPEC, grids_per_window=4, audio_per_window=20)) == expected


def test_loops_are_found() -> None:
    layouts = [make_layout(*specs) for specs in ([SPEC], [SPEC, SPEC], [replace(SPEC, windows=16)])]

    def loop(layout: TokenLayout) -> None:
        for row in range(layout.batch_size):
            for _ in range(layout.segments("frame", Modality.VIDEO).sizes.shape[1]):
                layout.counts(Modality.VIDEO)[row]

    one, more_samples, more_frames = (lines_run(lambda layout=layout: loop(layout)) for layout in layouts)
    assert one < more_samples
    assert one < more_frames
