"""The training loop, by optimiser steps."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from omnisieve.artifact import is_owned
from omnisieve.config import TrainConfig, save_config
from omnisieve.data.batch import Batch
from omnisieve.files import clean_up, remove
from omnisieve.training.bad_samples import SampleReports
from omnisieve.training.checkpoint import BEST, LAST, CheckpointStore, run_identity
from omnisieve.training.clock import Clock
from omnisieve.training.distributed import Ranks
from omnisieve.training.engine import build_engine, learning_rates
from omnisieve.training.errors import CheckpointError, TrainingError, writing
from omnisieve.training.exporting import export
from omnisieve.training.guards import Fault, Outcome, StepGuard
from omnisieve.training.interruption import Interruption
from omnisieve.training.lockstep import Lockstep
from omnisieve.training.memory import memory
from omnisieve.training.meter import Meter, progress, quality, ratios, record
from omnisieve.training.objective import TrainingModule
from omnisieve.training.pictures import asked_ratio
from omnisieve.training.probes import Probes
from omnisieve.training.schedule import draw_ratio, draw_seed
from omnisieve.training.scores import ScoreMeter
from omnisieve.training.streams import Streams, closable
from omnisieve.training.tracking import Tracker
from omnisieve.training.watchdog import Watchdog

CONFIG_FILE = "config.yaml"


class Trainer:
    """Trains a compressor; every rank makes one and calls `fit`.

    The run's folder then holds `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and the compressor as
    exported folders: `last/`, and `best/` by validation loss. `bad_samples.jsonl` lists files that could not be read
    and samples that are too long, `lowered_fps.jsonl` those read more thinly for it; `images/` holds pictures of the
    probe clips.
    """

    def __init__(self, config: TrainConfig, module: TrainingModule, streams: Streams, ranks: Ranks) -> None:
        self.step = 0
        self.best_loss = math.inf
        self._interruption = Interruption()
        self._watchdog = Watchdog(Path(config.output_dir), ranks.rank, config.train.watchdog_seconds)
        self._stopping = False
        self._validation_is_due = False
        self._has_stepped = False
        self._guard = StepGuard(module.parameters(), ranks, limit=config.train.max_bad_steps)
        self.engine: Any = build_engine(module, config)
        self._config = config
        self._train = config.train
        self._last_step = min(config.train.max_steps, config.train.stop_at or config.train.max_steps)
        self._validates = streams.val is not None and config.train.eval_every > 0
        self.module = module
        self._streams = streams
        self._ranks = ranks
        self._lockstep = Lockstep(ranks, config.train.zero_stage)
        self._directory = Path(config.output_dir)
        self._store = CheckpointStore(
            self._directory,
            ranks,
            identity=run_identity(config, streams.rounding, streams.reading),
            limit=config.train.save_total_limit,
        )
        self._reports = SampleReports(self._directory, ranks)
        self._clock = Clock(self.engine.device)
        module.after_encoders = partial(self._clock.lap, "encoders")
        self._meter, self._scores = Meter(ranks), ScoreMeter(ranks)
        self._probes = Probes(streams.probes, ranks)

    def fit(self) -> None:
        """Train to the last step, from the checkpoint that `train.resume` means, if there is one.

        A rank that gets SIGTERM or SIGINT ends all of them after their step, with a checkpoint.

        Raises:
            CheckpointError: there is one, but it does not fit this run or its data.
            OutputError: the run's folder cannot be written.
            TrainingError: too many steps in a row were not finite, or there is nothing to learn from.
        """
        with self._interruption:
            self._open()
            first = self._ranks.is_first
            bar = tqdm(total=self._train.max_steps, initial=self.step, disable=not first, unit="step")
            limit = self._train.picture_limit
            tracker = Tracker(self._directory, first_step=self.step, enabled=first, picture_limit=limit)
            batches = closable(self._streams.train)
            with bar, closing(tracker), closing(batches), self.module.attached(), self._watchdog:
                self._loop(batches, tracker, bar)
            if self._stopping and first:
                tqdm.write(f"ended on request after step {self.step}, go on with train.resume=auto", file=sys.stderr)
            self._interruption.honoured = self._stopping or self._interruption.asked

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._ranks.world_size

    def rehearse(self) -> tuple[list[Batch], dict[str, float]]:
        """Do the first step and write nothing: a trial before a long run. This trainer cannot be used afterwards.

        Returns:
            the micro-batches of this rank, and the sums over them and all ranks that `TrainingModule.forward` reports.

        Raises:
            TrainingError: there is nothing to learn from, or the step is not finite.
        """
        batches = closable(self._streams.train)
        with closing(batches), self.module.attached():
            window = list(itertools.islice(batches, self._train.gradient_accumulation_steps))
            outcome = self._optimise(window)
        if outcome.faults:
            raise TrainingError(f"the first step would be left out: {'; '.join(map(str, outcome.faults))}")
        return window, self._meter.read()

    def _loop(self, batches: Iterator[Batch], tracker: Tracker, bar: tqdm) -> None:
        if self._validation_is_due:
            self._end_step(tracker)
        while self.step < self._last_step and not self._stopping:
            self._clock.start()
            window = list(itertools.islice(batches, self._train.gradient_accumulation_steps))
            self._clock.lap("data_wait")
            rates = learning_rates(self.engine)
            outcome = self._optimise(window)
            self.step += 1
            self._streams.sampler.advance(self._train.gradient_accumulation_steps)
            # A record is about a warm start or about answers, never both.
            due = self._is_due(self._train.log_every) or self.step == self._train.warm_start.steps
            sums = self._meter.read() if due else None
            self._clock.stop()
            self._report_first_step()
            self._watchdog.beat()
            self._stopping = outcome.stop
            bar.update()
            self._report_faults(outcome.faults, tracker)
            self._record(sums, rates, tracker)
            if sums:
                bar.set_postfix_str(progress(sums))
            self._validation_is_due = self._validates and self._is_due(self._train.eval_every)
            self._end_step(tracker)

    def _end_step(self, tracker: Tracker) -> None:
        """Validate and save where that is due; a run that is asked to end saves at once, and validates on resuming."""
        if self._validation_is_due and not self._stopping:
            scores = self._validate()
            if scores is not None:
                tracker.log(self.step, scores)
                self._validation_is_due = False
                if self._ranks.is_first and self._train.picture_limit:
                    title = f"step {self.step}, {asked_ratio(self.module.compressor.settings)}"
                    tracker.pictures(self.step, self._probes.pictures(title))
                    self._watchdog.beat()
        saves = self._stopping or self._is_due(self._train.save_every)
        if saves or self._is_due(self._train.log_every):
            self._reports.share()
        if saves:
            self._save()
            self._watchdog.beat()

    def _report_first_step(self) -> None:
        """Say where the time of this process's first step went: a run that is slow shows it at once."""
        if self._has_stepped:
            return
        self._has_stepped = True
        seconds = self._clock.read()
        if self._ranks.is_first:
            parts = ", ".join(f"{lap.replace('_', ' ')} {seconds[lap]:.1f}" for lap in seconds if lap != "step")
            tqdm.write(f"the first step took {seconds['step']:.1f} s ({parts})", file=sys.stderr)

    def _is_due(self, every: int) -> bool:
        """Whether something happens after this step; at the last one everything does."""
        return self.step == self._last_step or (every > 0 and self.step % every == 0)

    # One step.

    def _optimise(self, window: Sequence[Batch]) -> Outcome:
        """One optimiser step on the micro-batches of its accumulation window; one that is left out is not measured.

        The loss is the sum over answer tokens (in a warm start: over clips) by their number over all micro-batches and
        ranks, so it does not depend on how samples are spread over them. DeepSpeed averages over ranks; that is undone
        here.
        """
        warm = self.step < self._train.warm_start.steps
        (count,) = self._ranks.sum([sum(len(batch) if warm else sum(batch.answer_tokens) for batch in window)])
        if not count:
            raise TrainingError(
                f"step {self.step + 1} has no answer to learn from: no conversation of its batch, from "
                f"{self._config.data.train}, has an assistant turn"
            )
        scale = self._ranks.world_size / count
        ratio, seed = self._ratio(), draw_seed(self._train.seed, self.step)
        lockstep = self._lockstep.media(window)
        self._clock.lap("rank_wait")
        self.engine.train()
        measured, scored = [], []
        for micro_step, (batch, media) in enumerate(zip(window, lockstep, strict=True)):
            if micro_step:
                self.engine.step()  # between micro-batches it only counts
            self._reports.note(batch)
            placed = batch.to(self.engine.device)
            outputs = self.engine(placed, scale=scale, ratio=ratio, seed=seed, warm_start=warm, lockstep=media)
            self._clock.lap("forward")
            if self._histograms_are_due(self.step + 1):
                scored.append((self.module.last_plan.scores, placed.layout))
            self.engine.backward(outputs["loss"], scale_wrt_gas=False)
            self._guard.watch(batch.ids, outputs["loss"])
            self._clock.lap("backward")
            measured.append((outputs, batch))
        outcome = self._guard.step(self.engine, stop=self._interruption.asked)
        self._clock.lap("optimiser")
        if not outcome.faults:
            for outputs, batch in measured:
                self._meter.add(outputs, batch)
            for scores, layout in scored:
                self._scores.add(scores, layout)
        return outcome

    def _ratio(self) -> float | None:
        low, high = self._train.ratio.min, self._train.ratio.max
        return None if low is None or high is None else draw_ratio(self._train.seed, self.step, low, high)

    def _report_faults(self, faults: Sequence[Fault], tracker: Tracker) -> None:
        if not faults:
            return
        tracker.note(self.step, left_out=[asdict(fault) for fault in faults])
        if self._ranks.is_first:
            reasons = "; ".join(map(str, faults))
            tqdm.write(f"step {self.step} is left out, no parameter changes: {reasons}", file=sys.stderr)
        self._guard.check(self.step, faults)

    # Every few steps.

    def _record(self, sums: dict[str, float] | None, rates: dict[str, float], tracker: Tracker) -> None:
        """Log what is due after this step.

        Args:
            sums: over the steps since the last time; None: not due.
            rates: learning rates of this step.
            tracker: the log.
        """
        scalars = {}
        if sums is not None:
            scalars = self._scalars(sums, rates)
            self._clock.restart()
        if self._histograms_are_due(self.step):
            found = self._scores.read()
            tracker.histograms(self.step, {f"score/{modality}": values for modality, values in found.items()})
            for modality, values in found.items():
                scalars |= {f"score_{modality}/{name}": value for name, value in values.summary().items()}
        if scalars:
            tracker.log(self.step, scalars)

    def _histograms_are_due(self, step: int) -> bool:
        """Whether scores are counted in a step, from 1; a warm start has none that a selection is made by."""
        every = self._train.histogram_every
        due = every > 0 and (step % every == 0 or step == self._train.max_steps)
        return due and step > self._train.warm_start.steps

    def _scalars(self, sums: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
        """What is logged of the steps since the last time; of the loss nothing, if all of them were left out."""
        scalars = {"bad_steps": float(self._guard.total), **{f"lr/{owner}": value for owner, value in rates.items()}}
        if not self._guard.in_a_row:
            scalars["grad_norm"] = float(self.engine.get_global_grad_norm())
        return scalars | record(sums, self._clock, memory(self.engine.device)) if sums else scalars

    @torch.no_grad()
    def _validate(self) -> dict[str, float] | None:
        """Teacher-forced loss and accuracy over the validation split, shared by all ranks; keeps the best.

        None when a rank is asked to end: a launcher would not wait for the rest.
        """
        assert self._streams.val is not None
        self.engine.eval()
        meter = Meter(self._ranks)
        for batch, counts in self._streams.val:
            self._reports.note(batch)
            (media,) = self._lockstep.media([batch])
            outputs = self.engine(batch.to(self.engine.device), lockstep=media)
            meter.add(outputs, batch, weight=float(counts))
            self._probes.note(batch, self.module.last_plan.keep)
            self._watchdog.beat()
            (asked,) = self._ranks.sum([float(self._interruption.asked)])
            self._stopping = asked > 0
            if self._stopping:
                return None
        sums = meter.read()
        if not sums["answer_tokens"]:
            raise TrainingError(f"no conversation in {self._config.data.val} has an assistant turn to validate on")
        scores = quality(sums)
        if scores["loss"] < self.best_loss:
            self.best_loss = scores["loss"]
            self._export(BEST, scores)
        return {
            **{f"val/{name}": value for name, value in scores.items()},
            **{f"val_ratio/{name}": value for name, value in ratios(sums).items()},
            **{f"churn/{name}": value for name, value in self._probes.settle().items()},
        }

    # Files.

    def _open(self) -> None:
        """Go on where a checkpoint ends, or begin; then the run's folder says with which configuration."""
        checkpoint = self._store.find(self._train.resume)
        if checkpoint is not None:
            self._resume(checkpoint)
        self._ranks.barrier()
        if not self._ranks.is_first:
            return
        for name in (LAST, BEST):
            clean_up(self._directory / name, is_owned)  # of an export that died
        if checkpoint is None:
            # Of a run that was cut short before its first checkpoint.
            remove(self._directory / BEST, is_owned)
        with writing("the configuration", self._directory / CONFIG_FILE):
            self._directory.mkdir(parents=True, exist_ok=True)
            save_config(self._config, self._directory / CONFIG_FILE)

    def _resume(self, checkpoint: Path) -> None:
        state = self._store.load(self.engine, checkpoint)
        self.step, self.best_loss = state["step"], state["best_loss"]
        self._guard.load_state_dict(state["bad_steps"])
        self._probes.load_state_dict(state["probes"])
        self._validation_is_due = self._validates and state["validation_is_due"]
        try:
            self._streams.sampler.load_state_dict(state["sampler"])
        except ValueError as error:
            raise CheckpointError(f"{checkpoint}: {error}") from error
        if self._ranks.is_first:
            tqdm.write(f"resumed from {checkpoint}, step {self.step} of {self._train.max_steps}", file=sys.stderr)

    def _save(self) -> None:
        state = {
            "best_loss": self.best_loss,
            "sampler": self._streams.sampler.state_dict(),
            "bad_steps": self._guard.state_dict(),
            "probes": self._probes.state_dict(),
            "validation_is_due": self._validation_is_due,
        }
        self._store.save(self.engine, self.step, state)
        self._export(LAST, {})

    def _export(self, name: str, scores: dict[str, float]) -> None:
        card = {
            "backbone": self._config.model.path,
            "training data": self._config.data.train,
            "steps": self.step,
            "seed": self._train.seed,
            **{f"validation {key}": round(value, 4) for key, value in scores.items()},
        }
        export(self.module, self._directory / name, self._config, card, self._ranks)
