"""Asks every question of a benchmark under every method and ratio, with the stock `generate`.

The outer loop is over clips: media are decoded and encoded once and serve all questions, methods and ratios, and
memory does not grow with the benchmark.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from omnisieve.backbones import Attachment, adapter_for, attach
from omnisieve.backbones.shape import DecoderShape, decoder_shape
from omnisieve.backbones.tuning import LoraVariants
from omnisieve.compressors import Compressor, Need, UnreachableRatioError
from omnisieve.data.read_ahead import ReadAhead
from omnisieve.evaluation.accounting import prefill
from omnisieve.evaluation.benchmarks import Benchmark, Clip
from omnisieve.evaluation.bounds import show_evidence
from omnisieve.evaluation.guards import MediaGuard
from omnisieve.evaluation.methods import Method
from omnisieve.evaluation.metrics import Answer
from omnisieve.evaluation.prompts import Prompt, generate, make_prompts
from omnisieve.evaluation.report import Cell
from omnisieve.layout import MEDIA
from omnisieve.trained_llm import add_variant

Item = TypeVar("Item")


@dataclass
class Results:
    """What an evaluation found.

    Attributes:
        cells: one per method and ratio.
        failures: `{"clip", "error"}` of every clip with questions that could not be asked; they are missing from all
            cells alike.
        guards: what the hearing and the seeing test found, see `guards.MediaGuard`.
        seconds: wall clock of each cell ("random 0.25"), and of "media": decoding, encoders, guards.
        decoder: what the cost of a prompt depends on.
    """

    cells: list[Cell]
    failures: list[dict[str, str]] = field(default_factory=list)
    guards: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    decoder: DecoderShape | None = None


class Evaluation:
    """Every method at every ratio on one benchmark."""

    def __init__(
        self,
        model: nn.Module,
        benchmark: Benchmark,
        methods: Sequence[Method],
        ratios: Sequence[float],
        *,
        clips_per_batch: int = 1,
        tokens_per_forward: int | None = None,
        max_new_tokens: int = 16,
        workers: int = 0,
    ) -> None:
        """Build all compressors, so that a mistake in one shows before anything is computed.

        Args:
            model: a stock model; see `backbones.adapter_for`.
            benchmark: clips with questions.
            methods: see `methods.resolve_methods`.
            ratios: retained ratios asked of each method.
            clips_per_batch: clips whose questions are asked together; their encoder outputs stay in memory.
            tokens_per_forward: of prompts asked together, unless a single one is longer; None: no limit.
            max_new_tokens: of an answer.
            workers: processes that read clips ahead.

        Raises:
            CompressorError: a method's settings cannot be.
        """
        self.adapter = adapter_for(model)
        self.benchmark = benchmark
        self.clips_per_batch = clips_per_batch
        self.tokens_per_forward = tokens_per_forward
        self.max_new_tokens = max_new_tokens
        self.workers = workers
        thinker = self.adapter.thinker
        self.results = Results([], decoder=decoder_shape(self.adapter.decoder.config, thinker.dtype.itemsize))
        self._compressors: list[Compressor | None] = []
        self._variants = LoraVariants(self.adapter)
        self._variant_of: dict[str | None, str | None] = {None: None}
        for method in methods:
            for ratio in method.ratios(ratios):
                preset = None if method.preset is None else method.preset.name
                llm = None if method.llm is None else str(method.llm)
                self.results.cells.append(
                    Cell(method.label, method.kind, benchmark.name, ratio, preset=preset, llm=llm)
                )
                self._compressors.append(self._build(method, ratio))

    def run(self) -> Results:
        """Ask everything; a progress bar counts clips.

        Raises:
            ArtifactError, BackboneError: an export's tuned LLM is damaged, or is another one.
        """
        compressors = [compressor for compressor in self._compressors if compressor is not None]
        needs = tuple(dict.fromkeys(need for compressor in compressors for need in compressor.needs))
        guard = MediaGuard(self.adapter, self.benchmark.pad_token_id)
        self.results.guards = guard.found
        with self._tuned(), torch.inference_mode(), tqdm(total=len(self.benchmark), desc="clips", unit="clip") as bar:
            for clips in self._batches():
                readable = [clip for clip in clips if clip.questions]
                self._note_failures([clip for clip in clips if clip.error is not None])
                if readable:
                    with self._timed("media"):
                        guard.look(readable)
                    for prompt in self._prompts(readable, needs):
                        for cell, compressor in zip(self.results.cells, self._compressors, strict=True):
                            self._ask(cell, compressor, prompt)
                if not bar.n:
                    self._report_first(len(clips))
                bar.update(len(clips))
        return self.results

    def _report_first(self, clips: int) -> None:
        """Say how long the first clips took, by method: an evaluation that is slow shows it at once."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.results.seconds.items())
        tqdm.write(f"the first {clips} clip(s) took, in seconds: {parts}", file=sys.stderr)

    @contextmanager
    def _tuned(self) -> Iterator[None]:
        """Inside, the model has the adapters of all exports whose LLM answers, silent."""
        try:
            for llm in dict.fromkeys(cell.llm for cell in self.results.cells if cell.llm is not None):
                self._variant_of[llm] = add_variant(self._variants, Path(llm))
            yield
        finally:
            self._variants.remove()

    def _build(self, method: Method, ratio: float) -> Compressor | None:
        """None, and a reason in the cell just added, where the method cannot have this ratio at all."""
        try:
            return method.build(ratio).to(self.adapter.thinker.device)
        except UnreachableRatioError as error:
            self.results.cells[-1].unreachable = str(error)
            return None

    def _batches(self) -> Iterator[list[Clip]]:
        """Clips in groups."""
        dataset = cast(Dataset[Clip], self.benchmark)
        clips: Iterator[Clip] = iter(ReadAhead(dataset, num_workers=self.workers))
        return self._as_media(iter(lambda: list(islice(clips, self.clips_per_batch)), []))

    def _prompts(self, clips: Sequence[Clip], needs: Sequence[Need]) -> Iterator[Prompt]:
        """Questions of `clips` in batches, made one at a time."""
        return self._as_media(
            make_prompts(
                self.adapter,
                clips,
                pad_token_id=self.benchmark.pad_token_id,
                needs=needs,
                max_tokens=self.tokens_per_forward,
            )
        )

    def _as_media(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; making one counts as time of "media"."""
        while True:
            with self._timed("media"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _note_failures(self, clips: Sequence[Clip]) -> None:
        for clip in clips:
            self.results.failures.append({"clip": clip.id, "error": str(clip.error)})
            for cell in self.results.cells:
                cell.failures += clip.n_questions - len(clip.questions)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = self.results.seconds
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    def _ask(self, cell: Cell, compressor: Compressor | None, prompt: Prompt) -> None:
        """Add a batch's answers to `cell`, unless its ratio is, or turns out to be, unreachable."""
        if compressor is None or cell.unreachable is not None:
            return
        show_evidence(compressor, [meta["evidence"] for meta in prompt.batch.meta if "evidence" in meta])
        try:
            with (
                self._timed(f"{cell.method} {cell.retained_ratio:g}"),
                self._variants.speaking(self._variant_of[cell.llm]),
                attach(self.adapter.thinker, compressor) as attachment,
            ):
                attachment.expect(layout=prompt.batch.layout, needs=prompt.needs)
                written = generate(
                    self.adapter,
                    prompt,
                    self.max_new_tokens,
                    eos_token_id=self.benchmark.eos_token_id,
                    pad_token_id=self.benchmark.pad_token_id,
                )
        except UnreachableRatioError as error:
            cell.unreachable = str(error)
            cell.answers.clear()
            cell.prefills.clear()
            return
        self._record(cell, prompt, attachment, self.benchmark.decode(written))

    def _record(self, cell: Cell, prompt: Prompt, attachment: Attachment, predictions: Sequence[str]) -> None:
        batch, plan = prompt.batch, attachment.last_plan
        assert plan is not None  # every prompt is planned
        kept = attachment.layer_counts()
        cell.prefills.append(prefill(attachment.compressor, plan, batch.layout, kept))
        kept_counts = map(tuple, kept.mean(axis=0).tolist())
        counts = zip(*(batch.layout.counts(modality).tolist() for modality in MEDIA), strict=True)
        rows = zip(batch.ids, prompt.clips, batch.meta, predictions, kept_counts, counts, strict=True)
        for line, clip, meta, predicted, kept_tokens, tokens in rows:
            cell.answers.append(
                Answer(
                    question=f"{line}/{meta['turn']}",
                    clip=clip,
                    family=str(meta.get("family", "all")),
                    expected=meta["answer"],
                    predicted=predicted,
                    correct=self.benchmark.is_correct(predicted, meta["answer"]),
                    kept=kept_tokens,
                    present=tokens,
                )
            )
